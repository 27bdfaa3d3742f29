"""The entries of linear attention in Triton: its scans, what they ask of decay and sequences, the
states that they start from, and what their gradients need of rows.
"""

from __future__ import annotations

import math
from functools import partial

from shapes import HEADS_K, HEADS_Q, SEQLEN

from ..case import CAPABILITIES, Case, Kernel, Source, Traffic, empty, itemsize

SCANS = ("forward", "dq", "dk", "dv")
PARTS = ("scan", "state", "state_passing", "prepare", "row_dots")
DIMS = (64, 128, 256)


def cases(part: str) -> list[Case]:
    """States of one key/value head each; step: one token, from a state to the next."""
    if part == "prepare":
        every = [("bfloat16", 128, kind) for kind in ("forward", "forward packed")]
    elif part == "row_dots":
        every = [(dtype, dim, "") for dtype in ("bfloat16", "float32") for dim in DIMS]
    elif part == "state_passing":
        every = [("bfloat16", dim, kind) for dim in DIMS for kind in ("forward", "forward state")]
        every += [("bfloat16", 64, "forward bidirectional"), ("bfloat16", 64, "dk packed")]
    else:
        scans = SCANS if part == "scan" else ("forward", "dk")
        every = [("bfloat16", dim, scan) for scan in scans for dim in DIMS]
        every += [("float32", dim, "forward") for dim in DIMS] + [("float32", 128, "dk")]
        every += [("bfloat16", 64, "forward bidirectional"), ("bfloat16", 64, "dk packed")]
    if part == "scan":
        every += [
            ("bfloat16", dim, f"forward {kind}") for dim in DIMS for kind in ("state", "step")
        ]
    return [
        Case(f"linear {part}", chip, dim, dtype, variant)
        for dtype, dim, variant in every
        for chip in CAPABILITIES
    ]


def in_sample(case: Case) -> bool:
    chips = {
        "forward": {64: CAPABILITIES, 256: (90,)},
        "dq": {128: (80, 120)},
        "dk": {128: (80, 90)},
        "forward state": {128: (80, 100)},
        "forward step": {64: (80,)},
    }
    if case.kernel == "linear prepare":
        return case.has("packed")
    if case.kernel == "linear state" and case.head_dim == 256:
        # Triton 3.6 and 3.7 refuse products of float32 that are less than 16 deep.
        return str(case) == "linear-state-sm_80-D256-float32-forward"
    if case.kernel != "linear scan" or case.dtype != "bfloat16":
        return case.head_dim == 128 and case.capability == 90
    return case.capability in chips.get(case.variant, {}).get(case.head_dim, ())


def prepare(case: Case) -> tuple[Source, Traffic]:
    from .triton_compiler import record

    part = case.kernel.split()[1]
    launch = record(f"{part}_kernel", case.capability, lambda: _launch(case))
    traffic = {
        "state_passing": _passing_traffic,
        "prepare": _prepared_traffic,
        "row_dots": _dots_traffic,
    }
    return launch, traffic.get(part, _traffic)(case, launch)


def _traffic(case: Case, launch) -> Traffic:
    tile, size = launch.argument("TILE"), itemsize(case.dtype)
    tokens, blocks = _tokens(case), launch.grid[1]
    programs = launch.grid[0] // launch.argument("parts")
    rows, values = tile.chunk * case.head_dim * size, tile.chunk * tile.block_v * size
    of_states = case.kernel == "linear state"
    heads = HEADS_K if of_states and case.has("forward") else HEADS_Q
    moved = 2 * heads if of_states else 2 * HEADS_Q + 2 * HEADS_K
    return Traffic(
        bytes=tokens * moved * case.head_dim * size,
        blocks=math.prod(launch.grid),
        passes=(heads * -(-tokens // tile.chunk) * blocks,),
        around=programs * -(-tokens // tile.chunk) * blocks,
        loaded=rows + values if of_states else min(rows, values),
        stored=0 if of_states else values,
    )


def _passing_traffic(_: Case, launch) -> Traffic:
    """Reads each part's state and writes the one before it."""
    parts, size = launch.argument("parts"), launch.argument("size")
    states, blocks, _ = launch.grid
    row = launch.argument("BLOCK") * 4
    return Traffic(
        2 * 4 * states * parts * size, states * blocks, (states * blocks * parts,), row, row
    )


def _prepared_traffic(_: Case, launch) -> Traffic:
    """One program, of a few numbers: at most a pass of each loop."""
    heads, sequences = launch.argument("heads"), launch.argument("num_sequences")
    return Traffic(4 * (2 * heads + 2 * sequences + 2), 1, (1, 1), 0, 0)


def _dots_traffic(case: Case, launch) -> Traffic:
    row = case.head_dim * itemsize(case.dtype)
    loaded = 2 * launch.argument("BLOCK_M") * row
    return Traffic(SEQLEN * HEADS_Q * (2 * row + 4), math.prod(launch.grid), (), loaded, 0)


def _tokens(case: Case) -> int:
    return 1 if case.has("step") else SEQLEN


def _launch(case: Case) -> None:
    from extrope_kernels.ops.linear_attention.scan import Scan
    from extrope_kernels.ops.linear_attention.triton import row_dots, scan

    packed, tokens, dim = case.has("packed"), _tokens(case), case.head_dim
    batch = () if packed else (1,)
    q, k = (empty(*batch, tokens, n, dim, dtype=case.dtype) for n in (HEADS_Q, HEADS_K))
    numbers, causal = empty(*batch, HEADS_Q, tokens), not case.has("bidirectional")
    cu_seqlens = empty(9, dtype="int32") if packed else None
    options = partial(Scan, HEADS_K, empty(HEADS_K) if causal else None, cu_seqlens, causal)
    given = {}
    if case.has("state") or case.has("step"):
        shape = (1, HEADS_K, dim)
        given = {"first_state": empty(*shape, dim), "first_sum": empty(*shape), "keep_state": True}
    if case.kernel == "linear row_dots":
        row_dots(q, q, packed)
    elif case.has("forward"):
        scan(q, k, k, options(normalize=True, **given))
    elif case.has("dq"):
        scan(q, k, k, options(phi_scores=False, gate=q, q_scale=numbers, q_extra=numbers))
    elif case.has("dk"):
        given = {"reverse": True, "gate": k, "k_scale": numbers, "k_extra": numbers}
        scan(k, q, q, options(phi_scores=False, **given))
    else:
        scan(k, q, q, options(reverse=True, k_scale=numbers))


KERNELS = [Kernel(f"linear {part}", cases(part), prepare, in_sample) for part in PARTS]
