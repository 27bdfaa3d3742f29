"""How many kernels a call launches on a GPU, and what serving compiles: told without one.

This file is a program too: with the names of its functions it runs them compiled for the chip of
EXTROPE_TRITON_CHIP, and launches through a driver that does nothing (bench/null_driver.py).
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
import traceback
from functools import partial
from pathlib import Path
from unittest import mock

import pytest

pytest.importorskip("triton.backends.nvidia")

import null_driver
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton import JITFunction

import extrope_kernels as ek
from extrope_kernels import methods, scores
from extrope_kernels.ops._torch import layouts
from extrope_kernels.ops.attention.triton.merge import merge_fwd, merge_inplace

ROOT = Path(__file__).parents[2]
FREQS = methods.rope(64)
# What PyTorch does to a tensor without a kernel of its own.
FREE = "empty empty_like empty_strided new_empty view reshape as_strided unflatten flatten"
FREE += " _unsafe_view _reshape_alias slice select unbind unsqueeze narrow expand transpose"
FREE += " detach to alias resolve_conj resolve_neg"
DRIVER: list[null_driver.NullDriver] = []  # of the program


def run(chip: str, *names: str) -> dict[str, str]:
    """What functions of this file raised in a process of their own, by name."""
    paths = (ROOT, ROOT / "bench", ROOT / "tests", os.environ.get("PYTHONPATH", ""))
    path = os.pathsep.join(map(str, paths))
    env = {**os.environ, "TRITON_INTERPRET": "0", "EXTROPE_TRITON_CHIP": chip, "PYTHONPATH": path}
    command = [sys.executable, __file__, *names]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def launched(function, *args, **options) -> int:
    """How many kernels a call launches; all of them are Triton's."""
    DRIVER[0].launches.clear()
    with torch.autograd.profiler.profile() as profile:  # torch.profiler imports sympy, say
        function(*args, **options)
    names = {event.name for event in profile.function_events if event.name.startswith("aten::")}
    assert names <= {f"aten::{name}" for name in FREE.split()}, names
    return len(DRIVER[0].launches)


def random(*shape: int, **options) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, **options)


def compiled() -> int:
    kernels = [x for x in gc.get_objects() if isinstance(x, JITFunction)]
    return sum(len(cache[0]) for x in kernels for cache in x.device_caches.values())


def rotation_is_one_launch():
    q, k = random(2, 40, 4, 64), random(2, 40, 2, 64)
    for options in ({}, {"positions": 7}, {"inplace": True}):
        for _ in range(2):
            assert launched(ek.apply_rope_qk, q, k, FREQS, backend="triton", **options) == 1
    leaves = [x.requires_grad_() for x in (q, k)]
    out = ek.apply_rope_qk(*leaves, FREQS, backend="triton")
    douts = [torch.ones_like(x) for x in out]
    assert launched(torch.autograd.grad, out, leaves, douts) == 1


def the_step_into_a_cache_is_one_launch():
    q, k, v = (random(2, 1, heads, 64) for heads in (4, 2, 2))
    caches = [random(8, 16, 2, 64) for _ in "kv"]
    table = torch.arange(8, dtype=torch.int32).view(2, 4)
    lengths = torch.full((2,), 3, dtype=torch.int32)
    for where in (
        {"cache_seqlens": lengths, "block_table": table},
        {"slot_mapping": torch.tensor([[3], [-1]]), "cache_seqlens": lengths},
    ):
        for _ in range(2):
            call = q, k, v, *caches, FREQS
            assert launched(ek.rope_append_kvcache, *call, **where, backend="triton") == 1


def attention_is_two_launches_and_four_back_of_any_length():
    """None compiles again, of tokens that are no multiple of 128 dims either: 1 key head, or 3.

    The first kernels are those of tests/ptx, which has compiled them.
    """
    for heads_q, heads_k, score in ((2, 1, scores.rerope(40)), (9, 3, None)):
        found = set()
        for seqlen in (512, 513, 530, 1024):
            heads = (heads_q, heads_k, heads_k)
            qkv = [random(2, seqlen, n, 64, requires_grad=True) for n in heads]
            ek.apply_rope_qk(*qkv[:2], FREQS, backend="triton")
            call = partial(ek.rope_attention, *qkv, FREQS, score, backend="triton")
            for _ in range(2):
                assert launched(call) == 2
                out = call()
                assert launched(torch.autograd.grad, out, qkv, torch.ones_like(out)) <= 4
            found.add(compiled())
        assert len(found) == 1, (heads_k, found)


