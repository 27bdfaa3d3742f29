"""Measure how well each method lets a model read past its training length: loss and recall."""

from .._usage import UsageError
from .runner import evaluate

__all__ = ["UsageError", "evaluate"]
