"""Rotations with a norm before them for the emulated CUDA ops, judged against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from extrope_kernels import methods
from extrope_kernels.ops.rope import norm
from extrope_kernels.testing import DTYPES, assert_within_budget

from ..cases import contiguous, expanded, gapped, qk, short, transposed
from .emulated import ops

Case = tuple[str, Callable[[], None]]
LAYOUTS = {"halves": False, "interleaved": True}


def weights(
    tensors: list[Tensor], norms: str, dtype: torch.dtype = torch.float32
) -> list[Tensor | None]:
    """norms: for each of q and k h (of each head), a (of all heads together) or - (none)."""
    count = {"h": 1, "a": None}
    found: list[Tensor | None] = [None, None]
    for n, (x, kind) in enumerate(zip(tensors, norms)):
        if kind != "-":
            size = (count[kind] or x.shape[-2]) * x.shape[-1]
            found[n] = (torch.rand(size) + 0.5).to(dtype)
    return found


def check(
    tensors: list[Tensor], given: list[Tensor | None], rope_args: tuple, backward=True, **options
) -> None:
    """Forward and backward against the reference in the same dtype and in float64."""
    both = (*tensors, None)[:2]
    exact = [None if x is None else x.double() for x in (*both, *given)]
    got = ops.rope_norm_fwd(*both, *given, *rope_args, **options)
    same = norm.rope_norm_fwd(*both, *given, *rope_args, **options)
    want = norm.rope_norm_fwd(*exact, *rope_args, **options)
    # Each row of fresh memory that is left out shows as NaN. As in tests/rope/test_rope_norm.py.
    ulp = min(torch.finfo(torch.float32).eps, torch.finfo(tensors[0].dtype).eps)
    for name, *values in zip("qk", got, same, want):
        compare_rows(name, ulp, *values)
    if not backward:
        return
    grads = [None if x is None else torch.randn(x.shape).to(x.dtype) for x in both]
    exact = [None if x is None else x.double() for x in (*grads, *both, *given)]
    got = ops.rope_norm_bwd(*grads, *both, *given, *rope_args, **options)
    same = norm.rope_norm_bwd(*grads, *both, *given, *rope_args, **options)
    want = norm.rope_norm_bwd(*exact, *rope_args, **options)
    for name, *values in zip(("dq", "dk"), got, same, want):
        compare_rows(name, ulp, *values)
    for name, x, *values in zip(("dq_weight", "dk_weight"), tensors, got[2:], same[2:], want[2:]):
        # Each of so many additions rounds a running sum that is at most the whole.
        terms = x.shape[:-1].numel()
        noise = 0.0
        if values[2].numel():
            noise = ulp / 2 * (10 + terms**0.5) * values[2].abs().max().item()
        assert_within_budget(name, *values, 0.0, noise)


def compare_rows(name: str, ulp: float, *values: Tensor) -> None:
    # Mean squares, products, means and differences: ten roundings that a rotation has not.
    noise = 5 * ulp * values[2].abs().max().item() if values[2].numel() else 0.0
    assert_within_budget(name, *values, 0.0, noise)


def case(
    name: str,
    tensors: list[Tensor],
    norms: str = "hh",
    rotary_dim: int | None = None,
    of: torch.dtype = torch.float32,
    inv_freq: Tensor | None = None,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    log_decay: Tensor | None = None,
    axes: Tensor | None = None,
    backward: bool = True,
    **options,
) -> Case:
    if inv_freq is None:
        inv_freq = methods.rope(rotary_dim or tensors[0].shape[-1]).inv_freq
    given = weights(tensors, norms, of)
    if cu_seqlens is not None:
        tensors = [x[0] for x in tensors]
    rope_args = (inv_freq, positions, cu_seqlens, log_decay, axes)
    return name, lambda: check(tensors, given, rope_args, backward, **options)


def shapes() -> Iterator[Case]:
    for layout, interleaved in LAYOUTS.items():
        for dtype in DTYPES:
            # By vectors, vectors beside idle lanes, elements; dims that pass.
            for dim, rotary_dim, norms in (
                *((128, 128, "hh"), (128, 128, "aa"), (80, 48, "ha"), (9, 8, "ah")),
                *(((72, 36, "hh"),) if interleaved else ()),
            ):
                name = f"{short(dtype)}-{layout}-{rotary_dim}-of-{dim}-{norms}"
                tensors = qk(dim=dim, seqlen=3, dtype=dtype)
                by = {"interleaved": interleaved, "attention_factor": 1.1, "offset": 1003}
                yield case(name, tensors, norms, rotary_dim, **by)
    for heads in ((1,), (17, 1), (5, 5), (0, 3)):
        for seqlen in (0, 1, 7):
            for norms in ("hh", "aa"):
                x = qk(heads=heads, batch=1, seqlen=seqlen, dim=16, dtype=torch.bfloat16)
                yield case(f"heads{heads}-seqlen{seqlen}-{norms}", x, norms)
    for norms in ("h-", "-h", "ha", "ah"):
        yield case(norms, qk(heads=(5, 2)), norms)
    # More heads than a block holds; more sums than its shared memory.
    many = qk(heads=(70, 2), batch=1, seqlen=2, dim=128)
    yield case("many-heads", many, "ah")
    yield case("many-sums", qk(heads=(101,), batch=1, seqlen=2, dim=128), "a")
    yield case("wide", qk(heads=(2, 1), batch=1, seqlen=2, dim=640), "ha", 600)
    yield case("wide-f64", qk(heads=(3,), batch=1, seqlen=2, dim=1600, dtype=torch.float64), "h")
    # More tokens than parts.
    yield case("long", qk(heads=(2, 1), batch=1, seqlen=1030, dim=8, dtype=torch.bfloat16), "ha")


def memory() -> Iterator[Case]:
    layouts = {
        "gap8": (gapped, {"gap": 8}),
        "gap3": (gapped, {"gap": 3}),
        "misaligned": (gapped, {"gap": 8, "start": 1}),
        "transposed": (transposed, {}),
        "expanded": (expanded, {}),
    }
    for name, (make, options) in layouts.items():
        for norms in ("hh", "aa"):
            x = qk(make, dtype=torch.bfloat16, seqlen=3, **options)
            yield case(f"{name}-{norms}", x, norms)
            if make is not expanded:
                yield f"{name}-{norms}-inplace", lambda x=x, norms=norms: in_place(x, norms)
    yield "odd-weight", odd_weight
    packed = contiguous(2, 3, 7, 64, dtype=torch.float16)
    yield case("packed-projection", [packed[:, :, :3], packed[:, :, 3:5]], "ha")
    for of in DTYPES:
        yield case(f"weights-{short(of)}", qk(seqlen=2, dtype=torch.bfloat16), "ha", of=of)
        yield case(f"weights-{short(of)}-f32", qk(seqlen=2), "ah", of=of)


def odd_weight() -> None:
    """A weight that no vector can be read from."""
    weight = torch.rand(65)[1:]
    check(qk(seqlen=2, heads=(2, 1)), [weight, weight], (methods.rope(64).inv_freq,))


def in_place(tensors: list[Tensor], norms: str) -> None:
    given, inv_freq = weights(tensors, norms), methods.rope(48).inv_freq
    out = ops.rope_norm_fwd(*tensors, *given, inv_freq)
    storages = [torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()) for x in tensors]
    before = [x.clone() for x in storages]
    ops.rope_norm_inplace(*tensors, *given, inv_freq)
    for x, y, now, then in zip(tensors, out, storages, before, strict=True):
        assert torch.equal(x, y), "in place differs"
        place = x.shape, x.stride(), x.storage_offset()
        now, then = now.clone().view(torch.int16), then.view(torch.int16)
        now.as_strided(*place).zero_(), then.as_strided(*place).zero_()
        assert torch.equal(now, then), "wrote between the rows"


def angles() -> Iterator[Case]:
    starts = torch.tensor((0, 0, 3, 3, 7, 11, 11), dtype=torch.int32)
    total = {"batch": 1, "seqlen": 11}
    half = methods.rope(64).inv_freq
    for dtype, kinds in ((torch.bfloat16, ("hh", "aa")), (torch.float32, ("ha",))):
        for norms in kinds:
            name = f"{short(dtype)}-{norms}"
            x = {"dtype": dtype, "seqlen": 3}
            given = torch.randint(0, 10**6, (2, 3))
            yield case(f"positions-{name}", qk(**x), norms, positions=given)
            rows = half * torch.rand(2, 1, 1)
            yield case(f"per-sequence-{name}", qk(**x), norms, inv_freq=rows)
            both = half * torch.rand(2, 5, 1)
            yield case(f"per-head-{name}", qk(heads=(5, 5), **x), norms, inv_freq=both)
            yield case(f"packed-{name}", qk(dtype=dtype, **total), norms, cu_seqlens=starts)
            decay = torch.linspace(-1e-3, 1e-3, 32)
            by = {"positions": given % 999, "log_decay": decay, "decay_origin": 500.0}
            yield case(f"decay-{name}", qk(**x), norms, **by)
            axes = torch.arange(32, dtype=torch.int32) % 3
            by = {"positions": torch.randint(0, 10**5, (3, 2, 3)), "axes": axes}
            yield case(f"axes-{name}", qk(**x), norms, **by)
            by = {"inverse": True, "attention_factor": 1.3, "norm_eps": 0.5}
            yield case(f"inverse-{name}", qk(**x), norms, **by)


def everything() -> Iterator[Case]:
    for group in (shapes, memory, angles):
        yield from group()


def shared_memory() -> Iterator[Case]:
    """For the thread sanitizer: every barrier of the kernels, with few threads' worth of work."""
    for norms in ("hh", "aa"):
        for dtype in (torch.bfloat16, torch.float64):
            x = qk(heads=(20, 3), batch=1, seqlen=2, dim=64, dtype=dtype)
            yield case(f"{short(dtype)}-{norms}", x, norms)
        both = methods.rope(64).inv_freq * torch.rand(1, 5, 1)
        yield case(f"per-head-{norms}", qk(heads=(5, 5), batch=1), norms, inv_freq=both)
