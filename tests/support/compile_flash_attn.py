"""Compile flash-attn 4's kernels for the calls of the composition, on a machine without a GPU.

    python tests/support/compile_flash_attn.py sm_90 64 128 256

prints a line for each head_dim and kind of call. Tensors are fake, so that nothing runs.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import nullcontext

WINDOW, GROUP = 1024, 4
# left and packed: the near region, and the far one, whose sequences are cut.
CALLS = {
    "near": (WINDOW - 1, False),
    "near, packed": (WINDOW - 1, True),
    "far": (None, False),
    "far, packed": (None, True),
}
SMS = {"sm_90": "132", "sm_100": "148"}


def compile_call(head_dim: int, left: int | None, packed: bool) -> None:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from extrope_kernels.ops.attention.flash_attn.engines import FlashAttention4

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(*shape, device="cuda", dtype=dtype)

    tokens, engine = (4096,) if packed else (2, 4096), FlashAttention4()
    with FakeTensorMode(), torch.no_grad():
        q, dout = (empty(*tokens, 2 * GROUP, head_dim) for _ in range(2))
        k, v = (empty(*tokens, 2, head_dim) for _ in range(2))
        cu_seqlens = empty(4, dtype=torch.int32) if packed else None
        band = (0.1, left, cu_seqlens, 0.0)
        out, lse = engine.forward(q, k, v, *band)
        assert lse.shape == (*tokens[:-1], 2 * GROUP, tokens[-1])
        grads = engine.backward(dout, torch.empty_like(lse), q, k, v, out, lse, *band)
    for got, like in zip((out, *grads), (q, q, k, v), strict=True):
        assert got.shape == like.shape and got.dtype == like.dtype


def main(chip: str, head_dims: list[str]) -> None:
    # Read as the package is imported: which kernels, for which chip, of how many multiprocessors.
    os.environ |= {
        "FLASH_ATTENTION_ARCH": chip,
        "CUTE_DSL_ARCH": f"{chip}a",
        "FLASH_ATTENTION_NUM_SMS": SMS[chip],
    }
    import torch

    torch.cuda.current_device = lambda: 0  # DLPack asks, and there is none
    torch.cuda.device_of = nullcontext
    for head_dim in map(int, head_dims):
        for name, call in CALLS.items():
            start = time.monotonic()
            compile_call(head_dim, *call)
            print(f"{chip}, head_dim {head_dim}, {name}: {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
