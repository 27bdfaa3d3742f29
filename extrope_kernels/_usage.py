"""What commands share: the error of one line, and what keeps transformers and the network quiet."""

from __future__ import annotations

import importlib.util
import os


class UsageError(ValueError):
    """A request that cannot be done; the message says why in one line."""


def shortened(error: Exception) -> str:
    """Return the first line of other code's error, to quote it; two if it ends in a colon.

    The name of an error that says nothing.
    """
    first, *rest = (str(error).strip() or type(error).__name__).split("\n")
    if first.endswith(":") and rest:
        first = f"{first} {rest[0].strip()}"
    return first[:200]


def require(*packages: str) -> None:
    """Raise UsageError, with the command to run, if one of `packages` is missing."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        command = f"pip install {' '.join(missing)} (or, in a checkout, pip install '.[demo]')"
        raise UsageError(f"{', '.join(missing)} not installed; run: {command}")


def stay_offline() -> None:
    """Keep this process off the network: for commands, before the import of transformers."""
    os.environ["HF_HUB_OFFLINE"] = "1"


def quiet() -> None:
    """Keep transformers' progress bars and warnings off the terminal."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
