"""Tensors between pages that may not be touched: one byte too far ends the process.

`python -m support.guard_pages before` (or behind) runs interpreted Triton kernels of attention on
tensors that start at, or end at, such a page. The interpreter loads and stores at real addresses.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_kept: list[mmap.mmap] = []  # a page that is given back could be handed out again, unguarded
_used: list[tuple[int, int]] = []  # the room of a block, and where it starts
_free: dict[int, list[int]] = defaultdict(list)  # by room


def bytes_between_pages(size: int, behind: bool) -> Tensor:
    """Memory that ends (or starts) where no access is allowed."""
    if size == 0:
        return torch.empty(0, dtype=torch.uint8)
    room = -(-size // PAGE) * PAGE
    start = _free[room].pop() if _free[room] else _new_block(room)
    _used.append((room, start))
    first = start + (room - size if behind else 0)
    return torch.frombuffer((ctypes.c_char * size).from_address(first), dtype=torch.uint8)


def _new_block(room: int) -> int:
    block = mmap.mmap(-1, room + 2 * PAGE)
    _kept.append(block)
    start = ctypes.addressof(ctypes.c_char.from_buffer(block)) + PAGE
    for page in (start - PAGE, start + room):
        if _libc.mprotect(page, PAGE, 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
    return start


def use_again() -> None:
    """Give all memory to later tensors: no tensor in it may be read any more."""
    for room, start in _used:
        _free[room].append(start)
    _used.clear()


def guarded(x: Tensor, behind: bool) -> Tensor:
    """A copy of x, same strides, whose memory ends (or starts) where no access is allowed."""
    extent = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride())) if x.numel() else 0
    if extent == 0:
        return x
    memory = bytes_between_pages(extent * x.itemsize, behind).view(x.dtype)
    memory.copy_(x.as_strided((extent,), (1,)))  # not by rows, which may be expanded
    return memory.as_strided(x.shape, x.stride())


class Guarded(TorchDispatchMode):
    """Every tensor that an operation allocates gets guard pages."""

    def __init__(self, behind: bool) -> None:
        super().__init__()
        self.behind = behind
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given: set[int] = set()
        note = lambda x: given.add(x.untyped_storage().data_ptr())  # noqa: E731
        tree_map_only(Tensor, note, (args, kwargs or {}))
        if func.namespace == "extrope" and all(map(_is_plain, tree_leaves((args, kwargs)))):
            with self:  # sees what the kernel allocates
                return cpu_kernel(func, args, kwargs)
        outs = func(*args, **(kwargs or {}))
        return tree_map_only(Tensor, lambda x: self._own(x, given), outs)

    def _own(self, x: Tensor, given: set[int]) -> Tensor:
        if x.is_meta or x.untyped_storage().data_ptr() in given or x.dim() == 0:
            return x
        self.count += 1
        return guarded(x, self.behind)


def cpu_kernel(op, args, kwargs) -> Any:
    """Run an op's CPU kernel, with the modes that are on."""
    cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    return op.redispatch(cpu, *args, **(kwargs or {}))


def _is_plain(x: Any) -> bool:
    """Whether nothing but the CPU's kernel of an op sees x."""
    if not isinstance(x, Tensor):
        return True
    return x.device.type == "cpu" and x.layout == torch.strided and not x.is_neg()


def attention() -> None:
    """Forward and backward in two and three regions, with dims, rows and keys left over."""
    from support import triton_attention as triton

    from extrope_kernels import methods, scores
    from extrope_kernels.ops.attention import AttentionCall

    ends = torch.tensor([0, 5, 5, 23], dtype=torch.int32)
    for score, cu_seqlens, decay, dtype in (
        (scores.self_extend(6, 3), ends.clone(), None, torch.float32),
        (scores.dual_chunk(9, 2), None, methods.xpos(24).log_decay.clone(), torch.float16),
    ):
        leading_q, leading_k = ((23,), (23,)) if cu_seqlens is not None else ((1, 19), (1, 37))
        q = torch.randn(*leading_q, 3, 40).to(dtype)
        k, v = (torch.randn(*leading_k, 1, 40).to(dtype) for _ in range(2))
        inv_freq = methods.rope(24).inv_freq.clone()
        scale = torch.rand(leading_q[-1])
        call = AttentionCall(inv_freq, cu_seqlens, decay, query_scale=scale, score=score)
        out, lse = triton.forward(q, k, v, call)
        grads = triton.backward(torch.randn(q.shape).to(dtype), None, q, k, v, out, lse, call)
        assert all(x.isfinite().all() for x in (out, *grads))


def cache() -> None:
    """Appending to and reading from caches, in one piece and in pages."""
    from support import triton_attention as triton

    from extrope_kernels import methods, scores
    from extrope_kernels.ops.attention import AttentionCall
    from extrope_kernels.ops.cache.call import KVCache

    pages = torch.tensor([[2, 0], [3, 1]], dtype=torch.int32)
    for table, score, dtype in (
        (None, scores.rerope(5), torch.float16),
        (pages, scores.leaky_rerope(5, 3.0), torch.float32),
        (pages, scores.dual_chunk(9, 2), torch.float32),
    ):
        shape = (2, 13, 2, 40) if table is None else (4, 7, 2, 40)
        k_cache, v_cache = (torch.randn(shape).to(dtype) for _ in range(2))
        seqlens = torch.tensor([11, 3], dtype=torch.int32)
        kv = KVCache(k_cache, v_cache, seqlens, table, appended=2)
        call = AttentionCall(methods.rope(24).inv_freq.clone(), score=score, rotated="k")
        new = [torch.randn(2, 2, 2, 40).to(dtype) for _ in range(2)]
        out, _ = triton.decode(torch.randn(2, 2, 6, 40).to(dtype), *new, kv, call)
        assert out.isfinite().all()


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"
    if sys.argv[1] == "itself":
        x = guarded(torch.zeros(5), behind=True)
        assert ctypes.string_at(x.data_ptr(), 20) == b"\0" * 20
        print("alive", flush=True)
        ctypes.string_at(x.data_ptr(), 21)
    with Guarded(sys.argv[1] == "behind") as mode:
        attention()
        cache()
    print(mode.count, "guarded")
