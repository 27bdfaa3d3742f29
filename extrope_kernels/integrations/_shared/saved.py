"""extrope.json: how a saved model was extended, and how far its method reaches."""

from __future__ import annotations

import inspect
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...methods import METHODS
from ...scores import SCORES

SAVED = "extrope.json"  # what `save_pretrained` of an extension writes beside a configuration
TRAINED = "original_max_position_embeddings"
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

    @property
    def is_score(self) -> bool:
        return self.method in SCORES


@dataclass(frozen=True)
class SavedFolder:
    """What the extrope.json of a folder says.

    in_config: its config.json says it too, so that other programs read the same model.
    """

    path: str
    extensions: tuple[Saved, ...]
    in_config: bool

    def __str__(self) -> str:
        return in_words(self.extensions)

    def reaches(self, length: int) -> bool:
        """Return False if the extended model reads fewer tokens, as far as it is known."""
        known = self.extensions[-1].length
        return known is None or length <= known


def in_words(extensions: Iterable[Any]) -> str:
    """Return extensions of one model (`Saved` or `Applied`), in their order, in a line of text."""
    text = ""
    for each in extensions:
        function = (METHODS | SCORES).get(each.method)
        known = {} if function is None else inspect.signature(function).parameters
        told = {
            name: value
            for name, value in each.parameters.items()
            # What was saved has the method's defaults too.
            if name not in known or repr(value) != repr(known[name].default)
        }
        given = "".join(f" {name}={_brief(value)}" for name, value in told.items())
        # A score method keeps the frequencies before it, which others replace.
        where = "over" if each.is_score else "in place of"
        text = f"{each.method}{given}" + (f" {where} {text}" if text else "")
    return text


def _brief(value: Any) -> str:
    """Return a parameter's value for a line of text: lists and frequencies may be long."""
    text = f"{value:.6g}" if isinstance(value, float) and not value.is_integer() else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


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
    trained = values.get(TRAINED)
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


def find(folder: str | os.PathLike) -> SavedFolder | None:
    """Return what the extrope.json of a folder says, None if it has none; raises as `read`."""
    path = Path(folder, SAVED)
    if not path.is_file() or not (extensions := tuple(read(folder))):
        return None
    in_config = json.loads(path.read_text(encoding="utf-8")).get("in_config", False)
    return SavedFolder(str(folder), extensions, in_config)
