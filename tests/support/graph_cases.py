"""Every public function as a call on tensors that a CUDA graph keeps: new contents, same places."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from support.operations import MERGE, PERMUTE, PERMUTEFORMER, merge
from support.score_examples import EXAMPLES, Example
from torch import Tensor

from extrope_kernels import (
    apply_rope,
    apply_rope_qk,
    head_permutations,
    methods,
    permute,
    permute_qk,
    permuteformer_attention,
    permuteformer_step,
    rope_append_kvcache,
    rope_attention,
    rope_attention_with_kvcache,
)
from extrope_kernels.testing import attention_backends, available_backends, device

DIM, SEQLEN, MAX_LEN, PAGE = 32, 40, 80, 16
NEW = 12  # tokens behind those in the caches
# Made before any capture, which takes no copy from the host.
FREQS = methods.yarn(DIM, factor=4.0, original_max_position_embeddings=64).to(device())
PERMUTATIONS = head_permutations(2, DIM).to(device())
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """`run(backend, **tensors)` gives all results, what it writes in place included.

    shapes: of the tensors of random numbers; lengths: the tensors of integers of a round.
    """

    run: Callable[..., list[Tensor]]
    shapes: dict[str, tuple[int, ...]]
    lengths: Callable[[int], Tensors]
    backends: tuple[str, ...]
    gradients: bool = False

    def tensors(self, number: int, dtype: torch.dtype) -> Tensors:
        """What round `number` computes on."""
        generator = torch.Generator().manual_seed(number)
        normal = {n: torch.randn(*s, generator=generator) for n, s in self.shapes.items()}
        normal = {name: x.to(device(), dtype) for name, x in normal.items()}
        integers = {name: x.to(device(), x.dtype) for name, x in self.lengths(number).items()}
        return normal | integers

    def __call__(self, backend: str | None, **tensors: Tensor) -> list[Tensor]:
        if not self.gradients:
            return self.run(backend, **tensors)
        leaves = {n: x.detach().requires_grad_() for n, x in tensors.items() if n in self.shapes}
        outs = self.run(backend, **(tensors | leaves))
        # Every result counts, each of its elements by another weight.
        douts = [torch.arange(x.numel(), device=x.device).cos().view_as(x).to(x) for x in outs]
        grads = torch.autograd.grad(outs, list(leaves.values()), douts)
        return [*(x.detach() for x in outs), *grads]


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def starts(number: int) -> Tensors:
    """Three packed sequences in SEQLEN tokens, other ones each round."""
    return {"cu_seqlens": ints(0, *((3, 17), (11, 12), (25, 38))[number], SEQLEN)}


def places(number: int) -> Tensors:
    return {"positions": (torch.arange(SEQLEN) * (number + 1) + 7 * number).repeat(2, 1)}


def packed_places(number: int) -> Tensors:
    return starts(number) | {"positions": ints(5 * number, 100, 7 + number)}


def filled(number: int) -> Tensors:
    """How much of each sequence's cache is in use, and which pages hold it."""
    pages = torch.roll(torch.arange(2 * MAX_LEN // PAGE, dtype=torch.int32), 3 * number)
    lengths = ((9, 60), (60, 30), (31, 8))[number]
    return {"cache_seqlens": ints(*lengths), "block_table": pages.view(2, -1)}


def packed_filled(number: int) -> Tensors:
    """As a serving engine has it: new tokens of both sequences one behind the other."""
    return filled(number) | {"cu_seqlens_q": ints(0, (3, 9, 1)[number], NEW)}


def packed_append(number: int) -> Tensors:
    where = packed_filled(number)
    return where | {"cu_seqlens": where.pop("cu_seqlens_q")}


def slots(number: int) -> Tensors:
    """-1 is written nowhere."""
    picked = torch.tensor(((17, 99), (-1, 40), (100, -1))[number])
    return {"slot_mapping": picked[:, None], "cache_seqlens": filled(number)["cache_seqlens"]}


def rotate(backend, q, k, positions, cu_seqlens=None, inplace=False):
    more = {"positions": positions, "cu_seqlens": cu_seqlens, "backend": backend}
    if inplace:
        return list(apply_rope_qk(q, k, FREQS, inplace=True, **more))
    return [*apply_rope_qk(q, k, FREQS, **more), apply_rope(q, FREQS, **more)]


def normed(backend, q, k, q_norm_weight, k_norm_weight, positions):
    norm = {"q_norm_weight": q_norm_weight, "k_norm_weight": k_norm_weight}
    return list(apply_rope_qk(q, k, FREQS, positions=positions, **norm, backend=backend))


def append(backend, q, k, v, k_cache, v_cache, **where):
    out = rope_append_kvcache(q, k, v, k_cache, v_cache, FREQS, **where, backend=backend)
    return [out, k_cache, v_cache]


def permuted(backend, q, k, positions, cu_seqlens=None):
    more = {"positions": positions, "cu_seqlens": cu_seqlens, "backend": backend}
    return [*permute_qk(q, k, PERMUTATIONS, **more), permute(k, PERMUTATIONS, **more)]


def attending(example: Example) -> Callable:
    def attend(backend, q, k, v, cu_seqlens=None):
        more = {"cu_seqlens": cu_seqlens, "return_lse": True, "backend": backend}
        return list(rope_attention(q, k, v, FREQS, example.score, **more))

    return attend


def decoding(example: Example) -> Callable:
    """With k and v these are written into the cache, which is then a result too."""

    def decode(backend, q, k_cache, v_cache, k=None, v=None, **more):
        caches, more = (k_cache, v_cache), more | {"k": k, "v": v}
        out, lse = rope_attention_with_kvcache(
            q, *caches, FREQS, example.score, **more, return_lse=True, backend=backend
        )
        return [out, lse, *(caches if k is not None else ())]

    return decode


def linear(backend, q, k, v, positions=None, cu_seqlens=None):
    more = {"positions": positions, "cu_seqlens": cu_seqlens, "backend": backend}
    return [permuteformer_attention(q, k, v, permutations=PERMUTATIONS, **more)]


def step(backend, q, k, v, kv, key_sum, positions):
    state = (kv.float(), key_sum.float().abs() + 1)
    more = {"permutations": PERMUTATIONS, "positions": positions, "backend": backend}
    out, state = permuteformer_step(q, k, v, state, **more)
    return [out, *state]


ROPE = tuple(name for name in available_backends() if name != "reference")
LINEAR = tuple(name for name in ROPE if name != "cuda")
ATTENTION = tuple(name for name in attention_backends() if name != "reference")
DECODE = tuple(name for name in ATTENTION if name != "flash_attn")
QK = {"q": (2, SEQLEN, 4, DIM), "k": (2, SEQLEN, 2, DIM)}
QKV = QK | {"v": QK["k"]}
PACKED = {name: shape[1:] for name, shape in QKV.items()}
PACKED_QK = {name: PACKED[name] for name in QK}
PAGES = (2 * MAX_LEN // PAGE, PAGE, 2, DIM)
CACHED = {"q": (2, 1, 4, DIM), "k_cache": PAGES, "v_cache": PAGES}
APPENDED = CACHED | {"k": (2, 1, 2, DIM), "v": (2, 1, 2, DIM)}
APPENDED_PACKED = APPENDED | {n: (NEW, *APPENDED[n][2:]) for n in "qkv"}
NORM = {"q_norm_weight": (DIM,), "k_norm_weight": (DIM,)}
STATE = {"kv": (3, 2, DIM, DIM), "key_sum": (3, 2, DIM)}
STEP = {name: (3, 1, *shape[2:]) for name, shape in QKV.items()}


def nothing(number: int) -> Tensors:
    return {}


def in_place(backend, **tensors):
    return rotate(backend, **tensors, inplace=True)


def of_score(name: str, example: Example) -> dict[str, Case]:
    attend, decode = attending(example), decoding(example)
    takes = ATTENTION if name in ("rerope", "leaky_rerope", "self_extend", "string") else DECODE
    return {
        name: Case(attend, QKV, nothing, takes, gradients=True),
        f"{name}, packed": Case(attend, PACKED, starts, takes, gradients=True),
        f"{name}, decode": Case(decode, CACHED, filled, DECODE),
        f"{name}, append and decode": Case(decode, APPENDED, filled, DECODE),
        f"{name}, packed decode": Case(decode, APPENDED_PACKED, packed_filled, DECODE),
    }


CASES = {
    "rope": Case(rotate, QK, places, ROPE, gradients=True),
    "rope, packed": Case(rotate, PACKED_QK, packed_places, ROPE, gradients=True),
    "rope, in place": Case(in_place, QK, places, ROPE),
    "rope after a norm": Case(normed, QK | NORM, places, LINEAR, gradients=True),
    "append": Case(append, APPENDED, filled, LINEAR),
    "append by slots": Case(append, APPENDED, slots, LINEAR),
    "append, packed": Case(append, APPENDED_PACKED, packed_append, LINEAR),
    "permute": Case(permuted, QK, places, PERMUTE, gradients=True),
    "permute, packed": Case(permuted, PACKED_QK, packed_places, PERMUTE, gradients=True),
    **{key: case for score in EXAMPLES.items() for key, case in of_score(*score).items()},
    "linear attention": Case(linear, QKV, places, PERMUTEFORMER, gradients=True),
    "linear attention, packed": Case(
        linear, PACKED, starts, ("reference", "cpu") if device() == "cpu" else ("reference",),
        gradients=True,
    ),
    "linear attention, step": Case(
        step, STEP | STATE, lambda number: {"positions": ints(9 * number, 4 + number, 7)},
        PERMUTEFORMER,
    ),
    "merge": Case(
        merge, {"outs": (3, 2, SEQLEN, 4, DIM), "lses": (3, 2, 4, SEQLEN)}, nothing, MERGE,
        gradients=True,
    ),
}  # fmt: skip
