"""Other libraries' implementations, unmodified; a string says why one cannot run.

Every function takes the same tensors as ours, and returns calls by name. Tables, masks and
transposed inputs are made here, outside of the timing.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module

import torch
import torch.nn.functional as F
from harness import Call, Calls, device
from torch import Tensor

from extrope_kernels import RopeFreqs, apply_rope, apply_rope_qk, merge_attention

ONLY_GPU = "needs a GPU (Triton)"
MOST_MASKED = 32_768  # tokens
HALF = (torch.float16, torch.bfloat16)
WORKSPACE = 2**27  # bytes, from FlashInfer's documentation


def offered(package: str, make: Callable[[], dict[str, Call]], only_gpu: bool = True) -> Calls:
    """Return the calls that `make` gives, with the package's version in their names; or why not."""
    try:
        name = f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:  # what is built from source may have none
        name = package
    if only_gpu and device() == "cpu":
        return {name: f"{package} is not installed" if name == package else ONLY_GPU}
    try:
        return {f"{name} {what}".strip(): call for what, call in make().items()}
    except Exception as error:  # a package that is missing, broken, or built for another chip
        return {name: f"{type(error).__name__}: {str(error).strip()[:120]}"}


# -------------------------------------------------------------------------------------------------
# Rotation: q and k (batch, seqlen, heads, head_dim)


def rotary_peers(q: Tensor, k: Tensor, freqs: RopeFreqs, interleaved: bool) -> Calls:
    """Return rotations of q and k at positions 0, 1, 2, ... with this pairing of dims."""
    # transformers' cosines and sines: (1, seqlen, rotary_dim), in q's dtype.
    angle = torch.arange(q.shape[1], device=q.device)[:, None].float() * freqs.inv_freq
    angle = torch.cat((angle, angle), dim=-1)[None]
    tables = angle.cos().to(q.dtype), angle.sin().to(q.dtype)
    fast = offered("flash-attn", partial(flash_attn_rotary, q, k, *tables, interleaved))
    if interleaved:
        return offered("rotary-embedding-torch", partial(lucidrains, q, k), False) | fast
    theirs = offered("transformers", partial(transformers_rotary, q, k, *tables), False)
    return theirs | offered("liger-kernel", partial(liger, q, k, *tables)) | fast


def transformers_rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> dict[str, Call]:
    """Return Llama's rotation in transformers: eager, compiled, and compiled with its tables."""
    from transformers import LlamaConfig
    from transformers.models.llama import modeling_llama

    rotate = modeling_llama.apply_rotary_pos_emb
    positions = torch.arange(q.shape[1], device=q.device)[None]
    config = LlamaConfig(head_dim=q.shape[-1], max_position_embeddings=q.shape[1])
    rotary = modeling_llama.LlamaRotaryEmbedding(config).to(q.device)
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    compiled = torch.compile(rotate, dynamic=False)

    @torch.compile(dynamic=False)
    def with_tables(q, k, positions):
        return rotate(q, k, *rotary(q, positions))

    given = q, k, cos, sin
    calls = {"eager": partial(rotate, *given), "compiled": partial(compiled, *given)}
    return calls | {"compiled, with tables": partial(with_tables, q, k, positions)}


def lucidrains(q: Tensor, k: Tensor) -> dict[str, Call]:
    from rotary_embedding_torch import RotaryEmbedding

    rotary = RotaryEmbedding(q.shape[-1], seq_before_head_dim=True).to(q.device)
    return {"": lambda: tuple(map(rotary.rotate_queries_or_keys, (q, k)))}


def liger(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> dict[str, Call]:
    """Return Liger's Triton kernel, which overwrites contiguous inputs: it gets its own."""
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    def copies() -> list[Tensor]:
        return [x.detach().clone() for x in (q, k)]

    def rotate(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return liger_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)

    own = copies()
    call = partial(rotate, *own)
    call.leaves, call.checked = own, lambda: rotate(*copies())
    return {"": call}


def flash_attn_rotary(q: Tensor, k: Tensor, cos, sin, interleaved: bool) -> dict[str, Call]:
    from flash_attn.layers.rotary import apply_rotary_emb

    halves = [x[0, :, : q.shape[-1] // 2].contiguous() for x in (cos, sin)]
    return {"rotary": lambda: [apply_rotary_emb(x, *halves, interleaved) for x in (q, k)]}


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


def _attend(q: Tensor, k: Tensor, v: Tensor, **how) -> Call:
    call = partial(F.scaled_dot_product_attention, q, k, v, **how)
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
    logits = [
        torch.matmul(a.transpose(1, 2), b.repeat_interleave(groups, 2).permute(0, 2, 3, 1))
        for a, b in ((near_q, near_k), (far_q, k))
    ]
    merged = torch.where(distance < window, *logits) * q.shape[-1] ** -0.5
    weights = merged.masked_fill(distance < 0, -torch.inf).softmax(-1)
    return torch.matmul(weights, v.repeat_interleave(groups, 2).transpose(1, 2)).transpose(1, 2)


# -------------------------------------------------------------------------------------------------
# flash-attn 2, 3 and 4 and FlashInfer: the same shapes, rotated beforehand


FLASH = {"flash-attn": "flash_attn", "flash-attn-3": "flash_attn_interface"}  # their modules


def attention_peers(q: Tensor, k: Tensor, v: Tensor) -> Calls:
    if device() == "cpu":
        return offered("flash-attn", dict)
    if q.dtype not in HALF:
        return {"flash-attn, FlashInfer": "take float16 and bfloat16"}
    leaves = [x.detach().clone() for x in (q, k, v)]

    def flash(module: str) -> dict[str, Call]:
        attend = import_module(module).flash_attn_func

        def call():
            out = attend(*leaves, causal=True)
            return out if isinstance(out, Tensor) else out[0]  # some return the log-sum-exp too

        call.leaves = leaves
        return {"": call}

    def flashinfer() -> dict[str, Call]:
        attend = import_module("flashinfer").single_prefill_with_kv_cache
        return {"": partial(attend, *(x[0] for x in leaves), causal=True)}

    found = offered("flashinfer-python", flashinfer)
    for package, module in (FLASH | {"flash-attn-4": "flash_attn.cute"}).items():
        found |= offered(package, partial(flash, module))
    return found


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
    given = {"cache_seqlens": cache.seqlens, "causal": True}

    def flash(module: str) -> dict[str, Call]:
        attend = import_module(module).flash_attn_with_kvcache
        return {"with_kvcache": partial(attend, cache.q, *cache.contiguous(), **given)}

    found = offered("flashinfer-python", partial(_flashinfer_paged, cache))
    for package, module in FLASH.items():
        found |= offered(package, partial(flash, module))
    return found


def _flashinfer_paged(cache: Paged) -> dict[str, Call]:
    flashinfer = import_module("flashinfer")
    batch, pages = cache.block_table.shape
    _, page_size, heads_k, head_dim = cache.k.shape
    workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD")
    numbers = {"dtype": torch.int32, "device": "cuda"}
    first_pages = torch.arange(batch + 1, **numbers) * pages
    last_lengths = torch.full((batch,), page_size, **numbers)
    sizes = cache.q.shape[2], heads_k, head_dim, page_size
    wrapper.plan(
        first_pages, cache.block_table.flatten(), last_lengths, *sizes,
        q_data_type=cache.q.dtype, kv_data_type=cache.k.dtype,
    )  # fmt: skip
    return {"paged": partial(wrapper.run, cache.q[:, 0], (cache.k, cache.v))}
