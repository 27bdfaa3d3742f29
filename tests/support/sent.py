"""Bytes that a rank sends: counted from its collectives, and by formula."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Sent(TorchDispatchMode):
    """A mode that counts the bytes that this rank sends to others.

    A gather sends its part to each other rank, a sum of parts sends each rank its part, an exchange
    sends all but its own part.
    """

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size, self.bytes = rank, size, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None):
        name = func.overloadpacket.__name__
        if func.namespace == "_c10d_functional" and name != "wait_tensor":
            total = args[0].numel() * args[0].element_size()
            if name == "all_gather_into_tensor":
                self.bytes += (self.size - 1) * total
            elif name == "reduce_scatter_tensor":
                self.bytes += total * (self.size - 1) // self.size
            elif name == "all_to_all_single":
                splits = args[2]
                to_others = sum(splits) - splits[self.rank]
                self.bytes += total * to_others // max(sum(splits), 1)
            else:
                raise NotImplementedError(f"nothing is known of what {name} sends")
        return func(*args, **(kwargs or {}))


def by_formula(strategy: str, q: Tensor, k: Tensor, v: Tensor, ranks: int, backward: bool) -> int:
    """Return the bytes that a rank sends of its q, k and v; out has q's dtype.

    With V the bytes of all keys and values, W those of their gradients in float32, Q those of all
    queries and O of all outputs: a gather (P-1)/P V, and back (P-1)/P (V + W); a ring (P-1)/P V,
    and back (P-1)/P V + W; Ulysses (P-1)/P of (Q + V' + O)/P either way, V' with heads repeated.
    """
    keys = k.numel() + v.numel()  # of one rank: V is P times as many
    if strategy == "ulysses":
        repeated = max(ranks // k.shape[-2], 1)
        outs = q.numel() // q.shape[-1] * v.shape[-1]
        numbers = q.numel() + outs + repeated * keys
        return (ranks - 1) * numbers * q.element_size() // ranks * (2 if backward else 1)
    forward = (ranks - 1) * keys * k.element_size()
    if not backward:
        return forward
    wide = max(k.element_size(), 4)
    return 2 * forward + keys * wide * (ranks if strategy == "ring" else ranks - 1)
