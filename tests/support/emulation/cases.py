"""Rotations for the emulated CUDA kernels, and how their results are judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from support.rope_oracle import BITS, exact, rope_rotation
from torch import Tensor

from extrope_kernels.ops._math.dtypes import accumulator
from extrope_kernels.ops._math.pairs import cross
from extrope_kernels.ops.rope import reference
from extrope_kernels.ops.rope.call import Rotation
from extrope_kernels.testing import DTYPES, assert_within_budget

from . import harness

LAYOUTS = {"halves": False, "interleaved": True}
HEAD_DIMS = (2, 8, 64, 72, 80, 96, 128, 256)


def strided(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, start: int = 0
) -> Tensor:
    """A tensor of NaN that ends with its storage: one byte further is out of bounds."""
    empty = 0 in shape
    extent = 0 if empty else 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    return torch.full((start + extent,), torch.nan, dtype=dtype).as_strided(shape, strides, start)


def with_gaps(shape: tuple[int, ...], dtype: torch.dtype, gap: int, start: int = 0) -> Tensor:
    _, seqlen, heads, dim = shape
    head = dim + gap
    seq = heads * head + gap
    return strided(shape, (seqlen * seq + gap, seq, head, 1), dtype, start)


def contiguous(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape).to(dtype)


def gapped(*shape: int, dtype: torch.dtype, gap: int, start: int = 0) -> Tensor:
    return with_gaps(shape, dtype, gap, start).copy_(torch.randn(shape))


def transposed(*shape: int, dtype: torch.dtype) -> Tensor:
    batch, seqlen, heads, dim = shape
    return contiguous(batch, heads, seqlen, dim, dtype=dtype).transpose(1, 2)


def expanded(*shape: int, dtype: torch.dtype) -> Tensor:
    *_, heads, dim = shape
    return contiguous(1, 1, heads, dim, dtype=dtype).expand(shape)


@dataclass
class Case:
    """One launch and all that its check needs."""

    name: str
    inputs: list[Tensor]
    rotation: Rotation
    outputs: list[Tensor] | None = None  # None: in place
    saved: list[Tensor] | None = None  # asks for the angle gradient

    def __post_init__(self) -> None:
        self.originals = [x.clone() for x in self.inputs]
        self.in_place = self.outputs is None
        self.outputs = self.inputs if self.in_place else self.outputs
        self.storages = [
            torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()) for x in self.outputs
        ]
        self.before = [storage.clone() for storage in self.storages]
        self.angle_grad = None
        if self.saved is not None:
            batch, seqlen = self.inputs[0].shape[:2]
            shape = (batch, seqlen, *self.rotation.inv_freq.shape[1:])
            self.angle_grad = torch.full(shape, torch.nan, dtype=accumulator(self.inputs[0].dtype))

    def job(self) -> harness.Job:
        return harness.rope_job(
            self.name, self.inputs, self.outputs, self.rotation, self.saved or (), self.angle_grad
        )

    def results(self) -> list[Tensor]:
        return [*self.storages, *([] if self.angle_grad is None else [self.angle_grad])]

    def check(self) -> None:
        ideal = exact(self.originals, self.rotation)
        same_dtype = reference.rotate(self.originals, self.rotation)
        for name, out, ref, want in zip("qk", self.outputs, same_dtype, ideal, strict=False):
            assert_within_budget(name, out, ref, torch.from_numpy(want.astype(np.float64)))
            begin, end = self.rotation.rotary_offset, None
            end = begin + self.rotation.rotary_dim
            assert torch.equal(out[..., :begin], ref[..., :begin])
            assert torch.equal(out[..., end:], ref[..., end:])
        for out, now, before in zip(self.outputs, self.storages, self.before, strict=True):
            self._check_untouched(out, now, before)
        if self.saved is not None:
            self._check_angle_grad(ideal)

    def _check_untouched(self, out: Tensor, now: Tensor, before: Tensor) -> None:
        bits = BITS[out.itemsize]
        place = (out.shape, out.stride(), out.storage_offset())
        now, before = now.clone().view(bits), before.view(bits).clone()
        now.as_strided(*place).zero_(), before.as_strided(*place).zero_()
        assert torch.equal(now, before), "wrote between the rows of its output"

    def _check_angle_grad(self, ideal: list[np.ndarray]) -> None:
        at = (self.rotation.pair_dims, self.rotation.per_head)
        wide = accumulator(self.inputs[0].dtype)
        rotated = reference.rotate([x.to(wide) for x in self.originals], self.rotation)
        ref = sum(cross(x, dx, *at) for x, dx in zip(self.saved, rotated, strict=True))
        exactly = [torch.from_numpy(dx.astype(np.float64)) for dx in ideal]
        want = sum(cross(x.double(), dx, *at) for x, dx in zip(self.saved, exactly, strict=True))
        assert_within_budget("angle_grad", self.angle_grad, ref, want)


def qk(
    make: Callable[..., Tensor] = contiguous,
    heads: tuple[int, ...] = (3, 1),
    batch: int = 2,
    seqlen: int = 5,
    dim: int = 64,
    dtype: torch.dtype = torch.float32,
    **options,
) -> list[Tensor]:
    return [make(batch, seqlen, h, dim, dtype=dtype, **options) for h in heads]


def case(
    name: str, inputs: list[Tensor], gap: int = 8, rotary_dim: int | None = None, **by
) -> Case:
    saved = by.pop("saved", None)
    rotation = rope_rotation(rotary_dim or inputs[0].shape[3], **by)
    outputs = [with_gaps(tuple(x.shape), x.dtype, gap) for x in inputs]
    return Case(name, inputs, rotation, outputs, saved)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -------------------------------------------------------------------------------------------------
# Cases


def shapes() -> Iterator[Case]:
    for layout, interleaved in LAYOUTS.items():
        for dtype in DTYPES:
            for dim in HEAD_DIMS:
                inputs = qk(dim=dim, dtype=dtype)
                yield case(f"{short(dtype)}-{layout}-{dim}", inputs, interleaved=interleaved)
            for dim, rotary_dim, rotary_offset in (
                (128, 32, 0),
                (192, 64, 128),
                (96, 64, 8),
                (80, 16, 0),
                (72, 36, 4),
                (64, 2, 0),
                (9, 8, 1),
                (640, 600, 0),
            ):
                inputs = qk(dim=dim, dtype=dtype)
                name = f"{short(dtype)}-{layout}-{rotary_dim}-of-{dim}-from-{rotary_offset}"
                by = {"interleaved": interleaved, "rotary_offset": rotary_offset}
                yield case(name, inputs, rotary_dim=rotary_dim, **by)
                yield Case(
                    f"{name}-inplace",
                    qk(gapped, dim=dim, dtype=dtype, gap=dim % 3 * 8),
                    rope_rotation(rotary_dim, **by, conjugate=True),
                )
    for heads in ((1,), (73, 1), (1, 73), (5, 5), (0, 3)):
        for seqlen in (0, 1, 7, 131):
            inputs = qk(heads=heads, batch=1, seqlen=seqlen, dim=16, dtype=torch.bfloat16)
            yield case(f"heads{heads}-seqlen{seqlen}", inputs)
    yield case(
        "batch3-seqlen1", qk(batch=3, seqlen=1, heads=(32, 8), dim=128, dtype=torch.bfloat16)
    )


def memory() -> Iterator[Case]:
    layouts = {
        "gap8": (gapped, {"gap": 8}),
        "gap3": (gapped, {"gap": 3}),
        "misaligned": (gapped, {"gap": 8, "start": 1}),
        "transposed": (transposed, {}),
        "expanded": (expanded, {}),
    }
    for dtype in DTYPES:
        for name, (make, options) in layouts.items():
            inputs = qk(make, dtype=dtype, **options)
            yield case(f"{name}-{short(dtype)}", inputs, gap=16, conjugate=True)
            yield case(f"{name}-{short(dtype)}-odd-output", inputs, gap=1)
            if make is not expanded:
                yield Case(f"{name}-{short(dtype)}-inplace", inputs, rope_rotation(64))


def positions() -> Iterator[Case]:
    for dtype in harness.POSITION_DTYPES:
        for largest in (1e3, 1e5, 1e6, 1.6e7):
            drawn = torch.rand(2, 5) * largest
            given = drawn.to(dtype) if dtype.is_floating_point else drawn.round().to(dtype)
            for x in (torch.float32, torch.float64, torch.bfloat16):
                name = f"{short(dtype)}-to-{largest:.0e}-{short(x)}"
                yield case(name, qk(dtype=x), positions=given, offset=3)
        offsets = torch.tensor([1_000_003, -7]).to(dtype)
        by_offset = {"positions": offsets, "positions_are_offsets": True}
        yield case(f"{short(dtype)}-offsets", qk(), offset=2, **by_offset)
        yield case(f"{short(dtype)}-one-row", qk(), positions=torch.arange(5).to(dtype)[None] * 7)
        every_other = torch.arange(40).to(dtype).view(4, 10)[::2, ::2]
        yield case(f"{short(dtype)}-strided", qk(), positions=every_other)
    yield case("offset-16-million", qk(seqlen=7), offset=16_000_000)
    yield case("negative", qk(), offset=-100_000)


def packed() -> Iterator[Case]:
    starts = torch.tensor((0, 0, 3, 3, 7, 11, 11), dtype=torch.int32)
    total = {"batch": 1, "seqlen": 11}
    offsets = torch.randint(0, 100_000, (6,))
    rows = rope_rotation(64).inv_freq * torch.rand(6, 1, 1)
    for dtype in DTYPES:
        x = {"dtype": dtype, **total}
        yield case(f"index-{short(dtype)}", qk(**x), cu_seqlens=starts, offset=2)
        yield case(f"per-sequence-{short(dtype)}", qk(**x), cu_seqlens=starts, inv_freq=rows)
        by = {"cu_seqlens": starts, "positions": offsets, "positions_are_offsets": True}
        yield case(f"offsets-{short(dtype)}", qk(**x), **by)
    given = torch.randint(0, 100_000, (1, 11))
    yield case("positions", qk(**total), cu_seqlens=starts, positions=given)
    yield case("one-sequence", qk(**total), cu_seqlens=torch.tensor([0, 11], dtype=torch.int32))


def frequencies() -> Iterator[Case]:
    for dtype in DTYPES:
        rows = rope_rotation(64).inv_freq * torch.rand(2, 1, 1)
        yield case(f"per-sequence-{short(dtype)}", qk(dtype=dtype), inv_freq=rows)
        for layout, interleaved in LAYOUTS.items():
            both = rope_rotation(64).inv_freq * torch.rand(2, 5, 1)
            inputs = qk(heads=(5, 5), dtype=dtype)
            by = {"inv_freq": both, "interleaved": interleaved}
            yield case(f"per-head-{layout}-{short(dtype)}", inputs, **by)
            decay = torch.linspace(-1e-3, 1e-3, 32)
            for factor in (1.0, 1.37):
                yield case(
                    f"decay-{layout}-{short(dtype)}-amplitude{factor}",
                    qk(dtype=dtype),
                    positions=torch.randint(0, 2000, (2, 5)),
                    log_decay=decay,
                    amplitude=factor,
                    interleaved=interleaved,
                )
        yield case(f"float64-{short(dtype)}", qk(dtype=dtype), inv_freq=rows.double() / 3)
    strong = torch.linspace(-0.02, 0.02, 32)
    yield case("strong-decay", qk(), offset=4000, log_decay=strong)
    yield case("decay-origin", qk(), offset=4000, log_decay=strong, decay_origin=4001.0)


def gradients() -> Iterator[Case]:
    for dtype in DTYPES:
        for layout, interleaved in LAYOUTS.items():
            for dim, rotary_dim, rotary_offset in ((64, 64, 0), (72, 72, 0), (128, 64, 56)):
                by = {"rotary_dim": rotary_dim, "interleaved": interleaved, "conjugate": True}
                by["rotary_offset"] = rotary_offset
                for heads in ((3, 1), (1,), (73, 2)):
                    shape = {"dim": dim, "dtype": dtype, "heads": heads, "seqlen": 3}
                    saved = qk(gapped, gap=16, **shape)
                    name = f"{layout}-{short(dtype)}-{rotary_dim}-of-{dim}-heads{heads}"
                    yield case(name, qk(**shape), saved=saved, **by)
                per_head = rope_rotation(rotary_dim).inv_freq * torch.rand(1, 5, 1)
                shape = {"dim": dim, "dtype": dtype, "heads": (5, 5)}
                name = f"{layout}-{short(dtype)}-{rotary_dim}-of-{dim}-per-head"
                yield case(name, qk(**shape), saved=qk(**shape), inv_freq=per_head, **by)


def axes() -> Iterator[Case]:
    pairs = torch.arange(32, dtype=torch.int32)
    given = torch.randint(0, 100_000, (3, 2, 5))
    decay = torch.linspace(-1e-5, 1e-5, 32)
    for dtype in DTYPES:
        for layout, interleaved in LAYOUTS.items():
            by = {"interleaved": interleaved, "axes": pairs % 3, "offset": 3}
            name = f"{layout}-{short(dtype)}"
            yield case(name, qk(dtype=dtype), positions=given, **by)
            yield case(f"{name}-decay", qk(dtype=dtype), positions=given, log_decay=decay, **by)
            saved = qk(dtype=dtype)
            yield case(f"{name}-gradient", qk(dtype=dtype), positions=given, saved=saved, **by)
    for dtype in harness.POSITION_DTYPES:
        yield case(short(dtype), qk(), positions=given.to(dtype), axes=pairs // 11)
    yield case("one-row", qk(), positions=given[:, :1], axes=pairs % 3)
    yield case(
        "strided", qk(), positions=given.permute(2, 1, 0)[:3, :, [0, 1, 2, 0, 1]], axes=pairs % 3
    )
    yield case("out-of-range", qk(), positions=given, axes=(pairs - 16) * 2**26)


GROUPS = (shapes, memory, positions, packed, frequencies, gradients, axes)
