"""The keyword arguments that all attention functions share are those that are named once."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from extrope_kernels.ops._shared.options import AttentionOptions, CacheOptions
from score_examples import EXAMPLES

FUNCTIONS = {example.attention.__name__: example for example in EXAMPLES.values()}


@pytest.mark.parametrize("with_kvcache", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures_show_them(name, with_kvcache):
    """To help(), to type checkers, and as what a function really takes."""
    example, options = FUNCTIONS[name], CacheOptions if with_kvcache else AttentionOptions
    function = example.with_kvcache if with_kvcache else example.attention
    parameters = inspect.signature(function).parameters.values()
    shown = {x.name for x in parameters if x.kind is x.KEYWORD_ONLY}
    own = {*example.parameters, "factor", "grouped", "cache_seqlens"}
    assert shown - own == {*options.__required_keys__, *options.__optional_keys__}


# What torch is to a type checker, as far as the code below needs it: torch itself takes a minute.
TORCH = """
from typing import Any
class Tensor:
    shape: tuple[int, ...]
    def __getitem__(self, index: Any) -> Tensor: ...
    def __iter__(self) -> Any: ...
def __getattr__(name: str) -> Any: ...
"""
CALLS = """
from torch import Tensor
from extrope_kernels import RopeFreqs, distributed
from extrope_kernels import dual_chunk_attention, scores, string_attention_with_kvcache
from extrope_kernels.ops.attention import attend
from extrope_kernels.ops.decode import attend_with_kvcache

def right(q: Tensor, freqs: RopeFreqs, ranks: object) -> Tensor:
    out: Tensor = dual_chunk_attention(q, q, q, freqs, chunk_size=4, local_window=2, softcap=5.0)
    out, lse = string_attention_with_kvcache(
        q, q, q, freqs, cache_seqlens=3, shift=4, window=2, return_lse=True
    )
    out = distributed.rerope_attention(q, q, q, freqs, window=4, mesh=ranks)
    print(out.shape, lse.shape)
    out = attend(scores.string(9, 2), q, q, q, freqs)
    out = attend_with_kvcache(scores.string(9, 2), q, q, q, freqs, cache_seqlens=3)
    return dual_chunk_attention(q, q, q, freqs, chunk_size=4, local_window=2)

def wrong(q: Tensor, freqs: RopeFreqs) -> None:
    dual_chunk_attention(q, q, q, freqs, chunk_size=4, local_window=2).shapes  # union-attr
    dual_chunk_attention(q, q, q, freqs, chunk_size="4", local_window=2)  # arg-type
    dual_chunk_attention(q, q, q, freqs, chunk_size=4, local_window=2, soft=1)  # call-arg
"""


def test_typed_code_needs_no_cast(tmp_path):
    """And what is wrong about a call is found."""
    pytest.importorskip("mypy")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.pyi").write_text(TORCH)
    (tmp_path / "calls.py").write_text(CALLS)
    options = ["--strict", "--python-version=3.10", "--no-site-packages", "--follow-imports=silent"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mypy",
            *options,
            "--config-file=",
            "--no-error-summary",
            "calls.py",
        ],
        cwd=tmp_path,
        env={"MYPYPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    expected = [
        (number, line.split("# ")[1])
        for number, line in enumerate(CALLS.splitlines(), 1)
        if "  # " in line
    ]
    found = [line.split(":")[1] for line in done.stdout.splitlines() if ": error:" in line]
    kinds = [line.split("[")[-1].rstrip("]") for line in done.stdout.splitlines() if "[" in line]
    assert list(zip(map(int, found), kinds)) == expected, done.stdout + done.stderr
