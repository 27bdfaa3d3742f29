"""Measure how well each method lets a model read past its training length: loss and recall."""


class UsageError(ValueError):
    """A request that cannot be done; the message says why in one line."""


from .runner import evaluate  # noqa: E402 - it raises the error above

__all__ = ["UsageError", "evaluate"]
