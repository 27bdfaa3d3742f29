"""CUDA ops, compiled for the host with their bindings: the norm before the rotation and the append
into a cache, against float64 and under the sanitizers.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")  # the shapes of test_cuda_emulated.py also serve the Triton tests

from emulation import harness, ops

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the kernels themselves run on the GPU"
)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("emulated_ops")
    try:
        ops.build(folder)
    except harness.MissingTool as reason:
        pytest.skip(str(reason))
    return folder


def test_results_and_addresses(libraries):
    assert ops.run(libraries, harness.ADDRESS, "emulation.ops.cases:everything") == {}


def test_no_threads_meet(libraries):
    assert ops.run(libraries, harness.THREAD, "emulation.ops.cases:shared_memory") == {}
