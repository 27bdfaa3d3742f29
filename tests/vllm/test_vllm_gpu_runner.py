"""vLLM's model runner for GPUs and our backend for them, on a CPU: Triton interpreted.

What CUDA graphs and a GPU's own results add is not seen here.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm.version")  # this folder is a "vllm", too
pytest.importorskip("triton")

from support.vllm_engines import Written, build, difference, expected, tokens_of
from test_vllm_engines import LEAKY, MODELS

import extrope_kernels

TESTS = Path(__file__).parents[1]


def test_cached_prefixes_and_a_dummy_run(tmp_path):
    """Every other layer has a sliding window, left blocks of which this runner hides."""
    model = build("Gemma2", tmp_path, **MODELS["Gemma2"])
    model.set_attn_implementation("eager")
    package = Path(extrope_kernels.__file__).parents[1]
    paths = [str(package), str(TESTS), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-m", "support.vllm_gpu_runner", str(tmp_path)]
    command.append(json.dumps({"score": LEAKY}))
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert "vllm.v1.worker.gpu.model_runner" in said["runner"]
    assert said["impl"] == "ScoreImpl"
    assert said["written"] and said["kept"]
    got = [Written(tokens, None, torch.tensor(new), n) for tokens, new, n in said["found"]]
    assert all(each.cached >= 288 for each in got)
    longer = said["prompts"]
    want, plain = (expected(model, methods, longer) for methods in ([LEAKY], []))
    ref = expected(copy.deepcopy(model).double(), [LEAKY], longer)
    assert tokens_of(got) == tokens_of(want)
    theirs = max(difference(want, ref, of) for of in ("of_prompt", "of_new"))
    assert difference(got, ref, "of_new") <= 2 * theirs
    assert difference(got, plain, "of_new") > 0.01
