"""The method for a length, where the user names none."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# Rows of docs/guide/measured.md, of SmolLM2-135M. By the multiple of its length that is read: the
# method, whose window is half of that length, and its loss over YaRN's. Recall is at twice.
OVER_YARN = {
    2: ("rerope", "-0.020 ± 0.002"),
    4: ("rerope", "-0.143 ± 0.028"),
    8: ("leaky_rerope", "-0.546 ± 0.001"),
}
RECALL = {"rerope": "2.56 ± 0.28", "leaky_rerope": "2.52 ± 0.29", "yarn": "0.72 ± 0.40"}
MEASURED = max(OVER_YARN)
FARTHEST = 2 * MEASURED  # a length past this multiple of a model's own gets a warning
LEAK = 16.0  # the factor of these rows, and of Leaky ReRoPE's code
# By model_type: a norm with weights comes after the rotation.
NORMED_AFTER = ("dory", "hunyuan_v1_dense", "hunyuan_v1_moe")
# Names in configurations of models whose layers choose keys (DeepSeek V3.2, Qwen4Exp).
SPARSE = ("index_topk", "indexer_budget")


@dataclass(frozen=True)
class Choice:
    """A method with its parameters, and the reason in one line.

    changes: False if the model stays as it is.
    """

    method: str
    parameters: Mapping[str, Any]
    reason: str
    changes: bool = True


def choose_method(
    length: int, trained: int, reach: int, *, refused: str | None = None, chunks: bool = False
) -> Choice | None:
    """Choose the method that measured best for `length` tokens (docs/guide/measured.md).

    trained: tokens of the training, before a scaling that a new factor replaces
        (`methods.lengths`).
    reach: tokens that the model reaches as it is, with the scaling of its configuration.
    refused: why no score method can serve the model, in a few words; None if one can.
    chunks: True if its configuration has the chunks that it was trained with (Qwen2.5-1M).

    Returns None if the model reaches the length as it is.
    """
    if length <= reach:
        return None
    if refused is not None:
        return Choice("yarn", {"factor": length / trained}, f"no score method: {refused}")
    if chunks:
        return Choice("dual_chunk", {}, "as it was trained, by its dual_chunk_attention_config")
    row = next((each for each in OVER_YARN if length <= each * reach), MEASURED)
    method, over = OVER_YARN[row]
    window = max(1, reach // 2)
    parameters: dict[str, float] = {"window": window}
    if method == "leaky_rerope":  # the farthest distance stays a trained one
        parameters["factor"] = max(LEAK, math.ceil((length - window) / max(1, reach - window)))
    past = length > MEASURED * reach
    reason = (
        f"exact within its window, half of {reach:,} tokens; measured on SmolLM2-135M at "
        f"{'up to ' if past else ''}{row} times its length"
        f"{f' (this is {times(length, reach)} times)' if past else ''}: {over.removeprefix('-')} "
        f"nats less than YaRN; at twice, recall of {RECALL[method]} where YaRN's is "
        f"{RECALL['yarn']}"
    )
    return Choice(method, parameters, reason)


def times(length: int, reach: int) -> str:
    """Return in words how often a length has the tokens that a model reaches, rounded up."""
    return f"{-(-length // reach):,}"


def why_no_score(config: Any) -> str | None:
    """Return why a configuration tells that no score method suits its model; None if it does not.

    `extend` finds more by running the model.
    """
    if sparse := [name for name in SPARSE if getattr(config, name, None)]:
        return f"its layers choose keys ({', '.join(sparse)})"
    if config.model_type in NORMED_AFTER:
        return "its layers norm queries and keys after the rotation"
    return None


def images_refused(kinds: Iterable[Mapping[str, Any]], see_both_ways: bool) -> str | None:
    """Return why a score method refuses the images that a model reads; None if it takes them.

    kinds: rope_parameters of each kind of layers. see_both_ways: tokens of an image see one
        another.
    """
    if any("mrope_section" in each for each in kinds):
        return "tokens of images have several positions"
    return "tokens of an image see one another" if see_both_ways else None
