"""flash-attn 4's kernels for the calls of the composition, compiled where it is installed."""

import subprocess
import sys
from pathlib import Path

import pytest
from support import compile_flash_attn
from support.flash_attn_stubs import installed_source

pytestmark = pytest.mark.thorough


@pytest.mark.skipif(
    installed_source("flash_attn.cute.interface") is None, reason="flash-attn-4 is not installed"
)
@pytest.mark.parametrize(
    ("chip", "head_dims"), [("sm_90", ("128", "256")), ("sm_100", ("64", "128"))]
)
def test_flash_attn_4_compiles_the_calls(chip, head_dims):
    command = [sys.executable, compile_flash_attn.__file__, chip, *head_dims]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(head_dims) * len(compile_flash_attn.CALLS)
