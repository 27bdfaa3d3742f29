"""Every operation as a row of a table: a call on random tensors, in rounds of other lengths.

Rows tell by their fields what holds for them: which backends run them, and if they have gradients.
Tests of what all operations keep go through all rows, in a size that shows it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from support.score_examples import EXAMPLES, PLAIN, Example
from torch import Tensor

from extrope_kernels import (
    apply_rope,
    apply_rope_qk,
    head_permutations,
    merge_attention,
    methods,
    permute,
    permute_qk,
    permuteformer_attention,
    permuteformer_step,
    rope_append_kvcache,
    rope_attention,
    rope_attention_with_kvcache,
)
from extrope_kernels.ops.attention.merge import merge_fwd as reference_of_merge
from extrope_kernels.ops.permuteformer import backends as permuteformer_backends
from extrope_kernels.testing import attention_backends, available_backends, device

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    """What the words in an operation's shapes are; a batch has two sequences."""

    seqlen: int
    heads: int
    dim: int
    max_len: int  # of a sequence in a cache, whose pages have 16 slots
    heads_k: int = 2
    new: int = 12  # tokens behind those in the caches

    @property
    def pages(self) -> int:
        return 2 * self.max_len // 16

    @property
    def all_k(self) -> int:  # all heads of k, one behind the other
        return self.heads_k * self.dim


TINY = Sizes(seqlen=8, heads=4, dim=16, max_len=80)
SMALL = Sizes(seqlen=40, heads=4, dim=32, max_len=80)
LARGE = Sizes(seqlen=200, heads=6, dim=64, max_len=640)  # shared out over threads


def nothing(number: int, sizes: Sizes) -> Tensors:
    return {}


@dataclass(frozen=True)
class Operation:
    """`run(backend, **tensors)` gives all results, what it writes in place included.

    shapes: of the tensors of random numbers, as words of Sizes and numbers.
    lengths: the tensors of integers of a round.
    """

    run: Callable[..., list[Tensor]]
    shapes: dict[str, str]
    backends: tuple[str, ...]
    lengths: Callable[[int, Sizes], Tensors] = nothing
    gradients: bool = False
    sizes: Sizes = SMALL

    def tensors(self, number: int, dtype: torch.dtype) -> Tensors:
        """What round `number` computes on."""
        generator = torch.Generator().manual_seed(number)
        found = {}
        for name, words in self.shapes.items():
            shape = [int(x) if x.isdigit() else getattr(self.sizes, x) for x in words.split()]
            found[name] = torch.randn(shape, generator=generator).to(device(), dtype)
        return found | {n: x.to(device()) for n, x in self.lengths(number, self.sizes).items()}

    def __call__(self, backend: str | None, **tensors: Tensor) -> list[Tensor]:
        """All results, and the gradients of the random tensors if there are any."""
        if not self.gradients:
            return self.run(backend, **tensors)
        leaves = {n: x.detach().requires_grad_() for n, x in tensors.items() if n in self.shapes}
        outs = self.run(backend, **(tensors | leaves))
        # Every result counts, each of its elements by another weight.
        douts = [torch.arange(x.numel(), device=x.device).cos().view_as(x).to(x) for x in outs]
        grads = torch.autograd.grad(outs, list(leaves.values()), douts)
        return [*(x.detach() for x in outs), *grads]


