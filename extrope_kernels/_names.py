"""What a wrong name may have meant, and what is wrong with a call that does not fit."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import ParamSpec, TypeVar

from ._coming_from import stand_in_for, stands_for
from ._rope_types import ROPE_TYPES

Given, Result = ParamSpec("Given"), TypeVar("Result")

# Other people's names for methods.
_OTHERS = {
    "positioninterpolation": "pi",
    "interpolation": "pi",
    "ntk": "ntk_aware",
    "dynamicyarn": "dynamic_yarn",
    "dca": "dual_chunk",
    "dualchunkattention": "dual_chunk",
    "leaky": "leaky_rerope",
    "lex": "blockwise_causal",
    "groupedattention": "self_extend",
}
AXES: dict[str, tuple[str, ...]] = {}  # by module, the names of its methods


def closest(given: object, names: Iterable[str]) -> str | None:
    """Return which of `names` a name of other letters or libraries means; None if none."""
    by_letters = {name.replace("_", ""): name for name in names}
    letters = "".join(filter(str.isalnum, str(given))).lower()
    found = _OTHERS.get(letters)
    if letters in ROPE_TYPES:
        found = ROPE_TYPES[letters].method
    if found in by_letters.values():
        return found
    close = difflib.get_close_matches(letters, by_letters, 1)
    return by_letters[close[0]] if close else None


def meant(given: object, names: Iterable[str]) -> str:
    """Return " (did you mean 'yarn'?)" for what is like one of `names`; else nothing."""
    found = closest(given, names)
    return f" (did you mean {found!r}?)" if found else ""


def not_among(name: str, given: object, names: Iterable[str]) -> str:
    """Return that `name` must be one of `names`: what was meant comes before the list."""
    names = tuple(names)
    found = closest(given, names)
    hint = f"did you mean {found!r}? " if found else ""
    return f"{hint}{name} must be one of {', '.join(names)}, got {given!r}"


def no_attribute(module: str, name: str, names: Iterable[str]) -> AttributeError:
    """Return the error for a name that a module does not have: where it is, or what was meant.

    names: those that the module has.
    """
    others = (other for other, has in AXES.items() if other != module and name in has)
    if other := next(others, None):
        where = f": it is in {other}"
    elif known := stands_for(name):
        where = f"; {known}"
    else:
        where = meant(name, names)
    return AttributeError(f"module {module!r} has no attribute {name!r}{where}")


def no_argument(given: str, names: Collection[str]) -> str:
    """Return that a function has no such argument: what stands for it, was meant, or is there.

    names: of the arguments that it has.
    """
    if known := stands_for(given, names):
        return f"no argument {given}; {known}"
    hint = meant(given, names) or f"; it has {', '.join(names)}"
    return f"no argument {given}{hint}"


def explains_wrong_calls(function: Callable[Given, Result]) -> Callable[Given, Result]:
    """Let a function say what a call that does not fit its signature may have meant.

    A call that fits pays one more frame.
    """

    @functools.wraps(function)
    def call(*args: Given.args, **options: Given.kwargs) -> Result:
        try:
            return function(*args, **options)
        except TypeError as error:
            if (told := _wrong_call(function, args, options, error)) is None:
                raise
        raise TypeError(told)

    return call


def _wrong_call(
    function: Callable[..., object],
    args: Sequence[object],
    options: Mapping[str, object],
    error: TypeError,
) -> str | None:
    """Return what is wrong with a call that does not fit a function's signature.

    Or has a tensor as frequencies. None for other errors.
    """
    op, signature = function.__name__, inspect.signature(function)
    parameters = signature.parameters
    if unknown := [name for name in options if name not in parameters]:
        return f"{op}: {no_argument(unknown[0], parameters)}"
    try:
        bound = signature.bind(*args, **options)
    except TypeError as misfit:
        wrong = f"{op}: {misfit}"
    else:
        if not hasattr(bound.arguments.get("freqs"), "shape"):
            return None
        wrong = str(error)
    names = [name for name, each in parameters.items() if each.kind is not each.KEYWORD_ONLY]
    stand = [f"{name} = {type(value).__name__}" for name, value in zip(names, args, strict=False)]
    stand += [type(value).__name__ for value in args[len(names) :]]
    takes = f"by position it takes {', '.join(names)}, and got {', '.join(stand) or 'none'}"
    known = stand_in_for(op)
    return f"{wrong}; {takes}" + (f". {known}" if known else "")
