"""The model itself."""

from __future__ import annotations

import inspect
import sys
import weakref
from typing import Any

from lm_eval.models.huggingface import HFLM

from ..._names import not_among
from ..._usage import UsageError, shortened
from ...integrations._shared.parameters import PARAMETERS, check_names
from ...integrations.transformers import extend, extend_from_saved, register_interface
from ..options import saved_folder

NAME = "extrope"
# lm-eval cuts the beginning off prompts that are longer. Rotations are exact as far as this.
_LONGEST = 2**24
_OPTIONS = {"length", "layers", "cache"}  # of `extend`, beside the method's parameters


class ExtropeLM(HFLM):
    """lm-eval's model of transformers, extended until `restore()`.

    method: a name of `PARAMETERS`; if None, the one that `extend` chooses for `length`. Without
        both the model as its folder, or that of its adapters (`peft`), was saved: extended or not.
    max_length: as HFLM has it, but without a limit that a text would meet if None.
    given: the method's parameters, `length`, `layers` and `cache` of `extend`, and HFLM's keywords,
        in any order. What neither knows goes to transformers' `from_pretrained`, as with HFLM.

    Raises UsageError.
    """

    _handle: weakref.finalize | None = None

    def __init__(
        self,
        pretrained: Any,
        method: str | None = None,
        max_length: int | None = None,
        **given: Any,
    ) -> None:
        parameters, kwargs = _split(method, given)
        named = method is not None or bool(parameters)
        saved = saved_folder(kwargs.get("peft"), pretrained)
        asked = [(method or "", parameters)]
        if saved is not None:
            taken = "by the method named alone" if named else "as it was saved"
            print(f"{saved.path} was saved as extended by {saved}: read {taken}", file=sys.stderr)
            if not named:
                asked = [(each.method, each.parameters) for each in saved.extensions]
        if max_length is None and str(kwargs.get("batch_size", 1)).startswith("auto"):
            raise UsageError("batch_size=auto needs max_length, the longest prompt")
        for name, own in asked:
            follows = "seq_len" in PARAMETERS.get(name, ()) and "seq_len" not in own
            if follows and str(kwargs.get("batch_size", 1)) != "1":
                # The harness pads without a mask: rows do not tell their lengths.
                raise UsageError(
                    f"batch_size must be 1 for {name}, whose frequencies follow each text's "
                    f"length, or give it a seq_len, got batch_size={kwargs['batch_size']}"
                )
        register_interface()  # so that attn_implementation=extrope can be asked for
        try:
            super().__init__(pretrained, max_length=max_length or _LONGEST, **kwargs)
        except TypeError as error:
            for name in kwargs.keys() - inspect.signature(HFLM.__init__).parameters:
                if f"'{name}'" in str(error):
                    raise UsageError(f"neither extend nor transformers takes {name}") from error
            raise
        except OSError as error:  # no such folder
            raise UsageError(shortened(error)) from error
        if not named and saved is None:
            return
        try:
            if named:
                handle = extend(self.model, method, **parameters)
            else:
                handle = extend_from_saved(self.model, saved.path)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise UsageError(str(error)) from error
        self._handle = weakref.finalize(self, handle.restore)

    def restore(self) -> None:
        """Give the model back as it was; happens by itself when this object goes."""
        if self._handle is not None:
            self._handle()


def _split(method: str | None, given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a method's parameters, and what is for HFLM; raises UsageError.

    A parameter of some other method is a mistake: transformers has no use for one.
    """
    if method is not None and method not in PARAMETERS:
        raise UsageError(not_among("method", method, PARAMETERS))
    known = _OPTIONS.union(*PARAMETERS.values())
    parameters = {name: value for name, value in given.items() if name in known}
    if method is None and parameters and "length" not in parameters:
        raise UsageError(f"{next(iter(parameters))} needs a method, or length to have one chosen")
    try:
        if method is not None:
            own = {name: parameters[name] for name in parameters if name not in _OPTIONS}
            check_names(NAME, method, own, others=None)
    except TypeError as error:
        raise UsageError(str(error)) from error
    return parameters, {name: value for name, value in given.items() if name not in known}
