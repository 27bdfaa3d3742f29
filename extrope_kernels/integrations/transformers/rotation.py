"""What goes through one forward of an extended model, and the attention that it meets there.

A model calls its rotary embedding once per forward and hands the (cos, sin) it returns to
`apply_rotary_pos_emb` in every layer. A `Rotation` goes the same way, in place of cos, with None in
place of sin. Where a score method is in force, the keyword arguments of the forward carry it on to
the attention, which transformers looks up by the name in a layer's config: nothing is shared
between forwards, not even when a layer is computed anew for its gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ... import RopeFreqs, apply_rope, apply_rope_qk
from ...ops.attention import attend
from ...ops.decode import attend_with_kvcache
from ...scores import Score
from .rows import Rows

ATTENTION = "extrope"  # the name in a layer's config
KEYWORD = "extrope_rotation"  # the argument of forwards


@dataclass(frozen=True, eq=False)
class Rotation:
    """Frequencies and positions of one forward; with a score method, its attention too.

    Opaque to whatever casts or checkpoints tensors on the way, so the frequencies stay float32 and
    the positions integers in a model of any dtype.

    positions: (batch or 1, seqlen), of queries and keys. With a score those of keys alone, where a
        cache keeps them; None leaves keys as they are.
    score: None where the model's own attention follows.
    log_n: as in the attention ops.
    rows: the tokens of the forward and those before them; None without a score.
    """

    freqs: RopeFreqs
    positions: Tensor | None
    interleaved: bool
    score: Score | None = None
    log_n: float | None = None
    rows: Rows | None = None

    def to(self, device: torch.device | str | int, **_: Any) -> Rotation:
        """Move to `device`: accelerate's hooks call this where a model spans several devices."""
        positions = None if self.positions is None else self.positions.to(device)
        rows = None if self.rows is None else self.rows.to(device)
        return replace(self, freqs=self.freqs.to(device), positions=positions, rows=rows)

    def rotate(self, q: Tensor, k: Tensor, unsqueeze_dim: int) -> tuple[Tensor, Tensor]:
        """Stand in for `apply_rotary_pos_emb`; q and k have heads in dimension `unsqueeze_dim`.

        With a score queries stay raw, as the attention takes them.
        """
        if unsqueeze_dim not in (1, 2):
            raise ValueError(f"extend: unsqueeze_dim must be 1 or 2, got {unsqueeze_dim}")
        if unsqueeze_dim == 2:
            return self._rotate(q, k)
        q, k = self._rotate(q.transpose(1, 2), k.transpose(1, 2))
        return q.transpose(1, 2), k.transpose(1, 2)

    def _rotate(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        options = {"positions": self.positions, "interleaved": self.interleaved}
        if self.score is None:
            return apply_rope_qk(q, k, self.freqs, **options)
        if self.positions is None:
            return q, k
        # The attention factor of both sides goes onto the queries, in the attention.
        freqs = RopeFreqs(self.freqs.inv_freq, log_decay=self.freqs.for_keys().log_decay)
        return q, apply_rope(k, freqs, **options)

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, options: Mapping[str, Any]
    ) -> Tensor:
        """Attend from raw queries to keys and values as a cache holds them.

        q, k, v: (batch, heads, seqlen, head_dim), the queries the last of the keys' tokens.
        Returns (batch, seqlen_q, heads, head_dim).
        """
        refuse_options(module, options)
        total = self.rows.total
        # Under autocast, norms leave q and k wider than v. A static cache is longer than what it
        # holds.
        q, k = q.transpose(1, 2).to(v.dtype), k.transpose(1, 2).to(v.dtype)
        k, v = k[:, :total], v.transpose(1, 2)[:, :total]
        if q.shape[1] != self.rows.new or k.shape[1] != total:
            raise ValueError(
                f"extend: a cache must return all {total} keys of a layer in their order, "
                f"got {k.shape[1]}"
            )
        here = self if self.freqs.inv_freq.device == q.device else self.to(q.device)
        return here._attend(q, k, v, options["scaling"])

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        rows = self.rows
        options = {"softmax_scale": scale, "log_n": self.log_n, "interleaved": self.interleaved}
        if rows.new == 1 and not _records(q, k, v):
            options |= {"cache_seqlens": rows.total, "cache_leftpad": rows.leftpad}
            return attend_with_kvcache(self.score, q, k, v, self.freqs, op="extend", **options)
        outs = []
        for start, stop, pad in rows.runs:
            skip = min(max(pad - rows.past, 0), rows.new)
            run = (q[start:stop, skip:], k[start:stop, pad:], v[start:stop, pad:])
            out = attend(self.score, *run, self.freqs, keys_stored=True, op="extend", **options)
            # Nothing looks at the padding, but NaN there would spread.
            outs.append(nn.functional.pad(out, (0, 0, 0, 0, skip, 0)) if skip else out)
        return outs[0] if len(outs) == 1 else torch.cat(outs)


def register_attention() -> None:
    """Make transformers know the attention by its name."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attention)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention function of transformers' interface; the mask is in the rows already."""
    rotation = rotation_in(module, options)
    del options[KEYWORD]
    return rotation.attend(module, query, key, value, options), None


def rotation_in(module: nn.Module, arguments: Mapping[str, Any]) -> Rotation:
    """Return the rotation among the arguments of a layer or of its attention."""
    rotation = arguments.get(KEYWORD)
    if rotation is None:
        raise RuntimeError(
            f"extend: {type(module).__name__} must get the keyword arguments of its model's "
            f"forward, got no {KEYWORD}"
        )
    return rotation


def refuse_options(module: nn.Module, options: Mapping[str, Any]) -> None:
    """Raise ValueError for what would change the attention and can be switched on at any time."""
    if options.get("dropout"):
        raise ValueError(
            "extend: a model in training must have attention_dropout 0, "
            f"got {options['dropout']} in {type(module).__name__}"
        )
    if options.get("cu_seq_lens_q") is not None:
        raise ValueError("extend: sequences must come as rows, got cu_seq_lens_q of packed ones")


def _records(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
