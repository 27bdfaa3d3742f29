"""Every operation as a row of a table: a call on random tensors, in rounds of other lengths.

Rows tell by their fields what holds for them: which backends run them, and if they have gradients.
Tests of what all operations keep go through all rows, in a size that shows it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

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

    @property
    def rotated(self) -> int:  # pairs of a head that rotate: not all
        return self.dim // 2 - 2


TINY = Sizes(seqlen=8, heads=4, dim=16, max_len=80)
SMALL = Sizes(seqlen=40, heads=4, dim=32, max_len=80)
LARGE = Sizes(seqlen=200, heads=6, dim=64, max_len=640)  # shared out over threads


def nothing(number: int, sizes: Sizes) -> Tensors:
    return {}


@dataclass(frozen=True)
class Operation:
    """A right call of a function by keywords, backend=... among them.

    shapes: of the tensors of random numbers, as words of Sizes and numbers.
    lengths: the tensors of integers of a round.
    options: what else is given; a function makes it for the first tensor.
    writes: what is written in place; all results are what the function returns, and this.
    """

    function: Callable[..., Any]
    shapes: dict[str, str]
    backends: tuple[str, ...]
    lengths: Callable[[int, Sizes], Tensors] = nothing
    options: dict[str, Any] = field(default_factory=dict)
    writes: tuple[str, ...] = ()
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

    def run(self, backend: str | None, **given: Any) -> list[Tensor]:
        """All results of a call; what is given besides tensors stands in for an option."""
        first = next(iter(given.values()))
        options = {n: x(first) if callable(x) else x for n, x in self.options.items()}
        found = self.function(**(options | given), backend=backend)
        return [*((found,) if isinstance(found, Tensor) else found), *map(given.get, self.writes)]

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


def axes(number: int, sizes: Sizes) -> Tensors:
    return {"positions": torch.arange(6 * sizes.seqlen).view(3, 2, -1) * (number + 1)}


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
# Options


# By head_dim. Made before any capture, which takes no copy from the host.
DIMS = [sizes.dim for sizes in (TINY, SMALL, LARGE)]
FREQS = {
    dim: methods.yarn(dim, factor=4.0, original_max_position_embeddings=64).to(device())
    for dim in DIMS
}
XPOS = {dim: methods.xpos(dim).to(device()) for dim in DIMS}
TWICE = torch.tensor([1.0, 0.5], device=device()).view(1, 2, 1)
OF_HEADS = {dim: replace(xpos, inv_freq=xpos.inv_freq * TWICE) for dim, xpos in XPOS.items()}
OF_AXES = {
    dim: methods.with_sections(freqs, [dim // 2 - 2 * (dim // 6), dim // 6, dim // 6])
    for dim, freqs in FREQS.items()
}
PERMUTATIONS = {dim: head_permutations(2, dim).to(device()) for dim in DIMS}


def of_dim(made: dict[int, Any]) -> Callable[[Tensor], Any]:
    """What is made for a tensor's head_dim, on its device."""
    return lambda x: made[x.shape[-1]].to(x.device)


ROTATED: dict[str, Any] = {"freqs": of_dim(FREQS)}
BY_HEAD: dict[str, Any] = {"freqs": of_dim(OF_HEADS), "interleaved": True}
BY_AXES: dict[str, Any] = {"freqs": of_dim(OF_AXES), "inverse": True}
PERMUTED: dict[str, Any] = {"permutations": of_dim(PERMUTATIONS)}


# -------------------------------------------------------------------------------------------------
# Calls whose arguments are made of several tensors


def rotate_by(q, inv_freq, **more):
    """By learned frequencies."""
    freqs = replace(ROTATED["freqs"](q), inv_freq=inv_freq.float())
    return apply_rope(q, freqs, rotary_offset=2, **more)


def step(q, k, v, kv, key_sum, **more):
    state = (kv.float(), key_sum.float().abs() + 1)
    out, state = permuteformer_step(q, k, v, state, **more)
    return [out, *state]


