"""The CPU kernels for AMX on a processor without it: their tile registers are emulated."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
from builds import unoptimised

from extrope_kernels import _ext, cli

AMX = cli.CPU_CAPABILITIES.index("AMX")
HEADER = Path(__file__).parents[1] / "support" / "emulation" / "amx.h"


def test_kernels_for_amx(run_python, tmp_path):
    """Attention in bf16; by nobody else's tests do the kernels run here."""
    assert _ext.load("cpu") is None
    capability = torch.ops.extrope.cpu_capability()
    if capability == AMX:
        pytest.skip("the processor has AMX: all tests of bf16 run on it")
    if cli.CPU_CAPABILITIES[capability] != "AVX-512 BF16":
        pytest.skip("the kernels for AMX use AVX512_BF16 too")
    report = run_python(
        f"""
        import sys
        import pytest, torch
        from extrope_kernels import _ext
        assert _ext.load("cpu") is None
        assert torch.ops.extrope.cpu_capability() == {AMX}
        chosen = [
            "attention/test_attention_bf16",
        ]
        sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-k",
            "not narrower and not triton", *(f"tests/{{name}}.py" for name in chosen)]))
        """,
        CXX=shlex.join([unoptimised(tmp_path), "-include", str(HEADER)]),
        EXTROPE_CACHE_DIR=str(tmp_path),
        EXTROPE_CPU_CAPABILITY="amx",
    )
    assert " passed" in report
