"""Attention over a key/value cache against its definition in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from decode_oracle import Case, check, exact, index, make, same_dtype, stored_position, turn

from extrope_kernels import methods
from extrope_kernels.ops.attention.kvcache import rerope_attention_with_kvcache
from extrope_kernels.testing import assert_within_budget, device

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FRAMES = (
    (math.inf, False), (1.0, False), (4.0, False), (16.0, False), (1 / 16, False),
    (1.0, True), (3.0, True),
)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor, grouped", FRAMES)
@pytest.mark.parametrize("window", (3, 9))
def test_one_token(window, factor, grouped, dtype, backend):
    case = Case((29, 1, 7), window=window, factor=factor, grouped=grouped, dtype=dtype)
    check(case, backend)


@pytest.mark.parametrize("factor, grouped", FRAMES)
def test_reference_in_float64(factor, grouped):
    lengths = (29, 1, 7, 0)
    for seqlen_q in (1, 5):
        case = Case(
            lengths, seqlen_q, window=6, factor=factor, grouped=grouped, dtype=torch.float64
        )
        check(case, "reference")


# Shapes


@pytest.mark.parametrize("window", (1, 2, 7, 66, 67, 68, 1000))
@pytest.mark.parametrize("factor", (math.inf, 4.0))
def test_windows_about_the_length(window, factor, backend):
    check(Case((67,), window=window, factor=factor), backend)


@pytest.mark.parametrize("length", (1, 2, 15, 16, 17, 63, 64, 65, 127, 129, 255, 256, 257))
def test_lengths_about_tiles_and_parts(length, backend):
    check(Case((length,), window=31, dtype=torch.float16), backend)


@pytest.mark.parametrize("heads_q, heads_k", ((1, 1), (2, 1), (3, 1), (6, 2), (7, 7), (24, 2)))
def test_groups(heads_q, heads_k, backend):
    check(Case((41, 19), heads_q=heads_q, heads_k=heads_k), backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", (False, True), ids=("halves", "interleaved"))
@pytest.mark.parametrize(
    "head_dim, rotary_dim",
    ((8, 8), (16, 2), (24, 24), (40, 6), (64, 64), (80, 32), (96, 96), (128, 128), (256, 64)),
)
def test_lanes(head_dim, rotary_dim, interleaved, dtype, backend):
    case = Case((21, 6), head_dim=head_dim, rotary_dim=rotary_dim, interleaved=interleaved)
    check(replace(case, dtype=dtype, factor=4.0), backend)


@pytest.mark.parametrize("seqlen_q", (2, 3, 16, 37))
@pytest.mark.parametrize("factor, grouped", FRAMES)
def test_several_tokens(factor, grouped, seqlen_q, backend):
    """Some sequences are shorter than seqlen_q: their first rows see no key; one is empty."""
    case = Case((37, 5, 0, 40), seqlen_q, window=12, factor=factor, grouped=grouped)
    check(case, backend)


def test_several_tiles_of_rows_and_parts_of_keys(backend):
    check(Case((300,), 40, heads_q=4, heads_k=1, window=50, factor=3.0, grouped=False), backend)


@pytest.mark.parametrize("page_size", (1, 16, 21))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pages_in_any_order(page_size, dtype, backend):
    check(Case((70, 9, 33), page_size=page_size, dtype=dtype, window=20), backend)
    case = Case((70, 9), 4, page_size=page_size, dtype=dtype, window=20, factor=4.0)
    check(replace(case, leftpad=(3, 25)), backend)


@pytest.mark.parametrize("seqlen_q", (1, 6))
def test_left_padding(seqlen_q, backend):
    case = Case((30, 3, 0), seqlen_q, leftpad=(0, 27, 30), factor=3.0, grouped=True, window=9)
    check(case, backend)


def test_scales(backend):
    case = Case((90, 8), 3, log_n=16, softmax_scale=0.3, attention_factor=1.2, rotary_dim=24)
    check(case, backend)
    check(replace(case, freqs_per_sequence=True, factor=2.0), backend)


@pytest.mark.parametrize("layout", ("heads first", "fused", "gap"))
def test_strides(layout, backend):
    case = Case((45, 20), 2)
    inputs = make(case)

    def restride(x):
        if layout == "heads first":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "fused":  # q, k and v in one row
            return torch.cat((x, x + 1, x - 1), dim=2)[:, :, : x.shape[2]]
        return torch.cat((x, x), dim=3)[..., : x.shape[3]]

    strided = replace(
        inputs, **{n: restride(getattr(inputs, n)) for n in ("q", "k_cache", "v_cache")}
    )
    check(case, backend, strided)


def test_nothing_to_do(backend):
    for shape in ((0, 1, 4, 32), (2, 0, 4, 32)):
        cache = torch.zeros(shape[0], 3, 2, 32, device=device())
        q = torch.zeros(shape, device=device())
        out, lse = rerope_attention_with_kvcache(
            q, cache, cache, methods.rope(32).to(device()), cache_seqlens=0, window=4,
            return_lse=True, backend=backend,
        )  # fmt: skip
        assert out.shape == shape and lse.shape == (shape[0], 4, shape[1])


# Numbers


@pytest.mark.parametrize(
    "factor, grouped", ((math.inf, False), (1.0, False), (4.0, False), (8.0, True))
)
def test_a_million_positions_cost_no_accuracy(factor, grouped, backend):
    """Most pages are one page, whose values are 0: the output is that of the last 1000 keys."""
    if backend == "triton" and device() == "cpu":
        pytest.skip(
            "a million keys take the interpreter minutes; test_kvcache_triton.py has angles"
        )
    page_size, pages = 1000, 1001
    table = torch.zeros(1, pages, dtype=torch.int32, device=device())
    table[0, -1] = 1
    inputs = make(Case((page_size - 7,), heads_q=1, heads_k=1, head_dim=8, rotary_dim=8))
    k, v = (torch.randn(2, page_size, 1, 8, device=device()) for _ in range(2))
    v[0] = 0.0
    v[1] *= 1e3
    call = {**inputs.call, "window": 64, "factor": factor, "grouped": grouped}
    call |= {"block_table": table, "cache_seqlens": torch.full((1,), 1_000_993, dtype=torch.int32)}
    inputs = replace(inputs, k_cache=k, v_cache=v, call=call)
    out, lse = inputs.run(backend)
    want_out, want_lse = exact(inputs)
    assert (out.double() - want_out).abs().max() < 1e-5 * want_out.abs().max()
    assert (lse.double() - want_lse).abs().max() < 1e-5


@pytest.mark.parametrize("factor, grouped", FRAMES)
def test_prompt_chunks_and_single_steps_agree(factor, grouped, backend):
    """Through the cache in one call, in chunks and token by token: each as exact as the formula."""
    total, window = 23, 6
    inputs = make(
        Case((total, total), heads_q=2, heads_k=1, window=window, factor=factor, grouped=grouped)
    )
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(2, total, heads, 32, generator=generator).to(device()) for heads in (2, 1, 1)
    )
    j = torch.arange(total, dtype=torch.float64, device=device())
    for chunks in ([23], [9, 1, 13], [1] * 23):
        k_cache, v_cache = (torch.full_like(inputs.k_cache, torch.nan) for _ in range(2))
        done, outs = 0, []
        for size in chunks:
            now = slice(done, done + size)
            outs.append(
                rerope_attention_with_kvcache(
                    q[:, now], k_cache, v_cache, inputs.freqs, k=k[:, now], v=v[:, now],
                    cache_seqlens=done, window=window, factor=factor, grouped=grouped,
                    backend=backend,
                )
            )  # fmt: skip
            done += size
        stored = stored_position(j, factor, grouped)
        stored = turn(k, stored[:, None], inputs.freqs.inv_freq, False)
        assert (k_cache[:, :total].double() - stored).abs().max() < 1e-6
        assert torch.equal(v_cache[:, :total], v)
        assert k_cache[:, total:].isnan().all() and v_cache[:, total:].isnan().all()
        call = {**inputs.call, "cache_seqlens": torch.full((2,), total, dtype=torch.int32)}
        whole = replace(inputs, q=q, k_cache=k_cache, v_cache=v_cache, call=call)
        assert_within_budget("out", torch.cat(outs, 1), same_dtype(whole)[0], exact(whole)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", (False, True), ids=("halves", "interleaved"))
@pytest.mark.parametrize("factor, grouped", ((math.inf, False), (2.5, False), (3.0, True)))
def test_append_with_padding_and_pages(factor, grouped, interleaved, dtype, backend):
    """New keys go behind those of their sequence, wherever its pages are, and nowhere else."""
    case = Case((11, 4), page_size=5, leftpad=(2, 7), rotary_dim=24, dtype=dtype, window=6)
    case = replace(case, factor=factor, grouped=grouped, interleaved=interleaved)
    inputs = make(case)
    k, v = torch.randn(2, 3, 2, 32), torch.randn(2, 3, 2, 32)
    k, v = k.to(device(), dtype), v.to(device(), dtype)
    before = {"cache_seqlens": inputs.call["cache_seqlens"] - 3}
    slots = [index(inputs, b, range(end - 3, end)) for b, end in enumerate((13, 11))]
    k_cache, v_cache = inputs.k_cache.clone(), inputs.v_cache.clone()
    for where in slots:
        k_cache[where], v_cache[where] = torch.nan, torch.nan
    written = replace(inputs, q=inputs.q.expand(-1, 3, -1, -1), k_cache=k_cache, v_cache=v_cache)
    appending = replace(written, call={**inputs.call, **before, "k": k, "v": v})
    out, _ = appending.run(backend)
    for b, where in enumerate(slots):
        j = torch.arange(3, device=device()).double() + case.lengths[b] - 3
        stored = stored_position(j, factor, grouped)[:, None]
        want = turn(k[b], stored, inputs.freqs.inv_freq, interleaved)
        ulp = torch.finfo(dtype).eps * want.abs().max()
        assert (k_cache[where].double() - want).abs().max() <= ulp
        assert torch.equal(v_cache[where], v[b])
        k_cache[where], v_cache[where] = inputs.k_cache[where], inputs.v_cache[where]
    assert torch.equal(k_cache.nan_to_num(7.0), inputs.k_cache.nan_to_num(7.0))
    assert torch.equal(v_cache.nan_to_num(7.0), inputs.v_cache.nan_to_num(7.0))
    assert out.isfinite().all()


def test_same_bits_in_every_run_and_for_any_number_of_threads(backend):
    inputs = make(Case((700, 90), 2, window=100))
    first = inputs.run(backend)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        again = inputs.run(backend)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@pytest.mark.parametrize("capability", ("baseline", "avx2"))
def test_narrower_instruction_sets(capability, run_python):
    run_python(
        """
        import sys
        sys.path.insert(0, "tests/support")
        import torch
        from decode_oracle import Case, check
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for heads_q in (1, 2, 4):
                check(Case((70, 7), heads_q=heads_q, heads_k=1, window=40, dtype=dtype), "cpu")
            check(Case((70,), head_dim=40, rotary_dim=12, factor=4.0, interleaved=True), "cpu")
        """,
        EXTROPE_CPU_CAPABILITY=capability,
    )
