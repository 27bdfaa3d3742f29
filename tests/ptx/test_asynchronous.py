"""wgmma and the ways in and out of tensor memory, written in PTX, against the manual's layouts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from raw_ptx import run
from support.ptx import arithmetic

TORCH = {
    "bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32,
    "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2,
}  # fmt: skip
SWIZZLED_BYTES = {0: 16, 1: 128, 2: 64, 3: 32}  # of a row, by the descriptor's mode


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_fp8(kind):
    codes = torch.arange(256, dtype=torch.uint8).view(TORCH[kind])
    values = arithmetic.fp8_values(kind)
    np.testing.assert_array_equal(values, codes.float().numpy())
    largest = float(np.nanmax(values[np.isfinite(values)]))
    x = torch.cat([torch.randn(9999) * scale for scale in (1e-3, 0.02, 1, 100, 300)])
    finite = codes.float()[codes.float().isfinite()].sort().values
    ties = (finite[:-1] + finite[1:]) / 2
    x = torch.cat([x, ties, torch.tensor([0.0, -0.0, 1e9, -1e9, torch.inf])])
    want = x.clamp(-largest, largest).to(TORCH[kind]).view(torch.uint8).numpy()
    np.testing.assert_array_equal(arithmetic.to_fp8(x.numpy(), kind), want)


def byte_of(row: int, k: int, mode: int, transposed: bool, strides, size: int) -> int:
    """Where the manual has an element of a matrix, from its start, before the swizzle."""
    leading, stride = strides
    width = SWIZZLED_BYTES[mode]
    along, line = (row, k) if transposed else (k, row)  # what runs fastest, and the other
    block, byte = divmod(along * size, width)
    if mode == 0 and transposed:
        leading, stride = stride, leading
    return line % 8 * width + line // 8 * stride + block * leading + byte


def place(memory, x: torch.Tensor, kind: str, mode: int, transposed: bool, start: int) -> int:
    """Store a matrix (rows, k) in shared memory from `start` on; return its descriptor."""
    size, width = x.element_size(), SWIZZLED_BYTES[mode]
    strides = (16 * width, 8 * width) if transposed and mode else (128, 8 * width + 128)
    if mode and not transposed:
        strides = (0, 8 * width)
    elements = x.contiguous().view(torch.uint8).numpy().reshape(*x.shape, size)
    for row, k in np.ndindex(*x.shape):
        at = start + byte_of(row, k, mode, transposed, strides, size)
        at ^= (at >> 7 & SWIZZLED_BYTES[mode] // 16 - 1) << 4
        memory[at : at + size] = elements[row, k]
    leading, stride = strides
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62


def accumulators(values: np.ndarray) -> np.ndarray:
    """(64, n) -> (128 threads, n / 2) elements, as the manual's figure has them."""
    thread, i = np.ogrid[:128, : values.shape[1] // 2]
    row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (i % 4 // 2)
    return values[row, i // 4 * 8 + thread % 4 * 2 + i % 2]


WGMMA = """
    ld.param.b64 %rd0, [p0]; ld.param.b64 %rd1, [p1]; ld.param.b64 %rd2, [p2];
    mov.u32 %r0, %tid.x; mov.b32 %r1, memory; shl.b32 %r2, %r0, 4; mov.b32 %r3, 0;
    COPY:
    add.s32 %r4, %r2, %r3; cvt.u64.u32 %rd4, %r4; add.s64 %rd5, %rd0, %rd4;
    ld.global.v4.b32 {{%r5,%r6,%r7,%r8}}, [%rd5]; st.shared.v4.b32 [%r4], {{%r5,%r6,%r7,%r8}};
    add.s32 %r3, %r3, 2048; setp.lt.s32 %p0, %r3, {bytes}; @%p0 bra COPY;
    fence.proxy.async.shared::cta; bar.sync 0;
    mul.wide.u32 %rd6, %r0, {row_bytes}; add.s64 %rd7, %rd1, %rd6; add.s64 %rd8, %rd2, %rd6;
    {loads}
    mov.b64 %rd9, {a}; mov.b64 %rd10, {b}; setp.eq.s32 %p1, %r0, %r0;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n{n}k{k}.f32.{kind}.{kind}
        {{{registers}}}, %rd9, %rd10, %p1, {sign}, 1{majors};
    wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
    {stores}
"""


@pytest.mark.parametrize("modes", [(0, 1), (1, 2), (2, 3), (3, 0)])
@pytest.mark.parametrize(
    "kind, transposed",
    [("bf16", (False, False)), ("f16", (True, False)), ("bf16", (False, True)),
     ("tf32", (False, False)), ("e4m3", (False, False)), ("e5m2", (False, False))],
)  # fmt: skip
def test_wgmma(kind, transposed, modes):
    n, size = 128, TORCH[kind].itemsize
    k, bytes_ = 32 // size, 48 * 1024
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, k, generator=generator).bfloat16() for rows in (64, n))
    a, b = a.to(TORCH[kind]), b.to(TORCH[kind])
    c = torch.randn(64, n, generator=generator)
    memory = np.zeros(bytes_, np.uint8)
    described = [
        place(memory, x, kind, mode, turned, start)
        for x, mode, turned, start in zip((a, b), modes, transposed, (1024, 16 * 1024))
    ]
    names = [f"%r{16 + i}" for i in range(n // 2)]
    sums = torch.from_numpy(accumulators(c.numpy()))
    out = torch.zeros_like(sums)
    body = WGMMA.format(
        bytes=bytes_, row_bytes=2 * n, n=n, k=k, kind=kind, a=described[0], b=described[1],
        registers=",".join(names), sign=-1,
        majors=f", {int(transposed[0])}, {int(transposed[1])}" if size == 2 else "",
        loads="".join(f"ld.global.b32 {x}, [%rd7+{4 * i}];" for i, x in enumerate(names)),
        stores="".join(f"st.global.b32 [%rd8+{4 * i}], {x};" for i, x in enumerate(names)),
    )  # fmt: skip
    tensors = [torch.from_numpy(memory.view(np.int32)), sums, out]
    assert not run(body, tensors, shared=bytes_, registers=128)
    want = c.double() - a.double() @ b.double().T
    np.testing.assert_allclose(out, accumulators(want.numpy()), rtol=0, atol=3e-5)


# Strides, in bits, of threads and registers over rows of `width` bits: CuTe's layouts of tcgen05.ld
# (cute/atom/copy_traits_sm100.hpp), for x repetitions.
CUTE = {
    "32x32b": (32, 1, lambda w, x: ([(32, w)], [(x, 32)])),
    "16x64b": (64, 1, lambda w, x: ([(2, 8 * w), (2, 32), (8, w)], [(x, 64)])),
    "16x128b": (128, 2, lambda w, x: ([(4, 32), (8, w)], [(2, 8 * w), (x, 128)])),
    "16x256b": (256, 4, lambda w, x: ([(4, 64), (8, w)], [(2, 32), (2, 8 * w), (x, 256)])),
}


def cells(shape: str, x: int) -> tuple[np.ndarray, np.ndarray]:
    """(32 threads, registers): the row and the column that each register is of."""
    width, registers, strides = CUTE[shape]

    def walk(i, modes):
        total = 0
        for size, stride in modes:
            total, i = total + i % size * stride, i // size
        return total

    threads, values = strides(width * x, x)
    thread, register = np.ogrid[:32, : registers * x]
    bit = walk(thread, threads) + walk(register, values)
    return bit // (width * x), bit % (width * x) // 32


TENSOR_MEMORY = """
    ld.param.b64 %rd1, [p0]; mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 32; mov.b32 %r2, memory;
    @%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r2], 128;
    bar.sync 0;
    ld.shared.b32 %r3, [memory]; shr.u32 %r4, %r1, 5; shl.b32 %r4, %r4, 21; add.s32 %r5, %r3, %r4;
    {fill}
    tcgen05.st.sync.aligned.32x32b.x128.b32 [%r5 + 0], {{{whole}}};
    tcgen05.wait::st.sync.aligned;
    tcgen05.ld.sync.aligned.{shape}.x{x}{pack}.b32 {{{parts}}}, [%r5 + {offset}];
    tcgen05.wait::ld.sync.aligned;
    mul.lo.s32 %r6, %r1, {row_bytes}; cvt.u64.u32 %rd2, %r6; add.s64 %rd3, %rd1, %rd2;
    {stores}
    bar.sync 0;
    @%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r3, 128;
"""


@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("x", [1, 4, 8])
@pytest.mark.parametrize("shape", CUTE)
def test_loads_of_tensor_memory(shape, x, packed):
    row, column = cells(shape, x)
    count, lower, first = row.shape[1], 0 if shape == "32x32b" else 16, 3
    whole, parts = ([f"%r{start + i}" for i in range(n)] for start, n in ((100, 128), (300, count)))
    body = TENSOR_MEMORY.format(
        fill="".join(f"mad.lo.s32 {name}, %r1, 1000, {i};" for i, name in enumerate(whole)),
        whole=",".join(whole), parts=",".join(parts), shape=shape, x=x,
        pack=".pack::16b" if packed else "", offset=(lower << 16) + first, row_bytes=4 * count,
        stores="".join(f"st.global.b32 [%rd3+{4 * i}], {name};" for i, name in enumerate(parts)),
    )  # fmt: skip
    out = torch.zeros(4, 32, count, dtype=torch.int32)
    if (column.max() + 1) * (1 + packed) + first > 128:
        pytest.skip("more columns than there are")
    assert not run(body, [out], registers=600)
    lane = 32 * np.arange(4)[:, None, None] + lower + row
    want = lane * 1000 + first + column * (1 + packed)
    if packed:
        want = want & 0xFFFF | (want + 1 & 0xFFFF) << 16
    np.testing.assert_array_equal(out.numpy().view(np.uint32), want.astype(np.uint32))


def test_elect():
    """The lowest lane of the mask leads."""
    body = """
        ld.param.b64 %rd0, [p0]; mov.u32 %r0, %tid.x;
        elect.sync %r1|%p1, 0xFFFFFFFF; selp.b32 %r2, 100, 0, %p1;
        elect.sync _|%p2, 0xFFFFFFF8; selp.b32 %r3, 1000, 0, %p2; add.s32 %r2, %r2, %r3;
        mul.wide.u32 %rd1, %r0, 4; add.s64 %rd2, %rd0, %rd1; st.global.b32 [%rd2], %r2;
    """
    out = torch.zeros(64, dtype=torch.int32)
    assert not run(body, [out], threads=64)
    want = torch.zeros(2, 32, dtype=torch.int32)
    want[:, 0], want[:, 3] = 100, 1000
    assert torch.equal(out.view(2, 32), want)
