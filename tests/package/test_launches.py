"""How many kernels a call launches on a GPU, and what serving compiles: told without one.

Compiled for an H100, and launched through a driver that does nothing (bench/null_driver.py).
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton.backends.nvidia")

SETUP = """
    import sys; sys.path.insert(0, "bench")
    import null_driver
    import torch
    import extrope_kernels as ek
    from extrope_kernels import methods

    driver = null_driver.install()
    freqs = methods.rope(64)

    def launched(call):
        driver.launches.clear()
        call()
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
    assert launched(lambda: sum(x.sum() for x in out).backward()) == 1
    """
    run_on_chip(run_python, source)


def test_the_step_into_a_cache_is_one_launch(run_python):
    source = """
    q, k, v = (random(2, 1, heads, 64) for heads in (4, 2, 2))
    caches = [random(8, 16, 2, 64) for _ in "kv"]
    table = torch.arange(8, dtype=torch.int32).view(2, 4)
    weight = random(64)
    norm = {"q_norm_weight": weight, "k_norm_weight": weight, "backend": "triton"}
    for where in (
        {"cache_seqlens": 3, "block_table": table},
        {"slot_mapping": torch.tensor([[3], [-1]]), "cache_seqlens": 3},
    ):
        for _ in range(2):
            call = lambda: ek.rope_append_kvcache(q, k, v, *caches, freqs, **where, **norm)
            assert launched(call) == 1
    """
    run_on_chip(run_python, source)


def test_attention_is_two_launches_and_four_back(run_python):
    source = """
    q, k, v = (random(2, 40, heads, 64, requires_grad=True) for heads in (4, 2, 2))
    calls = {
        "rerope": lambda: ek.rerope_attention(q, k, v, freqs, window=16, backend="triton"),
        "dual": lambda: ek.dual_chunk_attention(
            q, k, v, freqs, chunk_size=16, local_window=4, backend="triton"
        ),
    }
    for call in calls.values():
        for _ in range(2):
            assert launched(call) == 2
            out = call()
            assert launched(lambda: out.backward(torch.ones_like(out))) <= 4
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
        return lambda: ek.rerope_attention_with_kvcache(
            q, *cache, freqs, window=16, cache_seqlens=lengths, k=k, v=k, block_table=table,
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


def test_amd_tiles_fit_its_shared_memory(run_python):
    """They compile for gfx942, and Triton would refuse to launch what takes more than 64 KiB."""
    source = """
    for heads_q, dtype in ((8, torch.bfloat16), (2, torch.float32)):
        q, k, v = (
            torch.randn(2, 40, heads, 64, dtype=dtype, requires_grad=True)
            for heads in (heads_q, 2, 2)
        )
        assert launched(lambda: ek.apply_rope_qk(q, k, freqs, backend="triton")) == 1
        out = ek.rerope_attention(q, k, v, freqs, window=16, backend="triton")
        assert launched(lambda: out.sum().backward()) == 4
        cache, token = torch.randn(2, 2, 1024, 2, 64, dtype=dtype), q.detach()[:, :1]
        lengths = torch.full((2,), 1000, dtype=torch.int32)
        new = {"k": k.detach()[:, :1], "v": v.detach()[:, :1], "cache_seqlens": lengths}
        step = lambda: ek.rerope_attention_with_kvcache(
            token, *cache, freqs, window=16, backend="triton", **new
        )
        assert launched(step) == 2
    """
    run_python(SETUP + source, TRITON_INTERPRET="0", EXTROPE_TRITON_CHIP="gfx942")


def test_another_amd_chip_is_refused(run_python):
    source = """
    q, k, v = (random(1, 8, heads, 64) for heads in (4, 2, 2))
    try:
        ek.rerope_attention(q, k, v, freqs, window=4, backend="triton")
    except NotImplementedError as error:
        assert "gfx90a" in str(error) and str(error).startswith(("attention: ", "rerope: "))
    else:
        raise AssertionError("launched")
    assert not driver.launches
    """
    source = SETUP.replace("null_driver.install()", 'null_driver.NullDriver("gfx942")') + source
    run_python(source, TRITON_INTERPRET="0", EXTROPE_TRITON_CHIP="gfx90a")