def few_dims_compile():
    """A product takes 16 dims at least: rows of 8 are filled up."""
    q, k, v = (random(1, 512, heads, 8) for heads in (2, 1, 1))
    call = partial(ek.rope_attention, q, k, v, methods.rope(8), scores.rerope(40))
    assert launched(call, backend="triton") == 2


def no_stride_compiles_again():
    """Of a rotation, with norm or into a cache, whatever divides it."""
    weight, table = random(24), torch.arange(128, dtype=torch.int32).view(2, 64)
    norm = {"q_norm_weight": weight, "k_norm_weight": weight, "backend": "triton"}
    lengths, found = torch.zeros(2, dtype=torch.int32), set()
    for seqlen, heads in ((512, 1), (513, 2), (1000, 4)):  # views of so many heads
        q, k, v = (random(2, seqlen, heads, 24)[:, :, :1] for _ in "qkv")
        caches = [random(128, 16, heads, 24)[:, :, :1] for _ in "kv"]
        freqs, where = methods.rope(24), {"cache_seqlens": lengths, "block_table": table}
        ek.apply_rope_qk(q, k, freqs, backend="triton")
        ek.apply_rope_qk(q, k, freqs, **norm)
        ek.rope_append_kvcache(q, k, v, *caches, freqs, **where, backend="triton")
        found.add(compiled())
    assert len(found) == 1, found


def a_decode_step_is_two_launches_and_compiles_once():
    """Whatever the capacity, the width of the block table, the page size and the lengths are."""

    def step(paged, capacity, page_size, length):
        q, k = random(2, 1, 4, 64), random(2, 1, 2, 64)
        table, shape = None, (2, capacity)
        if paged:
            pages = capacity // page_size
            shape = (2 * pages, page_size)
            table = torch.arange(2 * pages, dtype=torch.int32).view(2, pages)
        cache = random(2, *shape, 2, 64)
        lengths = torch.full((2,), length, dtype=torch.int32)
        where = {"cache_seqlens": lengths, "block_table": table}
        options = {"k": k, "v": k, "backend": "triton", **where}
        score = scores.rerope(16)
        return partial(ek.rope_attention_with_kvcache, q, *cache, FREQS, score, **options)

    for paged in (False, True):
        assert launched(step(paged, 4096, 16, 100)) == 2
        before = compiled()
        assert before > 0
        shapes = ((4096, 16, 4000), (5000, 8, 1), (8192, 128, 8000), (3 * 1030, 10, 3))
        for capacity, page_size, length in shapes:
            for call in [step(paged, capacity, page_size, length)] * 2:
                assert launched(call) == 2
        assert compiled() == before


def requests_of_a_batch_are_two_launches():
    """A chunk beside single tokens, as an engine calls it; none of it compiles again."""
    cache = random(2, 8, 16, 2, 64)
    table = torch.arange(8, dtype=torch.int32).view(2, 4)
    found = set()
    for tokens, first in ((9, 8), (9, 1), (14, 13)):
        q, k = random(tokens, 4, 64), random(tokens, 2, 64)
        boundaries = torch.tensor([0, first, tokens], dtype=torch.int32)
        lengths = torch.tensor([first, 30], dtype=torch.int32)
        where = {"cache_seqlens": lengths, "block_table": table, "cu_seqlens_q": boundaries}
        options = {"k": k, "v": k, "backend": "triton", **where}
        score = scores.rerope(16)
        call = partial(ek.rope_attention_with_kvcache, q, *cache, FREQS, score, **options)
        assert launched(call) == 2
        found.add(compiled())
    assert len(found) == 1, found


def a_merge_is_one_launch():
    """Of any number of sets, in place too; no length compiles again, wherever it writes."""
    found = set()
    for batch, seqlen in ((2, 40), (2, 41), (1, 16), (3, 1), (2, 1000)):
        outs = [random(batch, seqlen, 4, 64) for _ in range(3)]
        lses = [torch.zeros(batch, 4, seqlen) for _ in range(3)]
        for sets in (1, 3):
            for _ in range(2):
                assert launched(merge_fwd, outs[:sets], lses[:sets]) == 1
        wide = torch.zeros(batch, seqlen + 8, 4, 64), torch.zeros(batch, 4, seqlen + 8)
        for first in (4, 5):  # 16 divides lse's address, or not
            views = [x.narrow(dim, first, seqlen) for x, dim in zip(wide, (1, 2))]
            assert launched(merge_inplace, *views, outs[1:2], lses[1:2]) == 1
        found.add(compiled())
    assert len(found) == 1, found


