"""Races, missing waits and accesses out of bounds are found; written in PTX, without Triton."""

import contextlib

import pytest
import torch
from raw_ptx import run
from support.ptx.memory import Fault

BARRIER = "bar.sync 0;"
# Every thread stores, loads what another one stored, and stores again.
EXCHANGE = """
    ld.param.b64 %rd0, [p0]; ld.param.b64 %rd1, [p1];
    mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; {which}
    shl.b32 %r2, %r1, 9; shl.b32 %r3, %r0, 2; add.s32 %r4, %r2, %r3; xor.b32 %r5, %r3, 508;
    add.s32 %r5, %r5, %r2; cvt.u64.u32 %rd2, %r4; add.s64 %rd3, %rd0, %rd2;
    cvt.u64.u32 %rd4, %r5; add.s64 %rd5, %rd0, %rd4; add.s64 %rd6, %rd1, %rd2;
    add.s32 %r7, %r0, 5; st.global.b32 [%rd3], %r7; {first} ld.global.b32 %r6, [%rd5];
    st.global.b32 [%rd6], %r6; {second} mul.lo.s32 %r8, %r6, 3; st.global.b32 [%rd3], %r8;
"""
LOADS = "loads from global memory what another thread stored in this launch"
OVERWRITES = "overwrites in global memory what another thread loaded in this launch"


def exchange(first=BARRIER, second=BARRIER, blocks=1, which=""):
    tensors = torch.zeros(256, dtype=torch.int32), torch.zeros(256, dtype=torch.int32)
    body = EXCHANGE.format(first=first, second=second, which=which)
    return run(body, tensors, blocks=blocks), tensors[1]


def test_barriers_order_global_memory():
    found, out = exchange(blocks=2)
    assert not found
    assert torch.equal(out, torch.arange(128, dtype=torch.int32).flip(0).repeat(2) + 5)


def test_missing_barriers_are_races_in_global_memory():
    assert LOADS in exchange(first="")[0]
    assert OVERWRITES in exchange(second="")[0]


def test_barriers_do_not_order_blocks():
    found, _ = exchange(blocks=2, which="mov.u32 %r1, 0;")
    assert LOADS in found


# Every thread stores, thread 0 counts its block, and the block that is last loads what all stored.
LAST_BLOCK = """
    ld.param.b64 %rd0, [p0]; ld.param.b64 %rd1, [p1]; ld.param.b64 %rd7, [p2];
    mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; mov.b32 %r9, memory; setp.eq.s32 %p0, %r0, 0;
    shl.b32 %r2, %r1, 9; shl.b32 %r3, %r0, 2; add.s32 %r4, %r2, %r3;
    cvt.u64.u32 %rd2, %r4; add.s64 %rd3, %rd0, %rd2; cvt.u64.u32 %rd4, %r3;
    st.global.b32 [%rd3], %r4; {before}
    @%p0 atom.global.gpu.{order}.add.u32 %r5, [%rd7], 1;
    @%p0 st.shared.b32 [%r9], %r5; bar.sync 0; ld.shared.b32 %r6, [%r9];
    setp.eq.s32 %p1, %r6, {blocks};
    @%p1 bra DONE;
    add.s64 %rd5, %rd0, %rd4; ld.global.b32 %r7, [%rd5]; ld.global.b32 %r8, [%rd5+512];
    add.s32 %r8, %r7, %r8; add.s64 %rd6, %rd1, %rd4; st.global.b32 [%rd6], %r8;
    DONE:
"""


def count_blocks(before=BARRIER, order="acq_rel", last=0, seed=0):
    """`last`: how many blocks came before the one that does not load."""
    tensors = [torch.zeros(n, dtype=torch.int32) for n in (256, 128, 1)]
    body = LAST_BLOCK.format(before=before, order=order, blocks=last)
    found = run(body, tensors, blocks=2, seed=seed)
    assert tensors[2] == 2
    return found, tensors[1]


@pytest.mark.parametrize("seed", range(3))
def test_counted_blocks_see_one_another(seed):
    found, out = count_blocks(seed=seed)
    assert not found
    assert torch.equal(out, torch.arange(128, dtype=torch.int32) * 8 + 512)


@pytest.mark.parametrize("change", [{"before": ""}, {"order": "relaxed"}, {"last": 1}])
def test_what_a_count_does_not_order(change):
    """No barrier before it, no order of memory, or not the last that counts but the first."""
    assert LOADS in count_blocks(**change)[0]


# Every thread of 64 hands a number to its neighbour in the other warp, through shared memory.
NEIGHBOURS = """
    ld.param.b64 %rd0, [p0]; mov.u32 %r0, %tid.x; mov.b32 %r1, memory; shl.b32 %r2, %r0, 2;
    add.s32 %r3, %r1, %r2; xor.b32 %r4, %r2, 128; add.s32 %r5, %r1, %r4;
    st.shared.b32 [%r3], %r0; {barrier} ld.shared.b32 %r6, [%r5];
    cvt.u64.u32 %rd1, %r2; add.s64 %rd2, %rd0, %rd1; st.global.b32 [%rd2+{offset}], %r6;
"""


def test_races_in_shared_memory():
    out = torch.zeros(64, dtype=torch.int32)
    assert not run(NEIGHBOURS.format(barrier=BARRIER, offset=0), [out], threads=64)
    assert torch.equal(out, torch.arange(64, dtype=torch.int32) ^ 32)
    found = [
        run(NEIGHBOURS.format(barrier="", offset=0), [out], threads=64, seed=i) for i in range(3)
    ]
    assert all(any(kind.startswith("race: ") for kind in kinds) for kinds in found)


