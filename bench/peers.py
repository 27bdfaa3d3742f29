"""Other libraries' implementations, unmodified; a string says why one cannot run.

Every function takes the same tensors as ours, and returns calls by name. Tables, masks and
transposed inputs are made here, outside of the timing.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch
import torch.nn.functional as F
from harness import Call, device
from torch import Tensor

from extrope_kernels import RopeFreqs, apply_rope, apply_rope_qk, merge_attention

Calls = dict[str, Call | str]
ONLY_GPU = "needs a GPU (Triton)"
MOST_MASKED = 32_768  # tokens
HALF = (torch.float16, torch.bfloat16)
WORKSPACE = 2**27  # bytes, from FlashInfer's documentation


def titled(package: str, what: str = "") -> str:
    """Return a peer's name with its installed version."""
    try:
        name = f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        name = package
    return f"{name}{what}"


def missing(package: str) -> str:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"{package} is not installed"
    return ""


def offered(package: str, what: str, make: Callable[[], Call]) -> Calls:
    """Return the result of `make` by the package's name, or why there is none."""
    name = titled(package, what)
    try:
        return {name: make()}
    except Exception as error:  # a package that is broken, or built for another torch or chip
        return {name: f"{type(error).__name__}: {str(error).strip()[:120]}"}


# -------------------------------------------------------------------------------------------------
# Rotation: q and k (batch, seqlen, heads, head_dim)


def rotary_peers(q: Tensor, k: Tensor, freqs: RopeFreqs, interleaved: bool) -> Calls:
    """Return rotations of q and k at positions 0, 1, 2, ... with this pairing of dims."""
    peers = {}
    if interleaved:
        peers |= lucidrains(q, k)
    else:
        peers |= transformers_rotary(q, k, freqs)
        peers |= liger(q, k, freqs)
    return peers | flash_attn_rotary(q, k, freqs, interleaved)


def _tables(q: Tensor, freqs: RopeFreqs) -> tuple[Tensor, Tensor]:
    """Return transformers' cosines and sines: (1, seqlen, rotary_dim), in q's dtype."""
    angle = torch.arange(q.shape[1], device=q.device)[:, None].float() * freqs.inv_freq
    angle = torch.cat((angle, angle), dim=-1)[None]
    return angle.cos().to(q.dtype), angle.sin().to(q.dtype)


def transformers_rotary(q: Tensor, k: Tensor, freqs: RopeFreqs) -> Calls:
    """Return Llama's rotation in transformers: eager, compiled, and compiled with its tables."""
    if reason := missing("transformers"):
        return {"transformers": reason}
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import (
        LlamaRotaryEmbedding,
        apply_rotary_pos_emb,
    )

    cos, sin = _tables(q, freqs)
    positions = torch.arange(q.shape[1], device=q.device)[None]
    config = LlamaConfig(head_dim=q.shape[-1], max_position_embeddings=q.shape[1])
    rotary = LlamaRotaryEmbedding(config).to(q.device)
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    compiled = torch.compile(apply_rotary_pos_emb, dynamic=False)

    @torch.compile(dynamic=False)
    def with_tables(q, k, positions):
        return apply_rotary_pos_emb(q, k, *rotary(q, positions))

    name = titled("transformers")
    return {
        f"{name} eager": lambda: apply_rotary_pos_emb(q, k, cos, sin),
        f"{name} compiled": lambda: compiled(q, k, cos, sin),
        f"{name} compiled, with tables": lambda: with_tables(q, k, positions),
    }


def lucidrains(q: Tensor, k: Tensor) -> Calls:
    package = "rotary-embedding-torch"
    if reason := missing(package):
        return {package: reason}
    from rotary_embedding_torch import RotaryEmbedding

    rotary = RotaryEmbedding(q.shape[-1], seq_before_head_dim=True).to(q.device)
    rotate = rotary.rotate_queries_or_keys
    return {titled(package): lambda: (rotate(q), rotate(k))}


def liger(q: Tensor, k: Tensor, freqs: RopeFreqs) -> Calls:
    """Return Liger's Triton kernel, which overwrites contiguous inputs."""
    reason = missing("liger-kernel") or (ONLY_GPU if device() == "cpu" else "")
    if reason:
        return {titled("liger-kernel"): reason}
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    cos, sin = _tables(q, freqs)
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    return {titled("liger-kernel"): lambda: liger_rotary_pos_emb(q, k, cos, sin)}


