"""Compiled kernels that lost a fence, a wait or a barrier: each loss is found."""

from __future__ import annotations

import re

import pytest
import test_products

# By chip: what is removed, one place at a time.
REMOVED = {
    80: ("cp.async.wait_group", "bar.sync"),
    90: (
        "cp.async.wait_group", "bar.sync", "fence.proxy.async", "wgmma.fence",
        "wgmma.commit_group", "wgmma.wait_group",
    ),
    100: (
        "cp.async.wait_group", "bar.sync", "fence.proxy.async", "tcgen05.wait::st",
        "tcgen05.commit", "tcgen05.dealloc", "mbarrier.init",
    ),
}  # fmt: skip


def places(ptx: str, opcode: str) -> list[tuple[int, int]]:
    found = re.finditer(rf"(@!?%\w+ )?{re.escape(opcode)}[^;]*;", ptx)
    return [match.span() for match in found]


def run_without(chip, monkeypatch, place: tuple[int, int] | None = None) -> tuple[str, list[str]]:
    """(PTX, what was found) of a pipelined product whose PTX lacks what is at `place`."""
    from support.ptx import launch, mbarrier, plugin
    from support.ptx.memory import Fault

    if plugin.known_findings():
        pytest.skip("this Triton breaks kernels itself")
    whole, program_of = [], launch.program_of
    doubled = chip == 100  # an operand by way of registers, which there means tcgen05.st

    def program_without(ptx: str, name: str):
        whole.append(ptx)
        first, last = place or (0, 0)
        return program_of(ptx[:first] + ptx[last:], name)

    launch.LOG.clear()
    with monkeypatch.context() as patch:
        patch.setattr(launch, "program_of", program_without)
        patch.setattr(mbarrier, "IDLE", 20)
        try:
            out, exact = test_products.multiply(64, 64, 192, 32, stages=3, doubled=doubled)
        except Fault as fault:
            return whole[0], [f"fault: {fault}"]
    found = sorted(launch.LOG.findings)
    launch.LOG.clear()
    if not found and not (out - exact).abs().max() <= 1e-5 * exact.abs().max():
        found = ["wrong result"]
    return whole[0], found


@pytest.mark.thorough
def test_losses_are_found(chip, monkeypatch):
    ptx, found = run_without(chip, monkeypatch)
    assert not found
    for opcode in REMOVED[chip]:
        sites = places(ptx, opcode)
        assert any(run_without(chip, monkeypatch, place)[1] for place in sites), opcode


@pytest.mark.thorough
def test_losses_everywhere_are_found(chip, monkeypatch):
    """But for the few places that another wait or barrier covers."""
    ptx, _ = run_without(chip, monkeypatch)
    lost = [place for opcode in REMOVED[chip] for place in places(ptx, opcode)]
    quiet = [place for place in lost if not run_without(chip, monkeypatch, place)[1]]
    assert len(quiet) <= len(lost) / 3
