"""How an extended layer attends: one attribute of the layer, which our attention function reads.

A layer rotates queries and keys to their positions and caches keys, as its model does without an
extension. The op moves both on to where the score's regions have them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ... import scores
from ...scores import Score
from . import paged
from .attention import attend_rows, no_rotation, read_rows, softmax_options
from .rotation import RotaryForward


@dataclass(eq=False)
class ExtendedLayer:
    """How a layer attends: by a score method, by raw keys, or across ranks.

    score: None for plain RoPE. rotary: it has the frequencies of the layer's heads, of the kind
    layer_type; None if nothing is moved on. start: the first rotated dim. interleaved: the pairing
    of dims. sign: -1 if pairs are rotated backwards. raw: queries and keys come raw. scaled: False
    if a norm after the rotation undoes the attention factor (Llama 4). log_n: scales queries,
    unless None. scale_from: the length from which logits grow (`query_scale.qwen_1m`), or None.
    shared: the ranks that share tokens (`context_parallel.Shared`), or None.
    """

    score: Score | None = None
    rotary: RotaryForward | None = None
    layer_type: str | None = None
    start: int = 0
    interleaved: bool = False
    sign: int = 1
    raw: bool = False
    scaled: bool = True
    log_n: float | None = None
    scale_from: int | None = None
    shared: Any = None

    @property
    def layout(self) -> dict[str, Any]:
        """The arguments that tell the ops which dims rotate."""
        return {"interleaved": self.interleaved, "rotary_offset": self.start}

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        options: Mapping[str, Any],
    ) -> Tensor:
        """Attend in the layer's place: the arguments of `attention.attention`."""
        refuse_dropout(module, options)
        # Under autocast, norms return q and k in a wider dtype than v's.
        q, k, v = (x.transpose(1, 2).to(value.dtype) for x in (query, key, value))
        call = softmax_options(module, options) | self._rotation(q)
        if self.shared is not None:
            return self.shared.attend(q, k, v, **call)
        if paged.is_paged(options):
            return paged.attend(q, k, v, options, call)
        rows = read_rows(mask, query, key, options)
        if rows is None:
            raise ValueError(
                "extend: attention_mask must be causal with each row's tokens or packed sequence "
                "in one piece, got another, or a cache that does not return all keys, in "
                f"{type(module).__name__}"
            )
        if self.scale_from is not None:
            scale = scores.query_scale.qwen_1m(rows.positions(q, k), self.scale_from)
            q = (q * scale[..., None, None]).to(q.dtype)
        return attend_rows(q, k, v, rows, call)

    def _rotation(self, q: Tensor) -> dict[str, Any]:
        """Return the options of the ops that are not the layer's own."""
        if self.rotary is None:
            return no_rotation(q)
        freqs = self.rotary.freqs_on(self.layer_type, q.device)
        if self.sign < 0:
            freqs = replace(freqs, inv_freq=-freqs.inv_freq)
        if not self.scaled:
            freqs = replace(freqs, attention_factor=1.0)
        given = {"freqs": freqs, "score": self.score, "log_n": self.log_n, **self.layout}
        return given | {"rotated": None if self.raw else "qk"}


def refuse_dropout(module: nn.Module, options: Mapping[str, Any]) -> None:
    """Raise ValueError for dropout, which may be set at any time."""
    if options.get("dropout"):
        raise ValueError(
            "extend: a model in training must have attention_dropout 0, "
            f"got {options['dropout']} in {type(module).__name__}"
        )
