"""flash-attn 2, 3 and 4 and FlashInfer, as their packages ship them, where they are installed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch
from harness import Call, device
from peers import ONLY_GPU, Calls, missing, titled
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)
WORKSPACE = 2**27  # bytes, as FlashInfer's documentation has it


def offered(package: str, what: str, make: Callable[[], Call]) -> Calls:
    """What `make` gives, by the package's name, or why it gives nothing."""
    name = titled(package, what)
    try:
        return {name: make()}
    except Exception as error:  # a package that is broken, or built for another torch or chip
        return {name: f"{type(error).__name__}: {str(error).strip()[:120]}"}


# -------------------------------------------------------------------------------------------------
# Causal attention: q (batch, seqlen, heads_q, head_dim), k and v with heads_k, rotated


def attention_peers(q: Tensor, k: Tensor, v: Tensor) -> Calls:
    if device() == "cpu":
        return {titled("flash-attn"): missing("flash-attn") or ONLY_GPU}
    if q.dtype not in HALF:
        return {"flash-attn, FlashInfer": "take float16 and bfloat16"}
    leaves = [x.detach().clone() for x in (q, k, v)]
    peers = {}
    for package, module in (
        ("flash-attn", "flash_attn"),
        ("flash-attn-3", "flash_attn_interface"),
        ("flash-attn-4", "flash_attn.cute"),
    ):
        peers |= offered(package, "", lambda module=module: _flash(module, leaves))
    return peers | offered("flashinfer-python", "", lambda: _flashinfer(leaves))


def _flash(module: str, leaves: list[Tensor]) -> Call:
    attend = import_module(module).flash_attn_func

    def call():
        out = attend(*leaves, causal=True)
        return out if isinstance(out, Tensor) else out[0]  # some return the log-sum-exp too

    call.leaves = leaves
    return call


def _flashinfer(leaves: list[Tensor]) -> Call:
    attend = import_module("flashinfer").single_prefill_with_kv_cache
    q, k, v = (x[0] for x in leaves)

    def call():
        return attend(q, k, v, causal=True)

    return call


# -------------------------------------------------------------------------------------------------
# One token for each sequence over a cache


@dataclass(frozen=True)
class Paged:
    """q (batch, 1, heads_q, head_dim), rotated; pages (pages, page_size, heads_k, head_dim) of a
    cache that is full; block_table (batch, pages of a sequence), int32.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    block_table: Tensor

    @property
    def seqlens(self) -> Tensor:
        batch, pages = self.block_table.shape
        return torch.full((batch,), pages * self.k.shape[1], dtype=torch.int32, device=device())

    def contiguous(self) -> tuple[Tensor, Tensor]:
        """k and v (batch, seqlen, heads_k, head_dim)."""
        return tuple(x[self.block_table.long()].flatten(1, 2) for x in (self.k, self.v))


def decode_peers(cache: Paged) -> Calls:
    """Plain attention by others: flash-attn over a contiguous cache, its best; FlashInfer paged."""
    if device() == "cpu" or cache.q.dtype not in HALF:
        return {}
    peers = {}
    for package, module in (("flash-attn", "flash_attn"), ("flash-attn-3", "flash_attn_interface")):
        peers |= offered(
            package, " with_kvcache", lambda module=module: _flash_with_kvcache(module, cache)
        )
    return peers | offered("flashinfer-python", " paged", lambda: _flashinfer_paged(cache))


def _flash_with_kvcache(module: str, cache: Paged) -> Call:
    attend = import_module(module).flash_attn_with_kvcache
    (k, v), seqlens = cache.contiguous(), cache.seqlens
    return lambda: attend(cache.q, k, v, cache_seqlens=seqlens, causal=True)


def _flashinfer_paged(cache: Paged) -> Call:
    flashinfer = import_module("flashinfer")
    batch, pages = cache.block_table.shape
    _, page_size, heads_k, head_dim = cache.k.shape
    workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD")
    numbers = {"dtype": torch.int32, "device": "cuda"}
    wrapper.plan(
        torch.arange(batch + 1, **numbers) * pages,
        cache.block_table.flatten(),
        torch.full((batch,), page_size, **numbers),
        cache.q.shape[2],
        heads_k,
        head_dim,
        page_size,
        q_data_type=cache.q.dtype,
        kv_data_type=cache.k.dtype,
    )
    q = cache.q[:, 0]
    return lambda: wrapper.run(q, (cache.k, cache.v))
