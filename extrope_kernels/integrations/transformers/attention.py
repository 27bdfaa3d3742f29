"""The attention of extended layers: what a transformers model calls in place of its own.

transformers looks the function up by the name in a layer's config, and hands keyword arguments of
the model's forward through to it: a `Pass` comes that way, so that nothing is shared between
forwards, not even when a layer is computed anew for its gradients.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ... import RopeFreqs
from .rows import Rows
from .scores import Score

NAME = "extrope"
PASS = "extrope_pass"


@dataclass(frozen=True, eq=False)
class Pass:
    """What the attention of every layer needs to know of one forward of the model."""

    score: Score
    freqs: RopeFreqs
    interleaved: bool
    rows: Rows

    def to(self, device: torch.device | str | int, **_: Any) -> Pass:
        """Move to `device`: accelerate's hooks call this where a model spans several devices."""
        return replace(self, freqs=self.freqs.to(device))

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]
    ) -> Tensor:
        """q, k, v: (batch, heads, seqlen, head_dim). Returns (batch, seqlen_q, heads, head_dim)."""
        refuse_options(module, options)
        rows, scale = self.rows, options["scaling"]
        # Under autocast, norms leave q and k wider than v. A static cache is longer than what it
        # holds.
        q, k = q.transpose(1, 2).to(v.dtype), k.transpose(1, 2).to(v.dtype)
        k, v = k[:, : rows.total], v.transpose(1, 2)[:, : rows.total]
        if q.shape[1] != rows.new or k.shape[1] != rows.total:
            raise ValueError(
                f"extend: a cache must return all {rows.total} keys of a layer in their order, "
                f"got {k.shape[1]}"
            )
        freqs = self.freqs if self.freqs.inv_freq.device == q.device else self.freqs.to(q.device)
        by = (freqs, self.interleaved, scale)
        if rows.new == 1 and self.score.decodes and not _records(q, k, v):
            pads = None if rows.leftpad is None else rows.leftpad.to(q.device)
            return self.score.decode(q, k, v, *by, used=rows.total, leftpad=pads)
        outs = []
        for start, stop, pad in rows.runs:
            skip = min(max(pad - rows.past, 0), rows.new)
            q_run, k_run, v_run = q[start:stop, skip:], k[start:stop, pad:], v[start:stop, pad:]
            out = self.score.attend(q_run, k_run, v_run, *by)
            # Nothing looks at the padding, but NaN there would spread.
            outs.append(nn.functional.pad(out, (0, 0, 0, 0, skip, 0)) if skip else out)
        return outs[0] if len(outs) == 1 else torch.cat(outs)


def _records(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention function of transformers' interface; the mask is in the `Pass` already."""
    current = options.pop(PASS, None)
    if current is None:
        raise RuntimeError(
            f"extend: {type(module).__name__} must get the keyword arguments of its model's "
            f"forward, got no {PASS}"
        )
    return current.attend(module, query, key, value, options), None


def register_attention() -> None:
    """Make transformers know the attention by its name."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)


def refuse_options(module: nn.Module, options: dict[str, Any]) -> None:
    """Raise ValueError for what would change the attention and can be switched on at any time."""
    if options.get("dropout"):
        raise ValueError(
            "extend: a model in training must have attention_dropout 0, "
            f"got {options['dropout']} in {type(module).__name__}"
        )
    if options.get("cu_seq_lens_q") is not None:
        raise ValueError("extend: sequences must come as rows, got cu_seq_lens_q of packed ones")
