"""How many kernels a call launches on a GPU, and what serving compiles: told without one.

Compiled for an H100, and launched through a driver that does nothing (bench/null_driver.py).
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton.backends.nvidia")

# Half a minute each.
AMD_HEAD_DIMS = (128, *(pytest.param(n, marks=pytest.mark.thorough) for n in (64, 256)))

SETUP = """
    import sys; sys.path.insert(0, "bench")
    import null_driver
    import torch
    import extrope_kernels as ek
    from extrope_kernels import methods, scores

    driver = null_driver.install()
    from extrope_kernels.ops.attention import checks
    checks._readable = lambda x: False  # the values of a GPU's tensors are not looked at
    freqs = methods.rope(64)

    # What PyTorch does to a tensor without a kernel of its own.
    FREE = "empty empty_like empty_strided new_empty view reshape as_strided unflatten flatten"
    FREE += " _unsafe_view _reshape_alias slice select unbind unsqueeze narrow expand transpose"
    FREE += " detach to alias resolve_conj resolve_neg"
    FREE = {f"aten::{name}" for name in FREE.split()}

    def launched(call, but=()):
        # Kernels of Triton's; none may be PyTorch's, but those.
        driver.launches.clear()
        with torch.autograd.profiler.profile() as profile:  # torch.profiler imports sympy, say
            call()
        events = profile.function_events
        other = {event.name for event in events if event.name.startswith("aten::")}
        assert other <= FREE | set(but), other - FREE
        return len(driver.launches)

    def random(*shape, **options):
        return torch.randn(shape, dtype=torch.bfloat16, **options)

    def compiled():
        from triton import JITFunction
        import gc
        kernels = [x for x in gc.get_objects() if isinstance(x, JITFunction)]
        return sum(len(cache[0]) for x in kernels for cache in x.device_caches.values())
