"""How well a model reads past its training length, by loss and by recall, method by method."""


class UsageError(ValueError):
    """What the user asked for cannot be done; the message says why in one line."""


from .runner import evaluate  # noqa: E402 - it raises the error above

__all__ = ["UsageError", "evaluate"]
