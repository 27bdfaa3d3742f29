"""The attention of one forward under a score method.

A rotary embedding returns an `Attending` in place of its tables, so it reaches every layer as they
would. At the door of a layer to be extended, tables take its place that rotate keys to where a
cache keeps them, and it takes the place of the mask, which every layer hands to its attention. At
the door of any other layer that layer's own tables take its place. Nothing is shared between
forwards, not even when a layer is computed anew for its gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ... import RopeFreqs, apply_rope
from ...scores import Score
from .layer_options import refuse_options, softmax_options
from .paged import PackedRows
from .rows import ForwardRows, Rows


@dataclass(frozen=True)
class Heads:
    """Which dims of a layer's heads are rotated: dim of them from `start` on, and how paired.

    sign: -1 where a pair is rotated backwards.
    """

    start: int
    dim: int
    interleaved: bool
    sign: int


_ATTRIBUTES = (
    *("score", "log_n", "freqs", "rows", "positions", "raw_queries"),
    *("stored", "own", "heads", "chunk_size"),
)


class Attending:
    """A score method, the frequencies, the rows of a batch, and the tables of both kinds of layers.

    No dataclass: FSDP casts the tensors that those hold.

    positions: (batch or 1, seqlen), where keys are stored; None where they stay raw.
    raw_queries: the tables for extended layers rotate keys alone.
    stored, own: the position embeddings of extended layers, and those of the others.
    heads: of the layer whose attention this is. chunk_size: tokens, where it attends in chunks.
    """

    def __init__(
        self,
        score: Score,
        log_n: float | None,
        freqs: RopeFreqs,
        rows: ForwardRows,
        positions: Tensor | None,
        raw_queries: bool,
    ) -> None:
        self.score = score
        self.log_n = log_n
        self.freqs = freqs
        self.rows = rows
        self.positions = positions
        self.raw_queries = raw_queries
        self.stored: Any = None
        self.own: Any = None
        self.heads: Heads | None = None  # as `of` sets them
        self.chunk_size: int | None = None

    def changed(self, **changes: Any) -> Attending:
        """Return the same with other values of some attributes.

        Not by copy.copy: torch.compile of PyTorch 2.11 cannot look into it.
        """
        other = object.__new__(Attending)
        for name in _ATTRIBUTES:
            setattr(other, name, changes[name] if name in changes else getattr(self, name))
        return other

    def of(self, heads: Heads, chunk_size: int | None = None) -> Attending:
        """Return the attention of one layer."""
        freqs = self.freqs
        if heads.sign < 0:
            freqs = replace(freqs, inv_freq=-freqs.inv_freq)
        return self.changed(heads=heads, freqs=freqs, chunk_size=chunk_size)

    def __getitem__(self, index: Any) -> Attending:
        """Return the attention of the last tokens alone, sliced as tables of (batch, seqlen, dim).

        In layers that reuse the keys of others, a model computes the tokens it is asked for.
        """
        if not isinstance(self.rows, Rows):
            raise ValueError(
                "extend: layers that compute the last tokens alone must not be in a graph over a "
                "static cache or under continuous batching"
            )
        tokens = range(self.rows.new)[index[1]]
        last = len(tokens)
        if tokens != range(self.rows.new)[self.rows.new - last :]:
            raise ValueError(f"extend: tables must be sliced to the last tokens, got {index[1]}")

        def sliced(tables: Any) -> Any:
            return None if tables is None else type(tables)(each[index] for each in tables)

        positions = None if self.positions is None else self.positions[:, tokens.start :]
        rows, stored, own = self.rows.last(last), sliced(self.stored), sliced(self.own)
        return self.changed(rows=rows, positions=positions, stored=stored, own=own)

    def to(self, device: torch.device | str | int, **_: Any) -> Attending:
        """Move to `device`: accelerate's hooks call this where a model spans several devices."""
        move = _mover(device)
        return self.changed(
            freqs=self.freqs.to(device),
            rows=self.rows.to(device),
            positions=move(self.positions),
            stored=move(self.stored),
            own=move(self.own),
        )

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, options: Mapping[str, Any]
    ) -> Tensor:
        """Attend from queries as the layer rotates them to keys and values as a cache holds them.

        q, k, v: (batch, heads, seqlen, head_dim), the queries the last of the keys' tokens.
        Returns (batch, seqlen_q, heads, head_dim).
        """
        packed = isinstance(self.rows, PackedRows)
        refuse_options(module, options, packed)
        if packed and self.heads.start:
            raise ValueError(
                f"extend: {type(module).__name__} must rotate the first dims of its heads for "
                f"continuous batching, whose pages are read as they are, got {self.heads.start} "
                "others before them"
            )
        # Under autocast, norms leave q and k wider than v.
        q, k, v = (x.transpose(1, 2).to(v.dtype) for x in (q, k, v))
        here = self if self.freqs.inv_freq.device == q.device else self.to(q.device)
        q, k = (rotated_first(x, self.heads.start) for x in (q, k))
        if not self.raw_queries and here.positions is not None:
            q = apply_rope(
                q,
                RopeFreqs(here.freqs.inv_freq),
                positions=here.positions,
                interleaved=self.heads.interleaved,
                inverse=True,
            )
        op_options = softmax_options(module, options)
        op_options |= {"log_n": self.log_n, "interleaved": self.heads.interleaved, "op": "extend"}
        if self.chunk_size is not None:
            op_options["chunk_size"] = self.chunk_size
        return here.rows.attend(module, self.score, q, k, v, here.freqs, op_options)


def rotated_first(x: Tensor, start: int) -> Tensor:
    """Put the rotated dims first, where the ops expect them: scores are sums over dims."""
    return x if start == 0 else torch.cat((x[..., start:], x[..., :start]), -1)


def exchange(value: Any, found: Callable[[Attending], Any]) -> Any:
    """Return a layer's argument with every `Attending` in it exchanged for what it stands for."""
    if value is None or isinstance(value, Tensor):
        return value  # first, as most are
    if isinstance(value, Attending):
        return found(value)
    if isinstance(value, tuple) and value and isinstance(value[0], Attending):
        return found(value[0])
    if isinstance(value, Mapping):
        exchanged = {key: exchange(each, found) for key, each in value.items()}
        # Layers leave keys to one another in mappings, which must stay the same objects.
        if any(exchanged[key] is not each for key, each in value.items()):
            return exchanged
    return value


def _mover(device: torch.device | str | int) -> Callable[[Any], Any]:
    def move(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(move(each) for each in value)
        return value.to(device) if hasattr(value, "to") else value

    return move