"""


def run_on_chip(run_python, source: str) -> None:
    run_python(SETUP + source, TRITON_INTERPRET="0", EXTROPE_TRITON_CHIP="90")


def test_rotation_is_one_launch(run_python):
    source = """
    q, k = random(2, 40, 4, 64), random(2, 40, 2, 64)
    for options in ({}, {"positions": 7}, {"inplace": True}):
        for _ in range(2):
            assert launched(lambda: ek.apply_rope_qk(q, k, freqs, backend="triton", **options)) == 1
    leaves = [x.requires_grad_() for x in (q, k)]
    out = ek.apply_rope_qk(*leaves, freqs, backend="triton")
    douts = [torch.ones_like(x) for x in out]
    assert launched(lambda: torch.autograd.grad(out, leaves, douts)) == 1
    """
    run_on_chip(run_python, source)


def test_the_step_into_a_cache_is_one_launch(run_python):
    source = """
    q, k, v = (random(2, 1, heads, 64) for heads in (4, 2, 2))
    caches = [random(8, 16, 2, 64) for _ in "kv"]
    table = torch.arange(8, dtype=torch.int32).view(2, 4)
    weight = random(64)
    norm = {"q_norm_weight": weight, "k_norm_weight": weight, "backend": "triton"}
    lengths = torch.full((2,), 3, dtype=torch.int32)
    for where in (
        {"cache_seqlens": lengths, "block_table": table},
        {"slot_mapping": torch.tensor([[3], [-1]]), "cache_seqlens": lengths},
    ):
        for _ in range(2):
            call = lambda: ek.rope_append_kvcache(q, k, v, *caches, freqs, **where, **norm)
            assert launched(call) == 1
    """
    run_on_chip(run_python, source)


def test_attention_is_two_launches_and_four_back(run_python):
    source = """
    q, k, v = (random(2, 40, heads, 64, requires_grad=True) for heads in (4, 2, 2))
    for score in (None, scores.rerope(16), scores.dual_chunk(16, 4)):
        call = lambda: ek.rope_attention(q, k, v, freqs, score, backend="triton")
        for _ in range(2):
            assert launched(call) == 2
            out = call()
            dout = torch.ones_like(out)
            assert launched(lambda: torch.autograd.grad(out, (q, k, v), dout)) <= 4
    """
    run_on_chip(run_python, source)


def test_no_length_compiles_again(run_python):
    """Of sequences whose tokens are no multiple of 128 dims either: one key head, or three."""
    source = """
    for heads_q, heads_k in ((4, 1), (9, 3)):
        found = set()
        for seqlen in (512, 513, 530, 1024):
            q, k, v = (random(2, seqlen, n, 64, requires_grad=True)
                       for n in (heads_q, heads_k, heads_k))
            ek.apply_rope_qk(q, k, freqs, backend="triton")
            out = ek.rope_attention(q, k, v, freqs, scores.rerope(16), backend="triton")
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
            found.add(compiled())
        assert len(found) == 1, (heads_k, found)
    """
    run_on_chip(run_python, source)


@pytest.mark.parametrize("paged", [False, True])
def test_a_decode_step_is_two_launches_and_compiles_once(run_python, paged):
    """Whatever the capacity, the width of the block table, the page size and the lengths are."""
    source = f"""
    paged = {paged}
    def step(capacity, page_size, length):
        q, k = random(2, 1, 4, 64), random(2, 1, 2, 64)
        table, shape = None, (2, capacity)
        if paged:
            pages = capacity // page_size
            shape = (2 * pages, page_size)
            table = torch.arange(2 * pages, dtype=torch.int32).view(2, pages)
        cache = random(2, *shape, 2, 64)
        lengths = torch.full((2,), length, dtype=torch.int32)
        return lambda: ek.rope_attention_with_kvcache(
            q, *cache, freqs, scores.rerope(16), cache_seqlens=lengths, k=k, v=k, block_table=table,
            backend="triton",
        )

    assert launched(step(4096, 16, 100)) == 2
    before = compiled()
    assert before > 0
    shapes = ((4096, 16, 4000), (5000, 8, 1), (8192, 128, 8000), (3 * 1030, 10, 3))
    for capacity, page_size, length in shapes:
        for call in [step(capacity, page_size, length)] * 2:
            assert launched(call) == 2
    assert compiled() == before
    """
    run_on_chip(run_python, source)


def test_requests_of_a_batch_are_two_launches(run_python):
    """A chunk beside single tokens, as an engine calls it; none of it compiles again."""
    source = """
    cache = random(2, 8, 16, 2, 64)
    table = torch.arange(8, dtype=torch.int32).view(2, 4)
    found = set()
    for tokens, first in ((9, 8), (9, 1), (14, 13)):
        q, k = random(tokens, 4, 64), random(tokens, 2, 64)
        boundaries = torch.tensor([0, first, tokens], dtype=torch.int32)
        lengths = torch.tensor([first, 30], dtype=torch.int32)
        call = lambda: ek.rope_attention_with_kvcache(
            q, *cache, freqs, scores.rerope(16), cache_seqlens=lengths, k=k, v=k, block_table=table,
            cu_seqlens_q=boundaries, backend="triton",
        )
        assert launched(call) == 2
        found.add(compiled())
    assert len(found) == 1, found
    """
    run_on_chip(run_python, source)


def test_a_merge_is_one_launch(run_python):
    """Of any number of sets, in place too; no length compiles again."""
    source = """
    from extrope_kernels.ops.attention.triton import merge as kernels

    merge, found = kernels.merge_fwd, set()
    inplace = kernels.merge_inplace
    for batch, seqlen in ((2, 40), (2, 41), (1, 16), (3, 1), (2, 1000)):
        outs = [random(batch, seqlen, 4, 64) for _ in range(3)]
        lses = [torch.zeros(batch, 4, seqlen) for _ in range(3)]
        for sets in (1, 3):
            for _ in range(2):
                assert launched(lambda: merge(outs[:sets], lses[:sets])) == 1
        wide = [torch.zeros(batch, 2 * seqlen, 4, 64), torch.zeros(batch, 4, 2 * seqlen)]
        views = wide[0][:, seqlen:], wide[1][..., seqlen:]
        assert launched(lambda: inplace(*views, outs[1:2], lses[1:2])) == 1
        found.add(compiled())
    assert len(found) == 1, found
    """
    run_on_chip(run_python, source)


@pytest.mark.parametrize("head_dim", AMD_HEAD_DIMS)
def test_amd_tiles_fit_its_shared_memory(run_python, head_dim):
    """They compile for gfx942, and Triton would refuse to launch what takes more than 64 KiB."""
    source = f"""
    D, freqs = {head_dim}, methods.rope({head_dim})
    for heads_q, dtype in ((8, torch.bfloat16), (2, torch.float32)):
        q, k, v = (
            torch.randn(2, 40, heads, D, dtype=dtype, requires_grad=True)
            for heads in (heads_q, 2, 2)
        )
        assert launched(lambda: ek.apply_rope_qk(q, k, freqs, backend="triton")) == 1
        out = ek.rope_attention(q, k, v, freqs, scores.rerope(16), backend="triton")
        dout = torch.ones_like(out)
        assert launched(lambda: torch.autograd.grad(out, (q, k, v), dout)) == 4
        lengths = torch.full((2,), 1000, dtype=torch.int32)
        for tokens in (1, 40):
            for fp8 in (False, True):
                cache = torch.randn(2, 2, 1088, 2, D, dtype=dtype)
                scales = dict.fromkeys(("k_scale", "v_scale"), torch.ones(2)) if fp8 else {{}}
                cache = cache.to(torch.float8_e4m3fn) if fp8 else cache
                new = {{"k": k.detach()[:, :tokens], "v": v.detach()[:, :tokens]}}
                step = lambda: ek.rope_attention_with_kvcache(
                    q.detach()[:, :tokens], *cache, freqs, scores.rerope(16),
                    cache_seqlens=lengths, backend="triton", **new, **scales,
                )
                assert launched(step) <= 3
    """
    run_python(SETUP + source, TRITON_INTERPRET="0", EXTROPE_TRITON_CHIP="gfx942")


def test_another_amd_chip_is_refused(run_python):
    source = """
    q, k, v = (random(1, 8, heads, 64) for heads in (4, 2, 2))
    try:
        ek.rope_attention(q, k, v, freqs, scores.rerope(4), backend="triton")
    except NotImplementedError as error:
        assert "gfx90a" in str(error) and str(error).startswith(("attention: ", "rerope: "))
    else:
        raise AssertionError("launched")
    assert not driver.launches
    """
    source = SETUP.replace("null_driver.install()", 'null_driver.NullDriver("gfx942")') + source
    run_python(source, TRITON_INTERPRET="0", EXTROPE_TRITON_CHIP="gfx90a")
