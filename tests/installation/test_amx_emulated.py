"""The CPU kernels for AMX on a processor without it: their tile registers are emulated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.builds import copy_compiled

from extrope_kernels import _build, _ext, cli

AMX = cli.CPU_CAPABILITIES.index("AMX")


@pytest.mark.thorough
def test_kernels_for_amx(run_python, tmp_path):
    """Attention in bf16; by nobody else's tests do the kernels run here."""
    assert _ext.load("cpu") is None
    if torch.ops.extrope.cpu_capability() == AMX:
        pytest.skip("the processor has AMX: all tests of bf16 run on it")
    if "avx512_bf16" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("the kernels for AMX use AVX512_BF16 too")
    copy_compiled(tmp_path / f"build-cpu-{_build.work_key('cpu')}")
    report = run_python(
        f"""
        import sys
        import pytest, torch
        sys.path.append("tests")
        from support.emulation import amx
        from extrope_kernels import _ext
        amx.emulate()
        assert _ext.load("cpu") is None
        assert torch.ops.extrope.cpu_capability() == {AMX}
        sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-k",
            "not narrower and not triton", "tests/attention/test_attention_bf16.py"]))
        """,
        EXTROPE_CACHE_DIR=str(tmp_path),
        EXTROPE_CPU_CAPABILITY="amx",
    )
    assert " passed" in report
