"""What the tests of the Triton rotation share: a slow oracle, guarded buffers, one comparison."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from extrope_kernels.ops.rope import reference
from extrope_kernels.ops.rope.call import Rotation
from extrope_kernels.ops.rope.triton import rotation as kernels
from extrope_kernels.testing import assert_within_budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def rope_rotation(rotary_dim: int, **changes) -> Rotation:
    exponents = torch.arange(0, rotary_dim, 2, device=DEVICE).double() / rotary_dim
    defaults = Rotation(
        inv_freq=(10000.0**-exponents).float()[None, None],
        positions=None,
        positions_are_offsets=False,
        offset=0,
        cu_seqlens=None,
        log_decay=None,
        decay_signs=(1.0, -1.0),
        amplitude=1.0,
        conjugate=False,
        interleaved=False,
    )
    return replace(defaults, **changes)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def rotate(
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    saved: Sequence[Tensor] | None,
    angle_grad: Tensor | None,
    rotation: Rotation,
) -> None:
    """Launch the kernel on one or two (batch, seqlen, heads, head_dim) tensors, as the ops do.

    saved: what a backward derives the angles from, into angle_grad.
    """
    pairs = [(*xs, None)[:2] for xs in (inputs, outputs, saved or (None,))]
    sides = kernels.Sides(*(x for pair in pairs for x in pair))
    launch = kernels.build_rotation_launch(sides, rotation)
    launch.run(
        **sides._asdict(),
        angle_grad_ptr=angle_grad,
        inv_freq_ptr=rotation.inv_freq,
        positions_ptr=rotation.positions,
        cu_seqlens_ptr=rotation.cu_seqlens,
        log_decay_ptr=rotation.log_decay,
        axes_ptr=rotation.axes,
        offset=rotation.offset,
    )


def sequence_and_index(rotation: Rotation, b: int, s: int) -> tuple[int, int]:
    if rotation.cu_seqlens is None:
        return b, s
    starts = rotation.cu_seqlens.tolist()
    sequence = max(i for i in range(len(starts) - 1) if starts[i] <= s)
    return sequence, s - starts[sequence]


def position_of(rotation: Rotation, b: int, s: int) -> np.longdouble | np.ndarray:
    sequence, index = sequence_and_index(rotation, b, s)
    if rotation.positions is None:
        return np.longdouble(index + rotation.offset)
    if rotation.positions_are_offsets:
        return np.longdouble(rotation.positions[sequence].item()) + index + rotation.offset
    b = b if rotation.positions.shape[-2] > 1 else 0
    if rotation.axes is not None:
        axes = rotation.axes.clamp(0, len(rotation.positions) - 1).long()
        of_pairs = rotation.positions[:, b, s][axes].cpu()
        return of_pairs.numpy().astype(np.longdouble) + rotation.offset
    row = rotation.positions[b]
    return np.longdouble(row[s].item()) + rotation.offset


def exact(inputs: list[Tensor], rotation: Rotation) -> list[np.ndarray]:
    """The rotation of (batch, seqlen, heads, head_dim) tensors in long double."""
    half = rotation.rotary_dim // 2
    first, second = slice(0, half), slice(half, 2 * half)
    if rotation.interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    dims = np.arange(rotation.rotary_offset, inputs[0].shape[-1])
    first, second = dims[first], dims[second]
    rotated = []
    for x, sign in zip(inputs, rotation.decay_signs, strict=False):
        out = x.double().cpu().numpy().astype(np.longdouble)
        for b, s in np.ndindex(*x.shape[:2]):
            position = position_of(rotation, b, s)
            sequence = sequence_and_index(rotation, b, s)[0]
            row = rotation.inv_freq[sequence if len(rotation.inv_freq) > 1 else 0]
            angle = position * row.double().cpu().numpy().astype(np.longdouble)
            amplitude = np.longdouble(rotation.amplitude)
            if rotation.log_decay is not None:
                decay = rotation.log_decay.double().cpu().numpy().astype(np.longdouble)
                amplitude = amplitude * np.exp(sign * (position - rotation.decay_origin) * decay)
            cos, sin = amplitude * np.cos(angle), amplitude * np.sin(angle)
            sin = -sin if rotation.conjugate else sin
            heads = out[b, s]  # (heads, head_dim)
            a, c = heads[:, first].copy(), heads[:, second].copy()
            heads[:, first], heads[:, second] = a * cos - c * sin, c * cos + a * sin
        rotated.append(out)
    return rotated


def assert_rotated(name: str, got: Tensor, same_dtype: Tensor, want: np.ndarray) -> None:
    """The error budget, and one unit of bfloat16 where the interpreter truncates to it."""
    truncates = INTERPRETED and got.dtype == torch.bfloat16
    want = torch.from_numpy(want.astype(np.float64))
    assert_within_budget(name, got.cpu(), same_dtype.cpu(), want, 1.0 if truncates else 0.0)


class Guarded:
    """A tensor of these strides in a NaN buffer, to show that nothing around it was written."""

    def __init__(
        self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        extent = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        margin = 256
        self.buffer = torch.full((extent + 2 * margin,), torch.nan, dtype=dtype, device=DEVICE)
        self.untouched = self.buffer.clone()
        self.place = (shape, strides, margin)

    @property
    def tensor(self) -> Tensor:
        return self.buffer.as_strided(*self.place)

    def assert_untouched_around(self) -> None:
        written = self.buffer.clone()
        written.as_strided(*self.place).fill_(torch.nan)
        bits = BITS[written.itemsize]
        assert torch.equal(written.view(bits), self.untouched.view(bits))


def guarded_like(x: Tensor, gap: int = 8) -> Guarded:
    _, seqlen, heads, dim = x.shape
    head = dim + gap
    seq = heads * head + gap
    return Guarded(tuple(x.shape), (seqlen * seq + gap, seq, head, 1), x.dtype)


def check(inputs: list[Tensor], rotation: Rotation, gap: int = 8) -> list[Tensor]:
    outputs = [guarded_like(x, gap) for x in inputs]
    rotate(inputs, [out.tensor for out in outputs], None, None, rotation)
    same_dtype = reference.rotate(inputs, rotation)
    want = exact(inputs, rotation)
    for name, out, ref, ideal in zip("qk", outputs, same_dtype, want, strict=False):
        assert_rotated(name, out.tensor, ref, ideal)
        out.assert_untouched_around()
    return [out.tensor for out in outputs]
