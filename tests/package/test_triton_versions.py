"""The oldest Triton that is claimed compiles the audit's sample of every kernel, but for what it
has compiled already from the same sources: no GPU.
"""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton.backends.nvidia")

import triton_versions
from audit.entries import sample

OLDEST = triton_versions.CLAIMED[0]
FOLDER = triton_versions.ROOT / "build" / f"triton-{OLDEST}"
SAMPLE = [str(case) for case in sample() if not case.kernel.endswith("cuda")]

pytestmark = pytest.mark.skipif(
    not FOLDER.exists(), reason=f"{FOLDER.name} is missing: `make test` installs it"
)


@pytest.fixture(scope="module")
def found() -> dict:
    return triton_versions.compile_with(OLDEST, every=False)


def test_every_kernel_compiles(found):
    assert found["configurations"] == len(SAMPLE)
    assert not found["failed"]


def test_what_holds_stack_is_told(found):
    known = json.loads(triton_versions.RESULT.read_text())
    assert list(known) == sorted(triton_versions.CLAIMED)
    assert not any(one["failed"] for one in known.values())
    told = {case: size for case, size in known[OLDEST]["stack"].items() if case in SAMPLE}
    assert found["stack"] == told
    assert not triton_versions.too_much(found["stack"])


def test_a_tile_that_was_measured_may_hold_more(monkeypatch):
    most = triton_versions.MOST_STACK
    held = dict(zip(SAMPLE, (most, most + 1, 48, 49)))
    assert triton_versions.too_much(held) == SAMPLE[1:4]
    monkeypatch.setattr(triton_versions, "allowed_stack", lambda case: 48)
    assert triton_versions.too_much(held) == SAMPLE[3:4]
