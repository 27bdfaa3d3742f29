"""Every operation as a row of a table: a call on random tensors, in rounds of other lengths.

Rows tell by their fields what holds for them: which backends run them, and if they have gradients.
Tests of what all operations keep go through all rows, in a size that shows it.
"""

from __future__ import annotations

import functools
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
FLOATS = ("sinks", "inv_freq")  # float32 for tensors of any dtype


@dataclass(frozen=True)
class Sizes:
    """What the words in an operation's shapes are; a batch has two sequences."""

    seqlen: int
    heads: int
    dim: int
    max_len: int  # of a sequence in a cache
    page: int = 16  # slots of a page of a cache
    heads_k: int = 2
    new: int = 12  # tokens behind those in the caches

    @property
    def pages(self) -> int:
        return 2 * self.max_len // self.page

    @property
    def all_k(self) -> int:  # all heads of k, one behind the other
        return self.heads_k * self.dim

    @property
    def rotated(self) -> int:  # pairs of a head that rotate: not all
        return self.dim // 2 - 2


FEW = Sizes(seqlen=6, heads=4, dim=16, max_len=32, page=8, new=6)
TINY = Sizes(seqlen=8, heads=4, dim=16, max_len=80)
SMALL = Sizes(seqlen=40, heads=4, dim=32, max_len=80)
LARGE = Sizes(seqlen=200, heads=6, dim=64, max_len=640)  # shared out over threads


def nothing(number: int, sizes: Sizes) -> Tensors:
    return {}


