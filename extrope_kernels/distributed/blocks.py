"""Cut a call over ranks into heads, runs of tokens, and blocks of queries with their keys."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.attention import AttentionCall
from .collectives import Group
from .layout import Balance, chunks

# Keys are sent an eighth of the heads at a time; more and smaller messages take longer.
PARTS = 8


class Plan(NamedTuple):
    """The arguments of a call over ranks, except q, k and v."""

    op: str  # the name that errors begin with
    call: AttentionCall
    backend: str | None
    group: Group
    balance: Balance
    boundaries: list[int] | None  # of all packed sequences


class Run(NamedTuple):
    """Consecutive tokens: the row of the first on a rank, and their positions.

    It is no slice: torch.compile would take the bounds of a slice in an object for constants.
    """

    row: int
    start: int
    stop: int  # past the last

    @property
    def rows(self) -> slice:
        """The rows of these tokens on a rank."""
        return slice(self.row, self.row + self.stop - self.start)

    def is_same(self, other: Run) -> bool:
        """Compare without ==, which makes PyTorch 2.11's compiler take lengths for constants."""
        return self.start == other.start and self.stop == other.stop

    def within(self, start: int, stop: int) -> Run:
        """Return the tokens at the positions start to stop; there may be none."""
        start = min(max(start, self.start), self.stop)
        stop = max(min(stop, self.stop), start)
        return Run(self.row + start - self.start, start, stop)


class Block(NamedTuple):
    """A run of queries and the keys of all ranks that it sees, up to its own last token.

    Tensors are (batch, seqlen, ...), or packed (total, ...). A packed block holds either queries of
    one sequence, for a call with a batch of one, or sequences from their beginnings on.
    """

    run: Run
    first_key: int = 0
    packed: bool = False
    cu_seqlens: Tensor | None = None  # of the sequences that begin in the block
    sequences: slice | None = None  # among all packed sequences

    def queries(self, x: Tensor) -> Tensor:
        """Return a view of the block's queries, for a call."""
        return self._cut(x, self.run.rows)

    def keys(self, x: Tensor) -> Tensor:
        """Return a view of the block's keys in all ranks' keys."""
        return self._cut(x, slice(self.first_key, self.run.stop))

    def lse(self, x: Tensor) -> Tensor:
        """Return a view of its log-sum-exp (batch, heads, seqlen), packed (heads, total)."""
        rows = x[..., self.run.rows]
        return rows.unsqueeze(0) if self._of_one else rows

    def call(self, call: AttentionCall, heads: slice) -> AttentionCall:
        """Return the call for the block's queries and these heads."""
        inv_freq, scale = call.inv_freq, call.query_scale
        if self.sequences is not None and inv_freq.dim() > 1 and inv_freq.shape[0] > 1:
            inv_freq = inv_freq[self.sequences]
        return call.of_heads(heads)._replace(
            inv_freq=inv_freq,
            cu_seqlens=self.cu_seqlens,
            query_scale=None if scale is None else scale[..., self.run.rows].contiguous(),
        )

    def _cut(self, x: Tensor, rows: slice) -> Tensor:
        if not self.packed:
            return x[:, rows]
        return x[rows].unsqueeze(0) if self._of_one else x[rows]

    @property
    def _of_one(self) -> bool:
        return self.packed and self.cu_seqlens is None


def parts_of(q: Tensor, k: Tensor) -> list[tuple[slice, slice]]:
    """Split heads into PARTS parts, or one by one: heads of queries, and those of their keys."""
    heads, group = k.shape[-2], q.shape[-2] // k.shape[-2]
    size = -(-heads // PARTS)
    parts = [slice(n, min(n + size, heads)) for n in range(0, heads, size)]
    return [(slice(part.start * group, part.stop * group), part) for part in parts]


def runs(tokens: int, group: Group, balance: Balance) -> list[Run]:
    """Return the runs of a rank that holds `tokens` tokens."""
    mine = chunks(group, balance)
    size = tokens // len(mine)
    return [Run(n * size, c * size, (c + 1) * size) for n, c in enumerate(mine)]


def blocks_of(plan: Plan, q: Tensor) -> list[Block]:
    """Return a rank's queries with the keys they see."""
    found = []
    for run in runs(q.shape[-3], plan.group, plan.balance):
        if plan.boundaries is None:
            found.append(Block(run))
        elif run.start < run.stop:
            found += _packed(run, plan.boundaries, q.device)
    return found


def _packed(run: Run, boundaries: list[int], device: torch.device) -> list[Block]:
    """Return a run's blocks: queries of a sequence that began before the run, then the others."""
    begun = sum(first < run.start for first in boundaries[:-1])
    reached = sum(first < run.stop for first in boundaries[:-1])
    middle = min(boundaries[begun], run.stop)
    found = []
    if run.start < middle:
        before = run.within(run.start, middle)
        found.append(Block(before, boundaries[begun - 1], True, None, slice(begun - 1, begun)))
    if middle < run.stop:
        rest = run.within(middle, run.stop)
        ends = [first - middle for first in boundaries[begun:reached]] + [run.stop - middle]
        cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=device)
        found.append(Block(rest, middle, True, cu_seqlens, slice(begun, reached)))
    return found


def joined(k: Tensor, v: Tensor) -> Tensor:
    """Join keys and values into one tensor to send: (seqlen, batch, heads_k, dims of both)."""
    return torch.cat([k, v], -1).movedim(-3, 0).contiguous()


def apart(rows: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return views of the keys and values in `joined` rows, with the dimensions of k and v."""
    return rows.movedim(0, -3).split([k.shape[-1], v.shape[-1]], -1)
