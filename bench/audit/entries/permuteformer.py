"""The entries of linear attention in Triton: its sweeps, and the states that they start from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from unittest import mock

from ..case import CAPABILITIES, Case, Kernel, Measured, Traffic, empty, itemsize

SEQLEN, HEADS_Q, HEADS_K = 8192, 32, 8
SWEEPS = ("forward", "dq", "dk", "dv")
PARTS = ("sweep",)
DIMS = (64, 128, 256)


def cases(part: str) -> list[Case]:
    sweeps = SWEEPS if part == "sweep" else ("forward", "dk")
    every = [("bfloat16", dim, sweep) for sweep in sweeps for dim in DIMS]
    every += [("float32", dim, "forward") for dim in DIMS] + [("float32", 128, "dk")]
    every += [("bfloat16", 64, "forward bidirectional"), ("bfloat16", 64, "dk packed")]
    return [
        Case(f"linear {part}", chip, dim, dtype, variant)
        for dtype, dim, variant in every
        for chip in CAPABILITIES
    ]


def in_sample(case: Case) -> bool:
    chips = {"forward": {64: CAPABILITIES, 256: (90,)}, "dq": {128: (80, 120)}, "dk": {128: (90,)}}
    if case.kernel != "linear sweep" or case.dtype != "bfloat16":
        return case.head_dim == 128 and case.capability == 90
    return case.capability in chips.get(case.variant, {}).get(case.head_dim, ())


def measure(asked: Sequence[Case]) -> Iterable[Measured]:
    from extrope_kernels.ops.permuteformer.triton import launch as module

    from .triton_compiler import compile_launch, record

    for case in asked:
        part = case.kernel.split()[1]
        others = tuple(f"{name}_kernel" for name in ("gather", "chain", "sweep") if name != part)
        with (
            mock.patch.object(module, "_capability", lambda device, case=case: case.capability),
            mock.patch.object(module, "_interpreted", lambda: False),
        ):
            launch = record(module, f"{part}_kernel", lambda case=case: _launch(case), others)
        tile, row = launch.kwargs["TILE"], case.head_dim * itemsize(case.dtype)
        tokens = SEQLEN * (2 * HEADS_Q + 2 * HEADS_K)
        traffic = Traffic(
            bytes=tokens * row,
            blocks=launch.grid[0] * launch.grid[1],
            passes=(HEADS_Q * SEQLEN / tile.chunk * launch.grid[1],),
            loaded=tile.chunk * min(tile.value_lanes * itemsize(case.dtype), row),
            stored=0 if part == "gather" else tile.chunk * tile.value_lanes * itemsize(case.dtype),
        )
        yield case, compile_launch(launch, case.capability), traffic


def _launch(case: Case) -> None:
    from extrope_kernels.ops.permuteformer.sweep import Sweep
    from extrope_kernels.ops.permuteformer.triton import sweep

    packed = case.has("packed")
    batch = () if packed else (1,)
    q, k = (empty(*batch, SEQLEN, n, case.head_dim, dtype=case.dtype) for n in (HEADS_Q, HEADS_K))
    numbers, causal = empty(*batch, HEADS_Q, SEQLEN), not case.has("bidirectional")
    cu_seqlens = empty(9, dtype="int32") if packed else None
    by = partial(Sweep, HEADS_K, empty(HEADS_K) if causal else None, cu_seqlens, causal)
    if case.has("forward"):
        sweep(q, k, k, by(normalize=True))
    elif case.has("dq"):
        sweep(q, k, k, by(phi_scores=False, gate=q, x_scale=numbers, x_extra=numbers))
    elif case.has("dk"):
        given = {"reverse": True, "gate": k, "y_scale": numbers, "y_extra": numbers}
        sweep(k, q, q, by(phi_scores=False, **given))
    else:
        sweep(k, q, q, by(reverse=True, y_scale=numbers))


KERNELS = [
    Kernel(
        f"linear {part}", ("extrope_kernels/ops/permuteformer",), cases(part), measure, in_sample
    )
    for part in PARTS
]