def flash_attn_rotary(q: Tensor, k: Tensor, freqs: RopeFreqs, interleaved: bool) -> Calls:
    reason = missing("flash-attn") or (ONLY_GPU if device() == "cpu" else "")
    if reason:
        return {titled("flash-attn", " rotary"): reason}
    from flash_attn.layers.rotary import apply_rotary_emb

    cos, sin = (x[0, :, : q.shape[-1] // 2].contiguous() for x in _tables(q, freqs))
    rotate = lambda x: apply_rotary_emb(x, cos, sin, interleaved=interleaved)  # noqa: E731
    return {titled("flash-attn", " rotary"): lambda: (rotate(q), rotate(k))}


# -------------------------------------------------------------------------------------------------
# Attention in PyTorch: q (batch, seqlen, heads_q, head_dim), k and v with heads_k


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Calls:
    """Return PyTorch's attention over rotated q and k, with shared or repeated key heads."""
    q, k, v = (x.detach().transpose(1, 2).contiguous() for x in (q, k, v))
    how = {"is_causal": True} if mask is None else {"attn_mask": mask}
    calls, groups = {}, q.shape[1] // k.shape[1]
    if groups > 1:
        repeated = [x.repeat_interleave(groups, 1) for x in (k, v)]
        calls["SDPA, keys repeated"] = _attend(q, *repeated, **how)
    return calls | {"SDPA": _attend(q, k, v, enable_gqa=groups > 1, **how)}


def _attend(q, k, v, **how) -> Call:
    call = lambda: F.scaled_dot_product_attention(q, k, v, **how)  # noqa: E731
    call.leaves = [q, k, v]
    return call


def flex_rerope(q: Tensor, k: Tensor, v: Tensor, freqs: RopeFreqs, window: int) -> Calls:
    """Return ReRoPE as two calls of FlexAttention, near and far, and a merge; inputs unrotated."""
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    name = "FlexAttention, two calls"
    if device() == "cpu":
        return {name: "torch.compile on CPU has no log-sum-exp"}
    if q.shape[1] > MOST_MASKED:
        return {name: f"makes its masks from seqlen x seqlen, left out past {MOST_MASKED}"}
    n, lse = q.shape[1], AuxRequest(lse=True)
    where = {"B": None, "H": None, "Q_LEN": n, "KV_LEN": n, "device": q.device}
    near = create_block_mask(lambda b, h, i, j: (j <= i) & (i - j < window), **where)
    far = create_block_mask(lambda b, h, i, j: i - j >= window, **where)
    compiled = torch.compile(flex_attention, dynamic=False)
    at_window = torch.full((n,), window, device=q.device)

    def attend(q, k, mask):
        q, k, values = (x.transpose(1, 2) for x in (q, k, v))
        out, aux = compiled(q, k, values, block_mask=mask, enable_gqa=True, return_aux=lse)
        return out.transpose(1, 2), aux.lse

    def call():
        near_part = attend(*apply_rope_qk(q, k, freqs), near)
        far_part = attend(apply_rope(q, freqs, positions=at_window), k, far)
        return merge_attention(*zip(near_part, far_part))[0]

    return {name: call}


def dense_rerope(q: Tensor, k: Tensor, v: Tensor, freqs: RopeFreqs, window: int) -> Tensor:
    """Return the paper's two-score formula in eager PyTorch: N x N twice."""
    groups = q.shape[2] // k.shape[2]
    i = torch.arange(q.shape[1], device=q.device)
    distance = i[:, None] - i
    far_q = apply_rope(q, freqs, positions=torch.full_like(i, window))
    near_q, near_k = apply_rope_qk(q, k, freqs)
    scores = [
        torch.matmul(a.transpose(1, 2), b.repeat_interleave(groups, 2).permute(0, 2, 3, 1))
        for a, b in ((near_q, near_k), (far_q, k))
    ]
    merged = torch.where(distance < window, *scores) * q.shape[-1] ** -0.5
    weights = merged.masked_fill(distance < 0, -torch.inf).softmax(-1)
    return torch.matmul(weights, v.repeat_interleave(groups, 2).transpose(1, 2)).transpose(1, 2)


# -------------------------------------------------------------------------------------------------
# flash-attn 2, 3 and 4 and FlashInfer: the same shapes, rotated beforehand


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
    """Inputs of a step over a full paged cache.

    q (batch, 1, heads_q, head_dim), rotated; pages (pages, page_size, heads_k, head_dim);
    block_table (batch, pages of a sequence), int32.
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
        """Return k and v (batch, seqlen, heads_k, head_dim)."""
        return tuple(x[self.block_table.long()].flatten(1, 2) for x in (self.k, self.v))


def decode_peers(cache: Paged) -> Calls:
    """Return others' plain attention: flash-attn over a contiguous cache, FlashInfer paged."""
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
