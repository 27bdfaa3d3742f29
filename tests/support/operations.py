"""Every operation as a row of a table, for tests of what all of them have to keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from extrope_kernels import (
    apply_rope_qk,
    head_permutations,
    merge_attention,
    methods,
    permute_qk,
    permuteformer_attention,
    permuteformer_step,
    rope_append_kvcache,
    rope_attention,
    rope_attention_with_kvcache,
    scores,
)
from extrope_kernels.ops.attention.merge import merge_fwd as reference_of_merge
from extrope_kernels.ops.permuteformer import backends as permuteformer_backends
from extrope_kernels.testing import attention_backends, available_backends, device


@dataclass(frozen=True)
class Operation:
    """`run(backend, **tensors)` gives all results; `shapes` are those of the tensors it takes."""

    run: Callable[..., list[Tensor]]
    shapes: dict[str, tuple[int, ...]]
    backends: tuple[str, ...]

    def inputs(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {
            name: torch.randn(*shape, generator=generator).to(device(), dtype)
            for name, shape in self.shapes.items()
        }


def rotate(
    backend: str, q: Tensor, k: Tensor, *, position: int = 90, slower: float = 1.0, **norm: Tensor
) -> list[Tensor]:
    """Rotate from `position` on, by frequencies times `slower`."""
    freqs = methods.yarn(q.shape[-1], factor=4.0, original_max_position_embeddings=64)
    freqs = replace(freqs, inv_freq=freqs.inv_freq * slower).to(device())
    return list(apply_rope_qk(q, k, freqs, positions=position, **norm, backend=backend))


def attend(score: scores.Score, backend: str, *qkv: Tensor, cached=False, **own) -> list[Tensor]:
    freqs = methods.rope(qkv[0].shape[-1]).to(device())
    function = rope_attention_with_kvcache if cached else rope_attention
    return list(function(*qkv, freqs, score, return_lse=True, backend=backend, **own))


def permute(backend: str, q: Tensor, k: Tensor) -> list[Tensor]:
    permutations = head_permutations(k.shape[2], k.shape[3]).to(device())
    return list(permute_qk(q, k, permutations, positions=90, backend=backend))


def permuteformer(backend: str, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    permutations = head_permutations(k.shape[2], k.shape[3]).to(device())
    return [permuteformer_attention(q, k, v, permutations=permutations, backend=backend)]


def norm_rotate(
    backend: str, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, **options
) -> list[Tensor]:
    norm = {"q_norm_weight": q_weight, "k_norm_weight": k_weight}
    return rotate(backend, q, k, **norm, **options)


def step(backend: str, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    permutations = head_permutations(k.shape[2], k.shape[3]).to(device())
    out, state = permuteformer_step(q, k, v, permutations=permutations, backend=backend)
    return [out, *state]


def with_gradients(run: Callable) -> Callable:
    """The same, and the gradients of every floating input."""

    def both(backend: str, **args) -> list[Tensor]:
        tensors = {name: x for name, x in args.items() if isinstance(x, Tensor)}
        leaves = [x.detach().clone().requires_grad_() for x in tensors.values()]
        outs = run(backend, **{**args, **dict(zip(tensors, leaves))})
        generator = torch.Generator().manual_seed(1)
        douts = [torch.randn(x.shape, generator=generator).to(x.device, x.dtype) for x in outs]
        return [*(x.detach() for x in outs), *torch.autograd.grad(outs, leaves, douts)]

    return both


def decode(backend: str, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> list[Tensor]:
    caches, seqlens = (k_cache, v_cache), k_cache.shape[1] - 3
    score = scores.leaky_rerope(40, 2.0)
    return attend(score, backend, q, *caches, cached=True, cache_seqlens=seqlens)


def append(backend: str, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    caches = [x.new_zeros(x.shape[0], x.shape[1] + 9, *x.shape[2:]) for x in (k, v)]
    call = {"k": k, "v": v, "cache_seqlens": 5, "cached": True}
    return [*caches, *attend(scores.rerope(40), backend, q, *caches, **call)]


def rope_append(backend: str, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    caches = [x.new_zeros(x.shape[0], x.shape[1] + 9, *x.shape[2:]) for x in (k, v)]
    freqs = methods.rope(q.shape[-1]).to(device())
    call = {"cache_seqlens": 5, "backend": backend}
    return [rope_append_kvcache(q, k, v, *caches, freqs, **call), *caches]


def merge(backend: str, outs: Tensor, lses: Tensor, apart: int = 0) -> list[Tensor]:
    """Merge; a set's batches lie `apart` bytes from each other, or as they come."""
    if apart:
        sets, batches, *shape = outs.shape
        inner, step = torch.Size(shape).numel(), apart // outs.itemsize
        memory = outs.new_empty((batches - 1) * step + sets * inner)
        strides = inner, step, *outs.stride()[2:]
        outs = memory.as_strided(outs.shape, strides).copy_(outs)
    sets = outs.unbind(), lses.float().unbind()
    return list((reference_of_merge if backend == "reference" else merge_attention)(*sets))


