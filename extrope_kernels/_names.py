"""What a wrong name may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

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
# transformers' names of rope types that are not ours too; `extend` takes them for these.
ROPE_TYPES = {"default": "rope", "linear": "pi", "dynamic": "dynamic_ntk", "su": "longrope"}
AXES: dict[str, tuple[str, ...]] = {}  # by module, the names of its methods


def closest(given: object, names: Iterable[str]) -> str | None:
    """Return which of `names` a name of other letters or libraries means; None if none."""
    by_letters = {name.replace("_", ""): name for name in names}
    letters = "".join(filter(str.isalnum, str(given))).lower()
    found = (_OTHERS | ROPE_TYPES).get(letters)
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


def no_attribute(module: str, name: str) -> AttributeError:
    """Return the error for a name that an axis (methods, scores) does not have."""
    others = (other for other, names in AXES.items() if other != module and name in names)
    where = next((f": it is in {other}" for other in others), meant(name, AXES[module]))
    return AttributeError(f"module {module!r} has no attribute {name!r}{where}")
