"""The entry of a model that was saved as extended, from the extrope.json beside its weights.

Nothing here imports vLLM: a model's configuration is read by attribute names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...scores import SCORES
from .._shared.parameters import is_bounded
from .._shared.saved import SAVED, parse
from .settings import NAME


def take_saved(
    additional_config: Mapping[str, Any], model: str, content: bytes
) -> tuple[Mapping[str, Any], str | None]:
    """Return additional_config with an entry of ours, and what to log of where it is from.

    An entry that is there stays, `None` too, which is plain vLLM. content: of the model's file.

    Raises ValueError for a file that no entry can stand for.
    """
    file = f"{SAVED} of {model}"
    if NAME in additional_config:
        return additional_config, f"additional_config's entry is taken, not {file}"
    entry = _entry_of(file, content)
    return {**additional_config, NAME: entry}, f"taken from the file {file}"


def check_layers(model: str, content: bytes, text: Any) -> None:
    """Raise ValueError if layers with a window were extended, which engines leave as they are.

    text: the configuration of the language model.
    """
    everywhere = any(each.layers == "all" for each in parse(NAME, f"{SAVED} of {model}", content))
    kinds = getattr(text, "layer_types", None) or ()
    if everywhere and (getattr(text, "sliding_window", None) or any(map(is_bounded, kinds))):
        raise ValueError(
            f"{NAME}: {SAVED} of {model} must be of layers='full' for a model in which some "
            "layers have a window, got 'all'; give an entry in additional_config"
        )


def _entry_of(file: str, content: bytes) -> dict[str, Any]:
    extensions = parse(NAME, file, content)
    scores = [each for each in extensions if each.method in SCORES]
    # The last one replaces the scaling of those before it.
    frequencies = [each for each in extensions if each.method not in SCORES][-1:]
    if not extensions or len(scores) > 1:
        raise ValueError(
            f"{NAME}: {file} must hold an extension, and one score method at most, got "
            f"{', '.join(each.method for each in extensions) or 'none'}"
        )
    entry: dict[str, Any] = {}
    for each in frequencies:
        entry = {"method": each.method, **each.parameters}
    for each in scores:
        entry["score"] = {"method": each.method, **each.parameters}
    if any(each.cache == "raw" for each in extensions):
        entry["cache"] = "raw"
    return entry
