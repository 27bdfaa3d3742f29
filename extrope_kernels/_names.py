"""What a wrong name may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Other people's names for methods.
_OTHERS = {
    "default": "rope",
    "linear": "pi",
    "positioninterpolation": "pi",
    "interpolation": "pi",
    "ntk": "ntk_aware",
    "dynamic": "dynamic_ntk",
    "dynamicyarn": "dynamic_yarn",
    "su": "longrope",
    "dca": "dual_chunk",
    "dualchunkattention": "dual_chunk",
    "leaky": "leaky_rerope",
    "lex": "blockwise_causal",
    "groupedattention": "self_extend",
}
AXES: dict[str, tuple[str, ...]] = {}  # by module, the names of its methods


def meant(given: object, names: Iterable[str]) -> str:
    """Return " (did you mean 'yarn'?)" for what is like one of `names`; else nothing."""
    by_letters = {name.replace("_", ""): name for name in names}
    letters = "".join(filter(str.isalnum, str(given))).lower()
    found = _OTHERS.get(letters)
    if found not in by_letters.values():
        close = difflib.get_close_matches(letters, by_letters, 1)
        found = by_letters[close[0]] if close else None
    return f" (did you mean {found!r}?)" if found else ""


def no_attribute(module: str, name: str) -> AttributeError:
    """Return the error for a name that an axis (methods, scores) does not have."""
    others = (other for other, names in AXES.items() if other != module and name in names)
    where = next((f": it is in {other}" for other in others), meant(name, AXES[module]))
    return AttributeError(f"module {module!r} has no attribute {name!r}{where}")