@pytest.mark.parametrize(
    "offset, words", [(4, "out of bounds: 4 bytes at offset 256"), (2, "misaligned access of 4")]
)
def test_bounds_and_alignment_of_global_memory(offset, words):
    with pytest.raises(Fault, match=words):
        run(NEIGHBOURS.format(barrier=BARRIER, offset=offset), [torch.zeros(64)], threads=64)


def test_rows_of_a_strided_tensor_are_its_bounds():
    body = NEIGHBOURS.format(barrier=BARRIER, offset=0)
    with pytest.raises(Fault, match="out of bounds"):
        run(body, [torch.zeros(16, 8)[:, :4]], threads=64)


def test_bounds_of_shared_memory():
    with pytest.raises(Fault, match="out of bounds of 128 bytes of shared memory"):
        run(NEIGHBOURS.format(barrier=BARRIER, offset=0), [torch.zeros(64)], threads=64, shared=128)


COPY = """
    ld.param.b64 %rd0, [p0]; ld.param.b64 %rd1, [p1]; mov.u32 %r0, %tid.x; mov.b32 %r1, memory;
    shl.b32 %r2, %r0, 4; add.s32 %r3, %r1, %r2; mul.wide.u32 %rd2, %r0, 16;
    add.s64 %rd3, %rd0, %rd2; add.s64 %rd4, %rd1, %rd2;
    cp.async.cg.shared.global [%r3], [%rd3], 16; cp.async.commit_group; {wait}
    ld.shared.v4.b32 {{%r4,%r5,%r6,%r7}}, [%r3]; st.global.v4.b32 [%rd4], {{%r4,%r5,%r6,%r7}};
    cp.async.wait_all;
"""


@pytest.mark.parametrize("wait, early", [("0", False), ("1", True), (None, True)])
def test_copies_that_nobody_waited_for(wait, early):
    source, out = torch.arange(128.0), torch.zeros(128)
    body = COPY.format(wait="" if wait is None else f"cp.async.wait_group {wait};")
    found = run(body, [source, out], threads=32)
    assert found == (["loads what cp.async may still be fetching"] if early else [])
    assert torch.equal(out, source) != early


# Warp 1 stores and arrives at an mbarrier, warp 0 waits for it and loads.
PRODUCER = """
    ld.param.b64 %rd0, [p0]; mov.u32 %r0, %tid.x; mov.b32 %r1, memory; setp.eq.s32 %p0, %r0, 0;
    @%p0 mbarrier.init.shared::cta.b64 [%r1], {count};
    {barrier}
    shr.u32 %r2, %r0, 5; and.b32 %r3, %r0, 31; shl.b32 %r4, %r3, 2; add.s32 %r5, %r1, %r4;
    setp.eq.s32 %p1, %r2, 1;
    @!%p1 bra CONSUMER;
    mul.lo.s32 %r7, %r0, 3; st.shared.b32 [%r5+128], %r7; {arrive}
    bra DONE;
    CONSUMER:
    setp.ne.s32 %p2, %r2, 0;
    @%p2 bra DONE;
    LOOP:
    {wait}
    @!%p3 bra LOOP;
    ld.shared.b32 %r8, [%r5+128]; mul.wide.u32 %rd1, %r3, 4; add.s64 %rd2, %rd0, %rd1;
    st.global.b32 [%rd2], %r8;
    DONE:
    bar.sync 0;
    @%p0 mbarrier.inval.shared::cta.b64 [%r1];
"""
AS_IT_IS = {
    "count": 32,
    "barrier": BARRIER,
    "arrive": "mbarrier.arrive.shared::cta.b64 _, [%r1];",
    "wait": "mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r1], 0;",
}
EXPECT = "mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 %rd9, [%r1], 4;"
COMPLETE = " mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%r1], 4;"
TOKEN = """mbarrier.arrive.shared::cta.b64 %rd8, [%r1];
    AGAIN: mbarrier.test_wait.shared::cta.b64 %p4, [%r1], %rd8; @!%p4 bra AGAIN;"""


@pytest.mark.parametrize("arrive", [AS_IT_IS["arrive"], EXPECT + COMPLETE, TOKEN])
@pytest.mark.parametrize("seed", range(3))
def test_mbarriers_order(arrive, seed):
    out = torch.zeros(32, dtype=torch.int32)
    assert not run(PRODUCER.format(**{**AS_IT_IS, "arrive": arrive}), [out], seed=seed)
    assert torch.equal(out, torch.arange(32, 64, dtype=torch.int32) * 3)


@pytest.mark.parametrize(
    "change",
    [
        {"barrier": ""},
        {"wait": "setp.eq.s32 %p3, %r0, %r0;"},
        {"wait": AS_IT_IS["wait"].replace("], 0;", "], 1;")},
        {"count": 33},
        {"arrive": EXPECT},
    ],
    ids=["no barrier", "no wait", "wrong parity", "too few arrivals", "bytes missing"],
)
def test_misused_mbarriers(change):
    out = torch.zeros(32, dtype=torch.int32)
    for seed in range(3):
        with contextlib.suppress(Fault):
            assert run(PRODUCER.format(**{**AS_IT_IS, **change}), [out], seed=seed)