# -------------------------------------------------------------------------------------------------
# Integers of each of three rounds


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def starts(number: int, sizes: Sizes) -> Tensors:
    """Three packed sequences."""
    ends = [n * sizes.seqlen // 40 for n in ((3, 17), (11, 12), (25, 38))[number]]
    return {"cu_seqlens": ints(0, *ends, sizes.seqlen)}


def places(number: int, sizes: Sizes) -> Tensors:
    return {"positions": (torch.arange(sizes.seqlen) * (number + 1) + 7 * number).repeat(2, 1)}


def packed_places(number: int, sizes: Sizes) -> Tensors:
    return starts(number, sizes) | {"positions": ints(5 * number, 100, 7 + number)}


def filled(number: int, sizes: Sizes) -> Tensors:
    """How much of each sequence's cache is in use, and which pages hold it."""
    pages = torch.roll(torch.arange(sizes.pages, dtype=torch.int32), 3 * number)
    lengths = [n * sizes.max_len // 80 for n in ((9, 60), (60, 30), (31, 8))[number]]
    return {"cache_seqlens": ints(*lengths), "block_table": pages.view(2, -1)}


def packed_filled(number: int, sizes: Sizes) -> Tensors:
    """As a serving engine has it: new tokens of both sequences one behind the other."""
    return filled(number, sizes) | {"cu_seqlens_q": ints(0, (3, 9, 1)[number], sizes.new)}


def packed_append(number: int, sizes: Sizes) -> Tensors:
    where = packed_filled(number, sizes)
    return where | {"cu_seqlens": where.pop("cu_seqlens_q")}


def slots(number: int, sizes: Sizes) -> Tensors:
    """-1 is written nowhere."""
    picked = torch.tensor(((17, 99), (-1, 40), (100, -1))[number])
    seqlens = filled(number, sizes)["cache_seqlens"]
    return {"slot_mapping": picked[:, None], "cache_seqlens": seqlens}


def stepped(number: int, sizes: Sizes) -> Tensors:
    return {"positions": ints(9 * number, 4 + number, 7)}


# -------------------------------------------------------------------------------------------------
# Calls


# By head_dim. Made before any capture, which takes no copy from the host.
FREQS = {
    sizes.dim: methods.yarn(sizes.dim, factor=4.0, original_max_position_embeddings=64).to(device())
    for sizes in (TINY, SMALL, LARGE)
}
PERMUTATIONS = {dim: head_permutations(2, dim).to(device()) for dim in FREQS}


def freqs_of(q, slower=1.0):
    """Frequencies for a tensor's head_dim, on its device."""
    freqs = FREQS[q.shape[-1]].to(q.device)
    return freqs if slower == 1.0 else replace(freqs, inv_freq=freqs.inv_freq * slower)


def rotate(backend, q, k, inplace=False, slower=1.0, **more):
    freqs, more = freqs_of(q, slower), more | {"backend": backend}
    if inplace:
        return list(apply_rope_qk(q, k, freqs, inplace=True, **more))
    return [*apply_rope_qk(q, k, freqs, **more), apply_rope(q, freqs, **more)]


def normed(backend, q, k, slower=1.0, **more):
    return list(apply_rope_qk(q, k, freqs_of(q, slower), **more, backend=backend))


def append(backend, q, k, v, k_cache, v_cache, **where):
    where |= {"freqs": freqs_of(q), "backend": backend}
    out = rope_append_kvcache(q, k, v, k_cache, v_cache, **where)
    return [out, k_cache, v_cache]


def permuted(backend, q, k, **more):
    by, more = PERMUTATIONS[q.shape[-1]].to(q.device), more | {"backend": backend}
    return [*permute_qk(q, k, by, **more), permute(k, by, **more)]


def attend(backend, q, k, v, *, score, **more):
    more |= {"return_lse": True, "backend": backend}
    return list(rope_attention(q, k, v, freqs_of(q), score, **more))


def decode(backend, q, k_cache, v_cache, *, score, k=None, **more):
    """With k and v these are written into the cache, which is then a result too."""
    caches, more = (k_cache, v_cache), more | {"k": k, "return_lse": True, "backend": backend}
    found = rope_attention_with_kvcache(q, *caches, freqs_of(q), score, **more)
    return [*found, *(caches if k is not None else ())]


def linear(backend, q, k, v, **more):
    by = PERMUTATIONS[q.shape[-1]].to(q.device)
    return [permuteformer_attention(q, k, v, permutations=by, **more, backend=backend)]


def step(backend, q, k, v, kv, key_sum, positions):
    state = (kv.float(), key_sum.float().abs() + 1)
    more = {
        "permutations": PERMUTATIONS[q.shape[-1]].to(q.device),
        "positions": positions,
        "backend": backend,
    }
    out, state = permuteformer_step(q, k, v, state, **more)
    return [out, *state]


def merge(backend, outs, lses, apart=0):
    """A set's batches lie `apart` bytes from each other, or as they come."""
    if apart:
        sets, batches, *shape = outs.shape
        inner, step = torch.Size(shape).numel(), apart // outs.itemsize
        memory = outs.new_empty((batches - 1) * step + sets * inner)
        strides = inner, step, *outs.stride()[2:]
        outs = memory.as_strided(outs.shape, strides).copy_(outs)
    sets = outs.unbind(), lses.float().unbind()
    return list((reference_of_merge if backend == "reference" else merge_attention)(*sets))


# -------------------------------------------------------------------------------------------------
# The table

CPU = device() == "cpu"
ROPE = tuple(available_backends())
LINEAR = tuple(name for name in ROPE if name != "cuda")
ATTENTION = tuple(attention_backends())
DECODE = tuple(name for name in ATTENTION if name != "flash_attn")
MERGE = ("reference", "cpu" if CPU else "triton")  # as the device decides
PERMUTE = ("reference", "cpu") if CPU else ("reference",)
PERMUTEFORMER = tuple(
    name for name, report in permuteformer_backends().items()
    if report == "available" and (name != "cpu" or CPU)
)  # fmt: skip
QK = {"q": "2 seqlen heads dim", "k": "2 seqlen heads_k dim"}
QKV = QK | {"v": "2 seqlen heads_k dim"}
PACKED = {name: words.removeprefix("2 ") for name, words in QKV.items()}
PACKED_QK = {name: PACKED[name] for name in QK}
NORM = {"q_norm_weight": "dim", "k_norm_weight": "all_k"}  # of each head, and of all together
CACHED = {"q": "2 1 heads dim"} | {name: "pages 16 heads_k dim" for name in ("k_cache", "v_cache")}
APPENDED = CACHED | {"k": "2 1 heads_k dim", "v": "2 1 heads_k dim"}
APPENDED_PACKED = APPENDED | {
    "q": "new heads dim",
    "k": "new heads_k dim",
    "v": "new heads_k dim",
}
STEP = {name: words.replace("2 seqlen", "3 1") for name, words in QKV.items()}
STATE = {"kv": "3 heads_k dim dim", "key_sum": "3 heads_k dim"}


def of_score(name: str, example: Example) -> dict[str, Operation]:
    attending, decoding = (functools.partial(x, score=example.score) for x in (attend, decode))
    own = {"log_n": 64} if name == "leaky_rerope" else {}
    bands = name in ("no score", "rerope", "leaky_rerope", "self_extend", "string")
    takes = ATTENTION if bands else DECODE
    return {
        name: Operation(functools.partial(attending, **own), QKV, takes, gradients=True),
        f"{name}, packed": Operation(attending, PACKED, takes, starts, gradients=True),
        f"{name}, decode": Operation(decoding, CACHED, DECODE, filled),
        f"{name}, append and decode": Operation(decoding, APPENDED, DECODE, filled),
        f"{name}, packed decode": Operation(decoding, APPENDED_PACKED, DECODE, packed_filled),
    }


SCORES = {"no score": PLAIN, **EXAMPLES}
OPERATIONS = {
    "rope": Operation(rotate, QK, ROPE, places, gradients=True),
    "rope, packed": Operation(rotate, PACKED_QK, ROPE, packed_places, gradients=True),
    "rope, in place": Operation(functools.partial(rotate, inplace=True), QK, ROPE, places),
    "rope after a norm": Operation(normed, QK | NORM, LINEAR, places, gradients=True),
    "append": Operation(append, APPENDED, LINEAR, filled),
    "append by slots": Operation(append, APPENDED, LINEAR, slots),
    "append, packed": Operation(append, APPENDED_PACKED, LINEAR, packed_append),
    "permute": Operation(permuted, QK, PERMUTE, places, gradients=True),
    "permute, packed": Operation(permuted, PACKED_QK, PERMUTE, packed_places, gradients=True),
    **{key: row for score in SCORES.items() for key, row in of_score(*score).items()},
    "linear attention": Operation(linear, QKV, PERMUTEFORMER, places, gradients=True),
    "linear attention, packed": Operation(linear, PACKED, PERMUTE, starts, gradients=True),
    "linear attention, step": Operation(step, STEP | STATE, PERMUTEFORMER, stepped),
    "merge": Operation(
        merge,
        {"outs": "3 2 seqlen heads dim", "lses": "3 2 heads seqlen"},
        MERGE,
        gradients=True,
    ),
}


def everywhere() -> list[tuple[str, str]]:
    """(operation, backend), without interpreted Triton, which runs one program at a time, and
    flash-attention, which takes no float32 and may add in another order each time."""
    return [
        (name, backend)
        for name, one in OPERATIONS.items()
        for backend in one.backends
        if backend != "flash_attn" and (backend != "triton" or not CPU)
    ]
