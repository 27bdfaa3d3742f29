"""Calls of a module's `forward`, which pass its hooks by: sentence-transformers makes such."""

from __future__ import annotations

import inspect
import threading
import uuid
from typing import Any

from torch import nn

# Of each thread: by the key of an entry, whether a call has come through the hooks.
_came = threading.local()


class Entry:
    """Stands in for the forward of a module with hooks, and has every call come through them."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.previous = vars(module).get("forward")
        self.key = uuid.uuid4().hex

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(type(self.module).forward)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the module, the last of an extension's."""
        setattr(_came, self.key, True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not getattr(_came, self.key, False):
            return self.module(*args, **kwargs)
        setattr(_came, self.key, False)
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)
