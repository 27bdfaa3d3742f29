"""Large results on the CPU: the memory of a freed one serves the next, and never one that lives."""

import gc
import itertools
import threading

import pytest
import torch

from extrope_kernels import (
    _ext,
    apply_rope,
    apply_rope_qk,
    methods,
    rerope_attention,
)

pytestmark = pytest.mark.skipif(_ext.load("cpu") is not None, reason="about the CPU library")

FREQS = methods.rope(64)
LARGE = 4 << 20  # bytes: csrc/cpu/runtime/kept_pages.h


def rotated(seqlen=8192, dtype=torch.float32, fill=1.0):
    x = torch.full((1, seqlen, 4, 64), fill, dtype=dtype)
    return apply_rope(x, FREQS, backend="cpu")


@pytest.fixture(autouse=True)
def nothing_kept():
    gc.collect()
    torch.ops.extrope.cpu_release_memory()
    yield
    torch.ops.extrope.cpu_release_memory()


def test_a_freed_result_serves_the_next_of_its_size():
    first = rotated()
    where = first.data_ptr()
    expected = first.clone()
    del first
    second = rotated()
    assert second.data_ptr() == where
    assert torch.equal(second, expected)
    assert torch.ops.extrope.cpu_release_memory() == 0  # it is in use


def test_living_results_share_nothing():
    results = [rotated(fill=float(n)) for n in range(1, 5)]
    expected = [x.clone() for x in results]
    rotated(fill=9.0)
    for x, y in zip(results, expected):
        assert torch.equal(x, y)
    spans = sorted((x.data_ptr(), x.data_ptr() + x.nbytes) for x in results)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))


ALIASES = {
    "view": lambda x: x[:, 5:],
    "numpy": lambda x: x.numpy(),
    "dlpack": torch.from_dlpack,
}


@pytest.mark.parametrize("alias", ALIASES)
def test_memory_lives_as_long_as_anything_that_reads_it(alias):
    out = rotated()
    kept = ALIASES[alias](out)
    expected = torch.as_tensor(kept).clone()
    del out
    other = rotated(fill=7.0)
    assert torch.equal(torch.as_tensor(kept), expected)
    assert other.data_ptr() // 4096 != torch.as_tensor(kept).data_ptr() // 4096


def test_memory_lives_as_long_as_a_graph_that_saved_it():
    out, leaf = rotated(), torch.ones(1, requires_grad=True)
    expected = out.double().sum()
    loss = (out * leaf).sum()
    del out
    rotated(fill=7.0)
    (grad,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(grad.double().squeeze(), expected, rtol=1e-4, atol=0)


def test_small_results_are_mallocs():
    out = rotated(seqlen=LARGE // (4 * 64 * 4) - 1)
    assert out.nbytes < LARGE
    del out
    assert torch.ops.extrope.cpu_release_memory() == 0


@pytest.mark.parametrize("seqlen", (4096, 4097, 6151))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
def test_what_is_kept_is_the_result_in_whole_pages(seqlen, dtype):
    out = rotated(seqlen, dtype)
    size = out.nbytes
    del out
    kept = torch.ops.extrope.cpu_release_memory()
    assert kept == ((size + 4095) // 4096 * 4096 if size >= LARGE else 0)
    assert torch.ops.extrope.cpu_release_memory() == 0


def test_a_block_serves_results_down_to_four_fifths_of_it():
    sizes = {}
    for seqlen in (8192, 6560, 6500):
        torch.ops.extrope.cpu_release_memory()
        out = rotated(8192)
        where = out.data_ptr()
        del out
        out = rotated(seqlen)
        sizes[seqlen] = out.data_ptr() == where
        del out
    assert sizes == {8192: True, 6560: True, 6500: False}


def test_no_more_than_a_gibibyte_is_kept():
    results = [rotated(65536) for _ in range(18)]  # 64 MiB each
    del results
    assert torch.ops.extrope.cpu_release_memory() == 1 << 30


def test_every_operation_takes_part():
    q = torch.randn(1, 4096, 8, 64)
    calls = {
        "rope": lambda: apply_rope_qk(q, q, FREQS, backend="cpu"),
        "attention": lambda: rerope_attention(q, q, q, FREQS, window=8, backend="cpu"),
    }
    for name, call in calls.items():
        torch.ops.extrope.cpu_release_memory()
        call()
        assert torch.ops.extrope.cpu_release_memory() >= q.nbytes, name


VIEWS = {  # of x (2, 4096, 12, 64)
    "part of a projection": lambda x: x[:, :, 2:10],
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)[:, :, :8],
    "sequence first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)[..., :32],
    "one sequence": lambda x: x[1:, :, 2:10],
    "one head": lambda x: x[:, :, 3:4],
    "one token": lambda x: x[:, 5:6, 2:10],
    "one sequence in all": lambda x: x.flatten(0, 1).as_strided((1, 8192, 12, 64), (7, 768, 64, 1)),
    "expanded": lambda x: x[:, :1].expand(2, 4096, 12, 64),
}


@pytest.mark.parametrize("view", VIEWS)
def test_results_lie_like_empty_like_and_the_large_ones_in_kept_memory(view):
    x = VIEWS[view](torch.randn(2, 4096, 12, 64))
    out = apply_rope(x, methods.rope(x.shape[-1]), backend="cpu")
    assert out.stride() == torch.empty_like(x).stride()
    expected = apply_rope(x.contiguous(), methods.rope(x.shape[-1]), backend="cpu")
    assert torch.equal(out, expected)
    del expected
    torch.ops.extrope.cpu_release_memory()
    large = out.nbytes >= LARGE and view != "expanded"
    del out
    assert (torch.ops.extrope.cpu_release_memory() > 0) == large


def test_results_are_tensors_like_others():
    out = rotated()
    expected = out.clone()
    assert out.device == torch.device("cpu") and out.is_contiguous() and not out.is_inference()
    assert torch.equal(torch.as_tensor(out[0, 0].tolist()), expected[0, 0])
    out.share_memory_()
    assert out.is_shared() and torch.equal(out, expected)
    with torch.inference_mode():
        assert rotated().is_inference()


def test_threads_free_what_others_made():
    wrong = []

    def work(fill):
        for _ in range(20):
            out = rotated(fill=fill)
            if not torch.equal(out[0, 0], torch.full((4, 64), fill)):  # position 0 does not rotate
                wrong.append(fill)
            made.append(out)
            if len(made) > 3:
                made.pop(0)

    made = []
    threads = [threading.Thread(target=work, args=(float(n),)) for n in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
