"""The loss and the passkey recall of a real model past its training length, method by method."""


class UsageError(ValueError):
    """What the user asked for cannot be done; the message says why in one line."""