@dataclass(frozen=True)
class Operation:
    """A right call of a function by keywords, backend=... among them.

    shapes: of the tensors of random numbers, as words of Sizes and numbers.
    lengths: the other tensors of a round, which have no gradients.
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
            x = torch.randn(shape, generator=generator)
            found[name] = x.to(device(), torch.float32 if name in FLOATS else dtype)
        return found | {n: x.to(device()) for n, x in self.lengths(number, self.sizes).items()}

    def arguments(self, **given: Any) -> dict[str, Any]:
        """All arguments of a call; what is given besides tensors stands in for an option."""
        first = next(iter(given.values()))
        return {n: x(first) if callable(x) else x for n, x in self.options.items()} | given

    def run(self, backend: str | None, **given: Any) -> list[Tensor]:
        """All results of a call."""
        found = self.function(**self.arguments(**given), backend=backend)
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
# Integers, and what else has no gradient, of each of three rounds


Made = Callable[[int, Sizes], Tensors]


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def both(*makers: Made) -> Made:
    return lambda number, sizes: dict(x for make in makers for x in make(number, sizes).items())


def starts(number: int, sizes: Sizes) -> Tensors:
    """Three packed sequences."""
    ends = [n * sizes.seqlen // 40 for n in ((3, 17), (11, 12), (25, 38))[number]]
    return {"cu_seqlens": ints(0, *ends, sizes.seqlen)}


def line(number: int, sizes: Sizes) -> Tensors:
    return {"positions": torch.arange(sizes.seqlen) * (number + 1) + 7 * number}


def places(number: int, sizes: Sizes) -> Tensors:
    return {"positions": line(number, sizes)["positions"].repeat(2, 1)}


def axes(number: int, sizes: Sizes) -> Tensors:
    return {"positions": torch.arange(6 * sizes.seqlen).view(3, 2, -1) * (number + 1)}


def firsts(number: int, sizes: Sizes) -> Tensors:
    """Of each packed sequence."""
    return {"positions": ints(5 * number, 100, 7 + number)}


def between(number: int, sizes: Sizes) -> Tensors:
    return {"q_start": ints(3 + number, 5), "k_start": ints(number, 1)}


def temperatures(number: int, sizes: Sizes) -> Tensors:
    return {"query_scale": 1 + (torch.arange(2.0 * sizes.seqlen) + number).sin().view(2, -1) / 2}


def new_temperatures(number: int, sizes: Sizes) -> Tensors:
    return {"query_scale": torch.tensor([[1.5], [0.5 + number / 10]])}


def decays(number: int, sizes: Sizes) -> Tensors:
    return {"decay": torch.tensor([0.9, 0.5]) - number / 10}


def kept(number: int, sizes: Sizes) -> Tensors:
    """How much of each sequence's cache is in use."""
    lengths = [n * sizes.max_len // 80 for n in ((9, 60), (60, 30), (31, 8))[number]]
    return {"cache_seqlens": ints(*lengths)}


def filled(number: int, sizes: Sizes) -> Tensors:
    """That, and which pages hold it."""
    pages = torch.roll(torch.arange(sizes.pages, dtype=torch.int32), 3 * number)
    return kept(number, sizes) | {"block_table": pages.view(2, -1)}


def padded(number: int, sizes: Sizes) -> Tensors:
    return filled(number, sizes) | {"cache_leftpad": ints(number, 3 - number)}


def new_starts(number: int, sizes: Sizes) -> Tensors:
    """As a serving engine has it: new tokens of both sequences one behind the other."""
    return {"cu_seqlens": ints(0, (3, 9, 1)[number] * sizes.new // 12, sizes.new)}


def q_starts(number: int, sizes: Sizes) -> Tensors:
    return {"cu_seqlens_q": new_starts(number, sizes)["cu_seqlens"]}


def slots(number: int, sizes: Sizes) -> Tensors:
    """-1 is written nowhere."""
    picked = torch.tensor(((17, 99), (-1, 40), (100, -1))[number])
    scaled = picked * sizes.max_len // 80
    return {"slot_mapping": scaled.clamp(min=-1)[:, None]}


def new_places(number: int, sizes: Sizes) -> Tensors:
    return {"positions": ints(3 + number, 9).view(2, 1)}


def in_fp8(number: int, sizes: Sizes) -> Tensors:
    """Caches of eight bits, and the scales of their heads."""
    generator = torch.Generator().manual_seed(number)
    shape = (2, sizes.max_len, sizes.heads_k, sizes.dim)
    k_cache, v_cache = torch.randn(2, *shape, generator=generator).to(torch.float8_e4m3fn)
    found = {"k_cache": k_cache, "v_cache": v_cache}
    return found | {"k_scale": torch.tensor([0.5, 1.5]), "v_scale": torch.tensor([2.0, 1.0])}


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
IN_PLACE = {"inplace": True}
PERMUTED: dict[str, Any] = {"permutations": of_dim(PERMUTATIONS)}


# -------------------------------------------------------------------------------------------------
# Calls whose arguments are made of several tensors


def rotate_by(q, inv_freq, **more):
    """By learned frequencies."""
    freqs = replace(ROTATED["freqs"](q), inv_freq=inv_freq)
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
X, X_OF_K = {"x": QK["q"]}, {"x": QK["k"]}
TWO_HEADS = {"q": QK["k"], "k": QK["k"]}
QKV = QK | {"v": "2 seqlen heads_k dim"}
PACKED = {name: words.removeprefix("2 ") for name, words in QKV.items()}
PACKED_QK = {name: PACKED[name] for name in QK}
NORM_OF_Q = {"q_norm_weight": "dim"}  # of each head
NORM = NORM_OF_Q | {"k_norm_weight": "all_k"}  # of all heads together
CACHES = ("k_cache", "v_cache")
Q, NEW = {"q": "2 1 heads dim"}, {"k": "2 1 heads_k dim", "v": "2 1 heads_k dim"}
PAGES = dict.fromkeys(CACHES, "pages page heads_k dim")
ROWS = dict.fromkeys(CACHES, "2 max_len heads_k dim")
NEW_PACKED = {"q": "new heads dim", "k": "new heads_k dim", "v": "new heads_k dim"}
STEP = {name: words.replace("2 seqlen", "3 1") for name, words in QKV.items()}
STATE = {"kv": "3 heads_k dim dim", "key_sum": "3 heads_k dim"}
LEARNED = {"q": QK["q"], "inv_freq": "rotated"}
MERGED = {"outs": "3 2 seqlen heads dim", "lses": "3 2 heads seqlen"}


qk = functools.partial(Operation, apply_rope_qk)
append = functools.partial(Operation, rope_append_kvcache)
attend = functools.partial(Operation, rope_attention)
decode = functools.partial(Operation, rope_attention_with_kvcache)
move = functools.partial(Operation, permute_qk)
linear = functools.partial(Operation, permuteformer_attention)


def scored(example: Example) -> dict[str, Any]:
    return ROTATED | {"score": example.score, "return_lse": True}


def of_score(name: str, example: Example) -> dict[str, Operation]:
    options = scored(example)
    own = options | ({"log_n": 64} if name == "leaky_rerope" else {})
    bands = name in ("no score", "rerope", "leaky_rerope", "self_extend", "string")
    takes, packed = ATTENTION if bands else DECODE, both(filled, q_starts)
    return {
        name: attend(QKV, takes, options=own, gradients=True),
        f"{name}, packed": attend(PACKED, takes, starts, options, gradients=True),
        f"{name}, decode": decode(Q | PAGES, DECODE, filled, options),
        f"{name}, append and decode": decode(Q | NEW | PAGES, DECODE, filled, options, CACHES),
        f"{name}, packed decode": decode(NEW_PACKED | PAGES, DECODE, packed, options, CACHES),
    }


SCORES = {"no score": PLAIN, **EXAMPLES}
PLAINLY, LEAKY = (scored(SCORES[name]) for name in ("no score", "leaky_rerope"))
DECAYING = scored(SCORES["blockwise_causal"]) | {"freqs": of_dim(XPOS)}
FACTORS = {"softcap": 20.0, "sliding_window": 5, "softmax_scale": 0.3}
SINKS = {"sinks": "heads"}
OPERATIONS = {
    "rope": qk(QK, ROPE, places, ROTATED, gradients=True),
    "rope of one tensor": Operation(apply_rope, X, ROPE, line, ROTATED, gradients=True),
    "rope, packed": qk(PACKED_QK, ROPE, both(starts, firsts), ROTATED, gradients=True),
    "rope, in place": qk(QK, ROPE, places, ROTATED | IN_PLACE),
    "rope by head, with decay": qk(TWO_HEADS, ROPE, places, BY_HEAD, gradients=True),
    "rope by axes": qk(QK, ROPE, axes, BY_AXES, gradients=True),
    "rope of learned frequencies": Operation(rotate_by, LEARNED, ROPE, gradients=True),
    "rope after a norm": qk(QK | NORM, LINEAR, places, ROTATED, gradients=True),
    "rope after a norm, in place": qk(QK | NORM, LINEAR, places, ROTATED | IN_PLACE),
    "rope after a norm, packed": qk(
        PACKED_QK | NORM_OF_Q, LINEAR, both(starts, line), ROTATED, gradients=True
    ),
    "append": append(Q | NEW | PAGES, LINEAR, filled, ROTATED, CACHES),
    "append of a score, left-padded": append(
        Q | NEW | PAGES, LINEAR, padded, ROTATED | {"score": LEAKY["score"]}, CACHES
    ),
    "append in rows": append(Q | NEW | ROWS, LINEAR, kept, ROTATED, CACHES),
    "append by slots": append(Q | NEW | PAGES, LINEAR, both(slots, kept), ROTATED, CACHES),
    "append by slots at positions": append(
        Q | NEW | ROWS, LINEAR, both(slots, new_places), ROTATED, CACHES
    ),
    "append, packed": append(NEW_PACKED | PAGES, LINEAR, both(filled, new_starts), ROTATED, CACHES),
    "append in rows, packed": append(
        NEW_PACKED | ROWS, LINEAR, both(kept, new_starts), ROTATED, CACHES
    ),
    "permute": move(QK, PERMUTE, places, PERMUTED, gradients=True),
    "permute of one tensor": Operation(permute, X_OF_K, PERMUTE, line, PERMUTED, gradients=True),
    "permute, packed": move(PACKED_QK, PERMUTE, both(starts, firsts), PERMUTED, gradients=True),
    **{key: row for score in SCORES.items() for key, row in of_score(*score).items()},
    "attention by factors": attend(
        QKV | SINKS, DECODE, temperatures, LEAKY | FACTORS, gradients=True
    ),
    "attention between numbers": attend(
        QKV, DECODE, options=PLAINLY | {"q_start": 3, "k_start": 0}, gradients=True
    ),
    "attention between starts": attend(
        QKV, DECODE, between, LEAKY | {"rotated": "k"}, gradients=True
    ),
    "attention with decay": attend(QKV, DECODE, options=DECAYING, gradients=True),
    "decode by factors": decode(
        Q | NEW | PAGES | SINKS, DECODE, both(padded, new_temperatures), LEAKY | FACTORS, CACHES
    ),
    "decode in rows": decode(Q | ROWS, DECODE, kept, LEAKY),
    "append and decode in rows": decode(Q | NEW | ROWS, DECODE, kept, PLAINLY, CACHES),
    "packed decode in rows": decode(NEW_PACKED | ROWS, DECODE, both(kept, q_starts), LEAKY, CACHES),
    "decode in fp8": decode(Q | NEW, DECODE, both(kept, in_fp8), PLAINLY),
    "linear attention": linear(QKV, PERMUTEFORMER, places, PERMUTED, gradients=True),
    "linear attention with decay": linear(
        QKV, PERMUTEFORMER, both(places, decays), PERMUTED, gradients=True
    ),
    "linear attention, packed": linear(PACKED, PERMUTE, starts, PERMUTED, gradients=True),
    "linear attention, step": Operation(step, STEP | STATE, PERMUTEFORMER, stepped, PERMUTED),
    "merge": Operation(merge, MERGED, MERGE, gradients=True),
}
# The rows, in a size of few elements, but those that differ from others by the score alone.
OTHERS = {*SCORES} - {"no score", "leaky_rerope"}
FORMS = {
    name: replace(row, sizes=FEW)
    for name, row in OPERATIONS.items()
    if name.split(",")[0] not in OTHERS
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
