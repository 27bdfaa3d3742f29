"""Products of matrices as Triton compiles them, executed, against float64."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
pytest.importorskip("triton.backends.nvidia")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# The instructions that a chip multiplies matrices with.
MULTIPLY = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


@triton.jit
def product_kernel(
    a, b, out, K,
    M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr,
    TRANSPOSED_A: tl.constexpr, TRANSPOSED_B: tl.constexpr, DOUBLED: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """out (M, N) = a (M, K) b (K, N) in one block; DOUBLED: 2 a, so that it comes from registers"""
    m, n = tl.arange(0, M), tl.arange(0, N)
    total = tl.zeros((M, N), tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        place_a = k[None, :] * M + m[:, None] if TRANSPOSED_A else m[:, None] * K + k[None, :]
        place_b = n[None, :] * K + k[:, None] if TRANSPOSED_B else k[:, None] * N + n[None, :]
        x, y = tl.load(a + place_a), tl.load(b + place_b)
        if DOUBLED:
            x = (x.to(tl.float32) * 2).to(x.dtype)
        total = tl.dot(x, y, total)
    tl.store(out + m[:, None] * N + n[None, :], total)


def multiply(
    m, n, k, block_k, dtype=BF16, *, transposed=(False, False), doubled=False, warps=4, stages=1
):
    """(result, float64 result) of random matrices; tf32 drops bits, so they have few."""
    generator = torch.Generator().manual_seed(0)
    a, b = (
        torch.randn(*shape, generator=generator).bfloat16().to(dtype) for shape in ((m, k), (k, n))
    )
    out = torch.full((m, n), torch.nan)
    given = [x.T.contiguous() if turned else x for x, turned in zip((a, b), transposed)]
    product_kernel[(1,)](
        *given, out, k, m, n, block_k, *transposed, doubled, stages, num_warps=warps
    )  # fmt: skip
    return out.double(), a.double() @ b.double() * (2 if doubled else 1)


def check(chip, *sizes, **options):
    from support.ptx import launch

    out, exact = multiply(*sizes, **options)
    assert (out - exact).abs().max() <= 2e-6 * exact.abs().max()
    executed = launch.LOG.instructions["product_kernel"]
    assert any(opcode.startswith(MULTIPLY[chip]) for opcode in executed), sorted(executed)


# The tiles of attention's kernels: rows of queries or keys, keys or dims, dims or keys.
@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [((64, 16, 64, 32), BF16), ((64, 64, 64, 64), FP32), ((128, 32, 64, 16), BF16)],
)
def test_tiles(chip, sizes, dtype):
    check(chip, *sizes, dtype)


@pytest.mark.parametrize("transposed", [(True, False), (False, True)])
def test_transposed(chip, transposed):
    check(chip, 64, 32, 64, 32, transposed=transposed)


def test_pipelined(chip):
    check(chip, 64, 64, 192, 32, stages=3)


def test_two_warpgroups(chip):
    check(chip, 128, 64, 64, 32, warps=8)


def test_operand_in_registers(chip):
    check(chip, 64, 64, 128, 64, doubled=True, stages=2)


@pytest.mark.thorough
@pytest.mark.parametrize("m", [64, 128, 256])
@pytest.mark.parametrize("n", [16, 64, 128, 256])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
def test_all_tiles(chip, m, n, dtype):
    check(chip, m, n, 64, 32, dtype, warps=8 if m * n > 128 * 128 else 4)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
def test_both_transposed(chip, dtype):
    check(chip, 64, 32, 64, 32, dtype, transposed=(True, True))


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("transposed", [(False, False), (False, True), (True, True)])
def test_fp8(chip, dtype, transposed):
    if chip == 80:
        pytest.skip("sm_80 has no products of 8 bits")
    check(chip, 64, 32, 64, 32, dtype, transposed=transposed)
    check(chip, 128, 64, 128, 64, dtype, transposed=transposed, stages=2)