ROPE = tuple(available_backends())
LINEAR = tuple(name for name in ROPE if name != "cuda")
MERGE = ("reference", "cpu" if device() == "cpu" else "triton")  # as the device decides
PERMUTE = ("reference", "cpu") if device() == "cpu" else ("reference",)
PERMUTEFORMER = tuple(
    name for name, report in permuteformer_backends().items()
    if report == "available" and (name != "cpu" or device() == "cpu")
)  # fmt: skip
ATTENTION = tuple(name for name in attention_backends() if name != "flash_attn")
QK = {"q": (2, 200, 6, 64), "k": (2, 200, 2, 64)}
QKV = {**QK, "v": (2, 200, 2, 64)}
CACHED = {"q": (2, 2, 6, 64), "k_cache": (2, 700, 2, 64), "v_cache": (2, 700, 2, 64)}
SCORES = {
    "no score": (None, {}),
    "rerope": (scores.rerope(50), {}),
    "leaky rerope": (scores.leaky_rerope(50, 4.0), {"log_n": 64}),
    "self-extend": (scores.self_extend(48, 4), {}),
    "dual chunk": (scores.dual_chunk(80, 16), {}),
    "blockwise causal": (scores.blockwise_causal(90), {}),
}


def attending(score: scores.Score, own: dict) -> Callable:
    return lambda backend, q, k, v: attend(score, backend, q, k, v, **own)


OPERATIONS = {
    "rope": Operation(rotate, QK, ROPE),
    # Of each head, and of all heads together.
    "norm and rope": Operation(norm_rotate, {**QK, "q_weight": (64,), "k_weight": (128,)}, LINEAR),
    **{name: Operation(attending(*method), QKV, ATTENTION) for name, method in SCORES.items()},
    "permute": Operation(permute, QK, PERMUTE),
    "permuteformer": Operation(permuteformer, QKV, PERMUTEFORMER),
    "permuteformer step": Operation(step, QKV, PERMUTEFORMER),
    "cache": Operation(decode, CACHED, ATTENTION),
    "cache, appended to": Operation(append, QKV, ATTENTION),
    "rope and append": Operation(rope_append, QKV, LINEAR),
    "merge": Operation(merge, {"outs": (3, 2, 200, 6, 64), "lses": (3, 2, 6, 200)}, MERGE),
}
WITHOUT_GRADIENT = (
    "cache", "cache, appended to", "rope and append", "permuteformer step"
)  # fmt: skip
OPERATIONS |= {
    f"{name}, backward": Operation(with_gradients(one.run), one.shapes, one.backends)
    for name, one in OPERATIONS.items()
    if name not in WITHOUT_GRADIENT
}


def everywhere() -> list[tuple[str, str]]:
    """(operation, backend), interpreted Triton left out: it runs one program at a time."""
    return [
        (name, backend)
        for name, one in OPERATIONS.items()
        for backend in one.backends
        if backend != "triton" or device() == "cuda"
    ]
