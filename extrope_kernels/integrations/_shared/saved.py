"""extrope.json: how a saved model was extended, and how far its method reaches."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...scores import SCORES

SAVED = "extrope.json"  # what `save_pretrained` of an extension writes beside a configuration
_TRAINED = "original_max_position_embeddings"
# Methods that stretch the trained length by their factor.
STRETCHING = (
    *("pi", "ntk_aware", "ntk_by_parts", "ntk_mixed", "yarn", "mrrope", "llama3", "longrope"),
    *("leaky_rerope", "self_extend"),
)


@dataclass(frozen=True)
class Saved:
    """An extension in its stored form.

    parameters: for a frequency method also the model's, if all kinds of layers share them.
    length: the number of tokens that the extended model can read; None: no limit, or not known.
    """

    method: str
    parameters: dict[str, Any]
    layers: str
    length: int | None = None
    cache: str | None = None


def length_of(method: str, values: Mapping[str, Any]) -> int | None:
    """Return the tokens that a method reaches; values: the model's and the method's parameters."""
    factor, longest = values.get("factor"), values.get("max_position_embeddings")
    if method in SCORES:
        window = values.get("window")
        if method == "rerope" and longest is not None and window >= longest:
            return longest  # nothing lies past the window
        if method not in STRETCHING or longest is None or factor == math.inf:
            return None
        # Frequencies reach `longest`; a score stretches the part past the window.
        window = min(window, longest)
        return window + int((longest - window) * factor)
    trained = values.get(_TRAINED)
    if "seq_len" in values or method == "rope":
        return values.get("seq_len", trained)
    if method == "longrope" and factor is None:
        return longest
    stretches = method in STRETCHING and None not in (trained, factor)
    return int(trained * factor) if stretches else None


def read(folder: str | os.PathLike) -> list[Saved]:
    """Return the extensions stored in a folder; raise ValueError if there are none."""
    path = Path(folder, SAVED)
    if not path.is_file():
        raise ValueError(f"extend_from_saved: folder must have a file {SAVED}, got {folder}")
    return parse("extend_from_saved", path, path.read_bytes())


def parse(op: str, file: str | os.PathLike, content: bytes) -> list[Saved]:
    """Return the extensions in a file's content; op: the beginning of errors.

    Raises ValueError for a content that is not what an extension has saved.
    """
    try:
        return [Saved(**each) for each in json.loads(content)["extensions"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{op}: {file} must hold what an extension has saved, got {error!r}"
        ) from None
