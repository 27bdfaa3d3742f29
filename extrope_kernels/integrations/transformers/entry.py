"""Direct calls of a module's `forward`, which skip its hooks: sentence-transformers makes them."""

from __future__ import annotations

import inspect
import threading
import uuid
from typing import Any

from torch import nn

# Per thread: by the key of an entry, True if a call has come through the hooks.
_came = threading.local()


class Entry:
    """Replacement forward of a module with hooks, which sends every call through them."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.previous = vars(module).get("forward")
        self.key = uuid.uuid4().hex

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(type(self.module).forward)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Note that the hooks run: the last forward pre-hook of an extension."""
        setattr(_came, self.key, True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not getattr(_came, self.key, False):
            return self.module(*args, **kwargs)
        setattr(_came, self.key, False)
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)