def calls_by_kernel():
    """Calls that launch every kernel, for tensors of the same addresses each time."""
    q, k, v = (random(2, 40, heads, 64) for heads in (4, 2, 2))
    weight, by = random(64), {"backend": "triton"}
    caches, lengths = random(2, 2, 80, 2, 64), torch.full((2,), 3, dtype=torch.int32)
    where = {"cache_seqlens": lengths, "k": k, "v": v, **by}
    leaves, score = [x.clone().requires_grad_() for x in (q, k, v)], scores.rerope(16)
    out, dout = ek.rope_attention(*leaves, FREQS, score, **by), random(2, 40, 4, 64)
    norm = ek.apply_rope_qk(
        *leaves[:2], FREQS, q_norm_weight=weight.requires_grad_(), k_norm_weight=weight, **by
    )
    again = {"retain_graph": True}
    outs, lses = [torch.zeros(2, 40, 4, 64) for _ in range(3)], [torch.zeros(2, 4, 40)] * 3
    return (
        partial(ek.apply_rope_qk, q, k, FREQS, **by),
        partial(ek.apply_rope_qk, q, k, FREQS, positions=2**40, **by),
        partial(ek.apply_rope_qk, q, k, FREQS, q_norm_weight=weight, k_norm_weight=weight, **by),
        partial(torch.autograd.grad, norm, [*leaves[:2], weight], [dout, dout[:, :, :2]], **again),
        partial(ek.rope_append_kvcache, q, k, v, *caches, FREQS, cache_seqlens=lengths, **by),
        partial(ek.rope_attention, q, k, v, FREQS, score, **by),
        partial(torch.autograd.grad, out, leaves, dout, **again),
        partial(ek.rope_attention_with_kvcache, q, *caches, FREQS, score, **where),
        partial(merge_fwd, outs, lses),
        partial(merge_inplace, outs[0], lses[0].clone(), outs[1:], lses[1:]),
    )


def ways(call) -> list[tuple[int, list]]:
    """A call after a fresh start, twice: launches that went Triton's way, and all launches."""
    driver, run, found = DRIVER[0], JITFunction.run, []
    layouts.forget()
    for _ in range(2):
        by_triton, driver.kept = [], []

        def counted(*args, **options):
            by_triton.append(1)  # noqa: B023
            return run(*args, **options)

        JITFunction.run, driver.keep = counted, True
        try:
            call()
        finally:
            JITFunction.run, driver.keep = run, False
        found.append((len(by_triton), driver.kept))
    return found


def the_second_launch_is_the_first_ones():
    """A kept kernel is given the arguments and the grid that Triton gave it."""

    def described(x):
        if isinstance(x, torch.Tensor):  # outputs have new addresses, divisible by 16 as well
            return x.shape, x.stride(), x.dtype, x.data_ptr() % 16
        return type(x), [described(y) for y in x] if type(x) is tuple else x

    for call in calls_by_kernel():
        (by_triton, first), (again, second) = ways(call)
        assert by_triton == len(first) == len(second) > 0 and again == 0, call
        for one, other in zip(first, second, strict=True):
            assert (one.name, one.grid, list(one.args)) == (
                other.name,
                other.grid,
                list(other.args),
            )
            for name in one.args:
                assert described(one[name]) == described(other[name]), (one.name, name)


def a_number_of_a_call_is_never_cut():
    """A kept kernel takes the largest offset, whatever the first one was."""
    q, k = (random(1, 40, n, 64, requires_grad=True) for n in (2, 1))
    weight = random(64, requires_grad=True)
    for norm in ({}, {"q_norm_weight": weight, "k_norm_weight": weight}):
        layouts.forget()
        DRIVER[0].kept, DRIVER[0].keep = [], True
        try:
            for offset in (7, 2**40):
                out = ek.apply_rope_qk(q, k, FREQS, positions=offset, **norm, backend="triton")
                torch.autograd.grad(out, q, [torch.ones_like(x) for x in out])
        finally:
            DRIVER[0].keep = False
        assert [x["offset"] for x in DRIVER[0].kept] == [7, 7, 2**40, 2**40]
        for launch in DRIVER[0].kept:
            for name, x in launch.args.items():
                if type(x) is int and launch.types[name] != "constexpr":
                    most = 2 ** (int(launch.types[name][1:]) - 1)
                    assert -most <= x < most, (launch.name, name, x, launch.types[name])


