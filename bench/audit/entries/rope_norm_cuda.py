"""The entries of the kernels with a norm in CUDA C++: the rotation, forward and backward, the sum
of the weights' gradients, and the fused step into a cache.
"""

from __future__ import annotations

import re
from functools import partial
from itertools import product

from shapes import HEADS_K, HEADS_Q
from shapes import SEQLEN as TOKENS

from extrope_kernels import _build

from ..case import Case, Kernel, Source, Traffic, itemsize
from .rope import TYPES

BLOCK, SUM_BLOCK, HEAD_DIM = 128, 256, 128
# By vectors where they fit, one head a few lanes; else, and in double, by elements.
KINDS = [(dtype, kind) for dtype, kind in product(TYPES.values(), ("vectors", "elements"))
         if (dtype, kind) != ("float64", "vectors")]  # fmt: skip
SUMS = [(dtype, "sum") for dtype in ("float32", "float64")]
SYMBOL = re.compile(r"kernelI(f|d|13__nv_bfloat16|6__half)(?:Li(\d+)E)?")
SOURCES = {
    "rope norm cuda": "rope/norm.cu",
    "rope norm_backward cuda": "rope/norm_backward.cu",
    "rope append cuda": "append/append.cu",
}


def cases(name: str) -> list[Case]:
    kinds = KINDS + (SUMS if name == "rope norm_backward cuda" else [])
    chips = map(int, _build.CUDA_ARCHS)
    return [Case(name, chip, HEAD_DIM, *kind) for chip, kind in product(chips, kinds)]


def case_of(name: str, chip: int, symbol: str) -> Case:
    dtype, elements = SYMBOL.search(symbol).groups()
    if elements is None:
        return Case(name, chip, HEAD_DIM, TYPES[dtype], "sum")
    kind = "elements" if int(elements) == 1 else "vectors"
    return Case(name, chip, HEAD_DIM, TYPES[dtype], kind)


OF_NAME = {name: (partial(case_of, name), partial(cases, name)) for name in SOURCES}


def prepare(name: str, case: Case) -> tuple[Source, Traffic]:
    from . import nvcc

    warps = (SUM_BLOCK if case.has("sum") else BLOCK) // 32
    # The same objects for all cases of a source: by them its one compilation is known again.
    return nvcc.Function(SOURCES[name], warps, case, *OF_NAME[name]), traffic(case)


def traffic(case: Case) -> Traffic:
    """Of 32 heads of q, 8 of k and, into a cache, of v.

    Types of weights, layouts and caches are branches of one kernel, so its instructions tell
    nothing of a launch: they are not counted, and times are those of the bytes.
    """
    if case.has("sum"):  # 512 parts of a head's weights
        size = 512 * HEAD_DIM * itemsize(case.dtype)
        return Traffic(bytes=size, blocks=0, passes=(), loaded=0, stored=0)
    row = HEAD_DIM * itemsize(case.dtype)
    heads, moved = HEADS_Q + HEADS_K, 2
    if case.kernel == "rope append cuda":
        heads += HEADS_K
    if case.kernel == "rope norm_backward cuda":
        moved = 3
    own = 0 if case.has("elements") else 2 * 16 * BLOCK  # two vectors a thread, of a head
    # A cache's element type is known at run time: its stores are of no address space.
    stored = 0 if case.kernel == "rope append cuda" else own
    return Traffic(
        bytes=TOKENS * heads * row * moved, blocks=0, passes=(), loaded=own, stored=stored
    )


KERNELS = [
    Kernel(
        name=name,
        cases=cases(name),
        prepare=partial(prepare, name),
        sample=lambda case: True,
        at_once=True,
    )
    for name in SOURCES
]
