"""The merge by the CPU library: threads, large results, and what runs without it."""

import pytest
import torch
from test_merge_kernels import B16, F16, F32, F64, some_sets

from extrope_kernels import _ext, merge_attention

needs_library = pytest.mark.skipif(_ext.load("cpu") is not None, reason="about the CPU library")


@needs_library
def test_threads_change_no_bit():
    """Shares end amid blocks of tokens, and cut sequences."""
    for dtype in (F32, B16, F64):
        outs, lses = some_sets(3, (3, 701, 4, 72), dtype)
        threads, found = torch.get_num_threads(), []
        try:
            for count in (1, 2, 3, 5):
                torch.set_num_threads(count)
                into = [outs[0].clone().float(), lses[0].clone()] if dtype != F64 else []
                found.append([*torch.ops.extrope.merge_fwd(outs, lses), *into])
                if into:
                    torch.ops.extrope.merge_inplace(*into, outs[1:], lses[1:])
        finally:
            torch.set_num_threads(threads)
        for some in found[1:]:
            assert all(
                torch.equal(x.nan_to_num(9), y.nan_to_num(9)) for x, y in zip(some, found[0])
            )


@needs_library
@pytest.mark.parametrize("head_dim", [128, 112, 100])
@pytest.mark.parametrize(("dtype", "seqlen"), [(F32, 2100), (B16, 4200), (F16, 4200)])
def test_a_large_result_is_that_of_its_parts(dtype, seqlen, head_dim):
    """One that is written past the caches, where its rows are whole lines."""
    outs, lses = some_sets(2, (1, seqlen, 32, head_dim), dtype)
    out, lse = merge_attention(outs, lses)
    assert out.nbytes > 24 << 20
    for rows in (slice(0, 800), slice(800, seqlen)):
        part = merge_attention([x[:, rows] for x in outs], [x[..., rows] for x in lses])
        assert torch.equal(lse[..., rows], part[1])
        assert torch.equal(out[:, rows], part[0])


@pytest.mark.usefixtures("no_library")
def test_runs_without_a_library(run_python):
    run_python(
        """
        import torch, extrope_kernels as ek
        outs, lses = [torch.randn(2, 5, 3, 8) for _ in "ab"], [torch.randn(2, 3, 5) for _ in "ab"]
        out, lse = ek.merge_attention(outs, lses)
        given = [x.clone() for x in outs], [x.clone() for x in lses]
        found = ek.merge_attention(*given, inplace=True)
        for x, y in zip((out, lse), found):
            torch.testing.assert_close(x, y)
        """,
        EXTROPE_JIT="0",
        EXTROPE_CACHE_DIR="/nonexistent",
    )
