"""Caches and rows of one memory: a call that writes refuses them, or reads before it writes."""

from __future__ import annotations

import pytest
import torch
from support.generated import randn

from extrope_kernels import methods, rope_append_kvcache, rope_attention_with_kvcache, scores
from extrope_kernels.ops._tables.checks import share_memory
from extrope_kernels.testing import device

DIM, SLOTS = 32, 12
FREQS = methods.rope(DIM).to(device())
NEW = randn(1, 2, 2, 2, DIM)


def buffer():
    return torch.zeros(4, SLOTS, 2, DIM, device=device())


def two_arrays():
    memory = buffer().cpu().numpy()
    return torch.from_numpy(memory[:2]), torch.from_numpy(memory[1:3])


def heads_of(order):
    memory = buffer()
    return memory[:2], memory.view(-1)[SLOTS * DIM :].as_strided((2, SLOTS, 2, DIM), order)


def between():
    memory = torch.zeros(2, SLOTS, 4, DIM, device=device())
    return memory[:, :, :2], memory[:, :, 1:].as_strided((2, SLOTS, 2, DIM), memory.stride(), DIM)


SHARED = {
    "one tensor": lambda: (buffer()[:2],) * 2,
    "two views": lambda: (buffer().clone().split((3, 1))[0][:2],) * 2,
    "views that overlap": lambda: (lambda x: (x[:2], x[1:3]))(buffer()),
    "heads that overlap": between,
    "other strides": lambda: heads_of((SLOTS * 2 * DIM, DIM, SLOTS * DIM, 1)),
    **({} if device() == "cuda" else {"two arrays": two_arrays}),
}
APART = {
    "halves": lambda: buffer().split(2),
    "in turn": lambda: (buffer()[::2], buffer()[1::2]),
    "beside each other": lambda: torch.zeros(2, SLOTS, 2, 2, DIM, device=device()).unbind(2),
    "heads between heads": lambda: torch.zeros(2, SLOTS, 2, 2, DIM, device=device()).unbind(3),
    "rows of one": lambda: torch.zeros(2, SLOTS, 2, 2 * DIM, device=device()).split(DIM, -1),
}


def attend(k_cache, v_cache, q, k, v, **options):
    call = {"k": k, "v": v, "cache_seqlens": 3, **options}
    return rope_attention_with_kvcache(q, k_cache, v_cache, FREQS, scores.rerope(4), **call)


def append(k_cache, v_cache, q, k, v, **options):
    return rope_append_kvcache(q, k, v, k_cache, v_cache, FREQS, cache_seqlens=3, **options)


@pytest.mark.parametrize("write", (attend, append))
@pytest.mark.parametrize("name", SHARED)
def test_caches_that_share_memory_are_refused(name, write, any_backend):
    caches = SHARED[name]()
    with pytest.raises(ValueError, match=r"k_cache and v_cache must be two tensors to be written"):
        write(*caches, NEW, NEW, NEW, backend=any_backend)
    assert not any(x.any() for x in caches)


@pytest.mark.parametrize("write", (attend, append))
@pytest.mark.parametrize("name", APART)
def test_caches_of_one_buffer_that_share_nothing_are_written(name, write, any_backend):
    caches = APART[name]()
    write(*caches, NEW, NEW, NEW, backend=any_backend)
    assert torch.equal(caches[1][:, 3:5], NEW) and caches[0].any(-1).sum() == NEW.any(-1).sum()


@pytest.mark.parametrize("write", (attend, append))
def test_a_graph_refuses_them_too(write, any_backend):
    def step(memory, k):
        write(memory[:2], memory[1:3], k, k, k, backend=any_backend)
        return memory + 1

    compiled = torch.compile(step, backend="aot_eager")
    with pytest.raises((RuntimeError, ValueError), match="k_cache and v_cache must be two tensors"):
        compiled(buffer(), NEW)


@pytest.mark.parametrize("read", range(3))
def test_rows_that_lie_in_slots_that_are_written(read, any_backend):
    """q, k or v: the reference reads them first, kernels refuse them."""
    caches = [randn(2 + n, 2, SLOTS, 2, DIM) for n in range(2)]
    new = [NEW, NEW, NEW]
    expected = attend(*(x.clone() for x in caches), *new[:read], caches[0][:, 4:6].clone(),
                      *new[read + 1 :], backend="reference")  # fmt: skip
    new[read] = caches[0][:, 4:6]
    if any_backend == "reference":
        assert torch.equal(attend(*caches, *new, backend="reference"), expected)
        return
    before = [x.clone() for x in caches]
    with pytest.raises(ValueError, match=f"{'qkv'[read]} must not share memory with k_cache"):
        attend(*caches, *new, backend=any_backend)
    assert all(torch.equal(x, y) for x, y in zip(caches, before))


@pytest.mark.parametrize("write", (attend, append))
def test_negative_views_are_refused_as_caches(write, fast_backend):
    complex_rows = torch.zeros(2, SLOTS, 2, DIM, device=device(), dtype=torch.complex64)
    cache = torch.zeros_like(complex_rows.real)
    negative = complex_rows.conj().imag.as_strided(cache.shape, cache.stride())
    assert negative.is_neg()
    with pytest.raises(ValueError, match=r"must write to no negative view"):
        write(cache, negative, NEW, NEW, NEW, backend=fast_backend)
    assert not cache.any() and not complex_rows.any()


def test_bytes_of_tensors():
    """Against the addresses of all elements."""
    generator = torch.Generator().manual_seed(0)
    memory = torch.zeros(400)

    def draw():
        shape = torch.randint(1, 4, (3,), generator=generator).tolist()
        strides = torch.randint(0, 9, (3,), generator=generator).tolist()
        return memory.as_strided(shape, strides, int(torch.randint(40, (), generator=generator)))

    for _ in range(500):
        x, y = draw(), draw()
        places = [set((t.storage_offset() + sum(s * i for s, i in zip(t.stride(), at)))
                      for at in torch.cartesian_prod(*(torch.arange(n) for n in t.shape)).tolist())
                  for t in (x, y)]  # fmt: skip
        assert share_memory(x, y) == bool(places[0] & places[1]), (x.stride(), y.stride())