def merge(outs, lses, backend, apart=0):
    """A set's batches lie `apart` bytes from each other, or as they come."""
    if apart:
        sets, batches, *shape = outs.shape
        inner, step = torch.Size(shape).numel(), apart // outs.itemsize
        memory = outs.new_empty((batches - 1) * step + sets * inner)
        strides = inner, step, *outs.stride()[2:]
        outs = memory.as_strided(outs.shape, strides).copy_(outs)
    sets = outs.unbind(), lses.float().unbind()
    return (reference_of_merge if backend == "reference" else merge_attention)(*sets)


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
X = {"x": QK["q"]}
TWO_HEADS = {"q": QK["k"], "k": QK["k"]}
QKV = QK | {"v": "2 seqlen heads_k dim"}
PACKED = {name: words.removeprefix("2 ") for name, words in QKV.items()}
PACKED_QK = {name: PACKED[name] for name in QK}
NORM = {"q_norm_weight": "dim", "k_norm_weight": "all_k"}  # of each head, and of all together
CACHES = ("k_cache", "v_cache")
CACHED = {"q": "2 1 heads dim"} | {name: "pages 16 heads_k dim" for name in CACHES}
APPENDED = CACHED | {"k": "2 1 heads_k dim", "v": "2 1 heads_k dim"}
APPENDED_PACKED = APPENDED | {
    "q": "new heads dim",
    "k": "new heads_k dim",
    "v": "new heads_k dim",
}
STEP = {name: words.replace("2 seqlen", "3 1") for name, words in QKV.items()}
STATE = {"kv": "3 heads_k dim dim", "key_sum": "3 heads_k dim"}
LEARNED = {"q": QK["q"], "inv_freq": "rotated"}
MERGED = {"outs": "3 2 seqlen heads dim", "lses": "3 2 heads seqlen"}


def of_score(name: str, example: Example) -> dict[str, Operation]:
    attend, decode = rope_attention, rope_attention_with_kvcache
    options = ROTATED | {"score": example.score, "return_lse": True}
    own = options | ({"log_n": 64} if name == "leaky_rerope" else {})
    bands = name in ("no score", "rerope", "leaky_rerope", "self_extend", "string")
    takes = ATTENTION if bands else DECODE
    appended = (APPENDED, DECODE, filled, options, CACHES)
    packed = (APPENDED_PACKED, DECODE, packed_filled, options, CACHES)
    return {
        name: Operation(attend, QKV, takes, options=own, gradients=True),
        f"{name}, packed": Operation(attend, PACKED, takes, starts, options, gradients=True),
        f"{name}, decode": Operation(decode, CACHED, DECODE, filled, options),
        f"{name}, append and decode": Operation(decode, *appended),
        f"{name}, packed decode": Operation(decode, *packed),
    }


SCORES = {"no score": PLAIN, **EXAMPLES}
OPERATIONS = {
    "rope": Operation(apply_rope_qk, QK, ROPE, places, ROTATED, gradients=True),
    "rope of one tensor": Operation(apply_rope, X, ROPE, places, ROTATED, gradients=True),
    "rope, packed": Operation(
        apply_rope_qk, PACKED_QK, ROPE, packed_places, ROTATED, gradients=True
    ),
    "rope, in place": Operation(apply_rope_qk, QK, ROPE, places, ROTATED | {"inplace": True}),
    "rope after a norm": Operation(
        apply_rope_qk, QK | NORM, LINEAR, places, ROTATED, gradients=True
    ),
    "rope by head, with decay": Operation(
        apply_rope_qk, TWO_HEADS, ROPE, places, BY_HEAD, gradients=True
    ),
    "rope by axes": Operation(apply_rope_qk, QK, ROPE, axes, BY_AXES, gradients=True),
    "rope of learned frequencies": Operation(rotate_by, LEARNED, ROPE, gradients=True),
    "append": Operation(rope_append_kvcache, APPENDED, LINEAR, filled, ROTATED, CACHES),
    "append by slots": Operation(rope_append_kvcache, APPENDED, LINEAR, slots, ROTATED, CACHES),
    "append, packed": Operation(
        rope_append_kvcache, APPENDED_PACKED, LINEAR, packed_append, ROTATED, CACHES
    ),
    "permute": Operation(permute_qk, QK, PERMUTE, places, PERMUTED, gradients=True),
    "permute of one tensor": Operation(
        permute, {"x": QK["k"]}, PERMUTE, places, PERMUTED, gradients=True
    ),
    "permute, packed": Operation(
        permute_qk, PACKED_QK, PERMUTE, packed_places, PERMUTED, gradients=True
    ),
    **{key: row for score in SCORES.items() for key, row in of_score(*score).items()},
    "linear attention": Operation(
        permuteformer_attention, QKV, PERMUTEFORMER, places, PERMUTED, gradients=True
    ),
    "linear attention, packed": Operation(
        permuteformer_attention, PACKED, PERMUTE, starts, PERMUTED, gradients=True
    ),
    "linear attention, step": Operation(step, STEP | STATE, PERMUTEFORMER, stepped, PERMUTED),
    "merge": Operation(merge, MERGED, MERGE, gradients=True),
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
