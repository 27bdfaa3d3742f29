"""vLLM: serves models by any method, chosen by `additional_config={"extrope": {...}}`."""

from .plugin import register

__all__ = ["register"]
