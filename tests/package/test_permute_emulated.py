"""The CUDA permutation, compiled for the host: its results, and what the sanitizers say of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")  # the shapes of test_cuda_emulated.py also serve the Triton tests

from emulation import harness
from emulation.cases import contiguous, expanded, gapped, qk, short, transposed, with_gaps
from rope_oracle import BITS

from extrope_kernels import head_permutations
from extrope_kernels.ops.permute.power import Power
from extrope_kernels.ops.permute.reference import source_dims
from extrope_kernels.testing import DTYPES

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the kernels themselves run on the GPU"
)


class Case:
    """One launch into outputs with gaps, and the gather that it must equal."""

    def __init__(self, name, inputs, gap=8, permutations=None, **by) -> None:
        if permutations is None:
            permutations = head_permutations(inputs[-1].shape[2], inputs[0].shape[3])
        fields = {"positions": None, "positions_are_offsets": False, "offset": 0}
        fields |= {"cu_seqlens": None, "inverse": False}
        self.name, self.inputs, self.power = name, inputs, Power(permutations, **(fields | by))
        self.outputs = [with_gaps(tuple(x.shape), x.dtype, gap) for x in inputs]

    def job(self) -> harness.Job:
        return harness.permute_job(self.name, self.inputs, self.outputs, self.power)

    def check(self) -> None:
        dims = source_dims(self.power, self.inputs[0].shape[1])
        for x, out in zip(self.inputs, self.outputs, strict=True):
            bits = BITS[x.itemsize]
            of_heads = dims.repeat_interleave(x.shape[2] // dims.shape[2], 2).expand(x.shape)
            assert torch.equal(out.view(bits), x.gather(-1, of_heads).view(bits)), self.name
            # What lies between the rows is still NaN.
            storage = torch.empty(0, dtype=x.dtype).set_(out.untyped_storage()).clone()
            storage.as_strided(out.shape, out.stride(), out.storage_offset()).fill_(torch.nan)
            assert storage.isnan().all(), f"{self.name}: wrote between the rows of its output"


def cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for dim in (7, 72, 128):
            x = qk(heads=(6, 2), dim=dim, dtype=dtype)
            yield Case(f"{short(dtype)}-{dim}", x, offset=1000, inverse=dim == 72)
    layouts = {"gap3": (gapped, {"gap": 3}), "transposed": (transposed, {})}
    layouts |= {"misaligned": (gapped, {"gap": 8, "start": 1}), "expanded": (expanded, {})}
    for name, (make, options) in layouts.items():
        yield Case(name, qk(make, dtype=torch.bfloat16, **options), gap=16)
    yield Case("odd-output", qk(dim=64), gap=1)
    yield Case("long", qk(heads=(4, 2), batch=3, seqlen=37, dim=64, dtype=torch.float16))
    yield Case("one-dim", qk(heads=(1,), dim=1))
    yield Case("wide", qk(heads=(1,), batch=1, seqlen=3, dim=1024), offset=10**6)
    yield Case("many-heads", qk(heads=(11,), dim=8), permutations=head_permutations(1, 8))
    far = torch.tensor([[2**63 - 1, -(2**63), 2**40, -(2**40), -1]] * 2)
    for inverse in (False, True):
        yield Case(f"far-{inverse}", qk(heads=(2, 1)), positions=far, inverse=inverse)
    near = torch.randint(-999, 999, (1, 5), dtype=torch.int32)
    yield Case("int32", qk(), positions=near, offset=-(2**33))
    starts = torch.tensor((0, 0, 3, 3, 7, 11, 11), dtype=torch.int32)
    x, offsets = qk(batch=1, seqlen=11), torch.randint(0, 10**9, (6,))
    yield Case("packed", x, cu_seqlens=starts, offset=2)
    yield Case(
        "packed-offsets", x, cu_seqlens=starts, positions=offsets, positions_are_offsets=True
    )


@pytest.mark.parametrize(
    "sanitizer", (harness.ADDRESS, harness.THREAD), ids=lambda sanitizer: sanitizer.name
)
def test_results_and_sanitizers(sanitizer, modules):
    torch.manual_seed(0)
    ran = list(cases())
    harness.run([one.job() for one in ran], sanitizer, modules)
    for one in ran:
        one.check()


@pytest.mark.parametrize("given", ("zeros", "tails", "outside"))
def test_no_permutations_lead_out_of_bounds(given, modules):
    rows = {
        "zeros": torch.zeros(1, 64, dtype=torch.int64),
        "tails": torch.arange(64).sub(1).clamp(0)[None].contiguous(),
        "outside": torch.randint(-(2**62), 2**62, (1, 64)),
    }[given]
    for offset in (3, 2**62):
        one = Case(given, qk(), permutations=rows, offset=offset)
        harness.run([one.job()], harness.ADDRESS, modules)
        for x, out in zip(one.inputs, one.outputs, strict=True):
            assert torch.isin(out, x).all()


def test_a_token_too_many_is_caught(modules):
    job = Case("too-many", qk(contiguous, batch=1), gap=0).job()
    job.request["params"]["seqlen"] += 1
    with pytest.raises(harness.SanitizerError, match="heap-buffer-overflow"):
        harness.run([job], harness.ADDRESS, modules)


def test_two_blocks_that_write_one_row_are_caught(modules):
    job = Case("race", qk(heads=(1,), seqlen=64)).job()
    job.request["tensors"][0]["out_seq"] = 0
    with pytest.raises(harness.SanitizerError, match="data race"):
        harness.run([job], harness.THREAD, modules)