def an_unaligned_tensor_compiles_a_kernel_of_its_own():
    """Once. The kept kernel loads 16 bytes at a time: it must not run on such a tensor."""
    q, k, v = (random(1, 8, heads, 64) for heads in (2, 1, 1))
    odd = random(q.numel() + 1)[1:].view(q.shape)
    assert odd.data_ptr() % 16 and odd.stride() == q.stride()
    lses = [torch.zeros(1, 2, 8)] * 2
    for function in (
        lambda x: ek.apply_rope_qk(x, k, FREQS, backend="triton"),
        lambda x: ek.rope_attention(x, k, v, FREQS, backend="triton"),
        lambda x: merge_fwd([q, x], lses),  # of a tuple of tensors
    ):
        layouts.forget()
        function(q)
        found = [compiled()]
        for x in (q, odd, odd, q):
            function(x)
            found.append(compiled())
        aligned, again, *unaligned = found
        assert aligned == again < unaligned[0], found
        assert len(set(unaligned)) == 1, found


def a_kept_kernel_belongs_to_one_gpu():
    """Tensors of two, with one layout: each has the kernel loaded on it, and launches that one."""
    from support import triton_attention as by_triton

    from extrope_kernels.ops._math.triton import launch
    from extrope_kernels.ops.attention.call import AttentionCall
    from extrope_kernels.ops.rope.triton.rotation import rope_fwd

    driver, loaded, current = DRIVER[0], [], 0
    load = driver.utils.load_binary

    def loads(name, *others):  # a handle that tells the GPU
        loaded.append((name, others[-1]))
        return 1, loaded[-1], *load(name, *others)[2:]

    replaced = (
        mock.patch.object(driver.utils, "load_binary", loads),
        mock.patch.object(driver, "get_current_device", lambda: current),
        mock.patch.object(torch.cuda, "current_device", lambda: current),
        mock.patch.object(launch, "_chip", lambda index: 90),
        mock.patch.object(launch, "processors_of", lambda x: 132),
        mock.patch.object(FakeTensor, "data_ptr", lambda x: 0),
    )
    with FakeTensorMode(), contextlib.ExitStack() as stack:
        for each in replaced:
            stack.enter_context(each)
        for current in (0, 1, 0, 1):
            q, k = (torch.empty(1, 40, n, 64, device=f"cuda:{current}") for n in (4, 2))
            inv_freq = torch.empty(32, device=q.device)
            for run in (
                partial(rope_fwd, q, k, torch.empty(1, 1, 32, device=q.device)),
                partial(by_triton.forward, q, k, k, AttentionCall(inv_freq)),
            ):
                driver.handles.clear()
                run()
                assert driver.handles and {gpu for _, gpu in driver.handles} == {current}
    of_each = ["forward_kernel", "rotate_kernel", "rotate_kernel"]  # of q and k, and of k alone
    assert sorted(loaded) == sorted((name, gpu) for name in of_each for gpu in (0, 1))


CASES = (
    rotation_is_one_launch,
    the_step_into_a_cache_is_one_launch,
    attention_is_two_launches_and_four_back_of_any_length,
    few_dims_compile,
    no_stride_compiles_again,
    a_decode_step_is_two_launches_and_compiles_once,
    requests_of_a_batch_are_two_launches,
    a_merge_is_one_launch,
    the_second_launch_is_the_first_ones,
    a_number_of_a_call_is_never_cut,
    an_unaligned_tensor_compiles_a_kernel_of_its_own,
    a_kept_kernel_belongs_to_one_gpu,
)


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    return run("90", *(case.__name__ for case in CASES))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_launches(case, failures):
    assert case.__name__ not in failures, failures[case.__name__]


def main() -> None:
    from support.ptx.launch import leave_out_ptxas

    leave_out_ptxas()
    DRIVER.append(null_driver.install())
    failed = {}
    for name in sys.argv[1:]:
        try:
            globals()[name]()
        except Exception:
            failed[name] = traceback.format_exc()
    print(json.dumps(failed))


if __name__ == "__main__":
    main()
