"""The command line."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import extrope_cli
import extrope_kernels
from extrope_kernels import _ext, cli
from extrope_kernels.ops import attention

BACKENDS = attention.backends()
ROOT = Path(__file__).resolve().parents[2]


def test_info_says_what_runs_where(capsys):
    assert extrope_cli.main(["info"]) == 0
    verdict, *table = capsys.readouterr().out.splitlines()
    has_gpu = torch.cuda.is_available()
    lines = dict(line.split("  ", 1) for line in table)
    lines = {label: value.strip() for label, value in lines.items()}
    assert lines["torch"] == torch.__version__
    assert lines["rope backend reference"] == "available"
    assert lines["rope on cpu"] in ("cpu", "reference")
    assert lines["attention on cpu"] == lines["permuteformer on cpu"] == lines["rope on cpu"]
    assert lines.get("attention on cuda", "no GPU") in (BACKENDS if has_gpu else ["no GPU"])
    assert {"triton", "C++ compiler", "nvcc", "cpu library", "cuda library"} <= lines.keys()
    start, gpu = verdict.split("; ")
    if lines["rope on cpu"] == "cpu":
        told = re.fullmatch(r"extrope_kernels (.*): CPU kernels ready \((.*)\)", start)
        assert told[1] == extrope_kernels.__version__ and told[2] in cli.CPU_CAPABILITIES
    if has_gpu:
        assert gpu.startswith(f"GPU: rope by {lines['rope on cuda']}, attention by ")
    else:
        assert gpu == "no GPU"


def test_the_verdict_names_what_serves_a_gpu(monkeypatch):
    def with_triton(*others):
        return SimpleNamespace(
            backends=lambda: dict.fromkeys(others, "no") | {"triton": "available"}
        )

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cli, "OPS", {"rope": with_triton("cuda"), "attention": with_triton()})
    assert cli._gpu_verdict() == "GPU: rope by triton, attention by triton"


@pytest.mark.skipif(_ext.load("cpu") is not None, reason="no CPU library")
def test_products_of_pairs_are_chosen_where_they_are_fast():
    """Intel's take longer than those of floats."""
    processor = Path("/proc/cpuinfo").read_text()
    chosen = cli.CPU_CAPABILITIES[torch.ops.extrope.cpu_capability()]
    if "avx512_bf16" not in processor or chosen == "AMX":
        pytest.skip("no choice between these")
    assert chosen == ("AVX-512" if "GenuineIntel" in processor else "AVX-512 BF16")


CHECK_AND_INFO = """
import extrope_cli, sys
from extrope_kernels import _ext
extrope_cli.main(["check", {folder!r}, "--length", "128k"])
assert not _ext._reasons, _ext._reasons
heavy = ("modeling_llama", "integrations.transformers", "integrations.vllm", "evaluation")
assert not [name for name in sys.modules if name.endswith(heavy)]
extrope_cli.main(["info"])
"""


@pytest.mark.usefixtures("no_library")
def test_check_builds_nothing_and_info_says_why_there_is_no_library(tmp_path):
    """In a process without compiler, extras and cache."""
    pytest.importorskip("transformers")
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "head_dim", "vocab_size"), 64)
    sizes |= dict.fromkeys(("num_hidden_layers", "num_attention_heads"), 1)
    config = sizes | {"model_type": "llama", "max_position_embeddings": 4096}
    (tmp_path / "config.json").write_text(json.dumps(config))
    cache = tmp_path / "cache"
    done = subprocess.run(
        [sys.executable, "-c", CHECK_AND_INFO.format(folder=str(tmp_path))],
        cwd=ROOT,
        env={"PATH": "/nonexistent", "EXTROPE_CACHE_DIR": str(cache), "EXTROPE_JIT": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    checked, _, info = done.stdout.partition("extrope_kernels ")
    assert checked.startswith("to try first     leaky_rerope window=2048 factor=")
    assert "`extend` tells" in checked
    assert "no C++ compiler found" in info and "EXTROPE_JIT=0 forbids" in info
    assert info.rstrip().endswith("reference")
    assert ": no CPU kernels: ops run as the reference" in info.splitlines()[0]
    assert "Warning" not in done.stderr and not cache.exists()


@pytest.mark.parametrize(
    ("full", "code", "told"),
    [(False, 1, ""), (True, 2, "extrope: cannot print: No space left on device\n")],
)
def test_what_cannot_be_printed_leaves_no_trace(monkeypatch, capsys, full, code, told):
    """Of a reader that stops early, as head does, or a full disk: neither from print nor from
    Python's own flush.
    """
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(extrope_cli, "main", lambda: print("more than was wanted"))
    with os.fdopen(write, "w") as pipe, open("/dev/full", "w") as disk:
        monkeypatch.setattr(sys, "stdout", disk if full else pipe)
        with pytest.raises(SystemExit) as exit_:
            runpy.run_module("extrope_kernels", run_name="__main__")
    assert exit_.value.code == code and capsys.readouterr().err == told


def test_a_command_forwards_to_its_module(capsys, tmp_path):
    words = ["--model", str(tmp_path / "none"), "--methods", "rope", "--lengths", "64"]
    assert extrope_cli.main(["eval", *words, "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("eval: ")


def test_bench_runs_the_scripts_of_a_checkout(capfd, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "extrope_kernels" / "cli.py"))
    assert extrope_cli.main(["bench"]) == 2
    assert "the benchmarks come with a checkout" in capfd.readouterr().err
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "bench_rope.py").write_text("print('ran rope')")
    (tmp_path / "bench" / "bench_mad.py").write_text("raise SystemExit(3)")
    assert extrope_cli.main(["bench", "rope"]) == 0
    assert capfd.readouterr().out == "ran rope\n"
    assert extrope_cli.main(["bench"]) == 3
    assert capfd.readouterr().out == "ran rope\n"  # after the one that failed
    assert extrope_cli.main(["bench", "yarn"]) == 2
    assert "NAME must be one of ['mad', 'rope'], got 'yarn'" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("fly", "invalid choice: 'fly'"),
        ("chek", "did you mean 'check'?"),
        ("info now", "unrecognized arguments: now"),
        ("check m --lenght 8k", "unrecognized arguments: --lenght 8k; did you mean --length?"),
        ("check m --lenght=8k", "unrecognized arguments: --lenght=8k; did you mean --length?"),
        ("check m --length -5", "argument --length: must be a number of tokens, as 131072, 131,07"),
        ("check m --length 0", "argument --length: must be at least 1 token, got '0'"),
        ("eval --lengths 1,8k", "argument --lengths: must be at least 2 tokens each, got 1"),
        ("eval --bucket 0", "argument --bucket: must be a whole number >= 1, got '0'"),
        ("eval --trials x", "argument --trials: must be a whole number >= 1, got 'x'"),
        ("check", "required: MODEL"),
        ("eval --model smollm2", "required: --lengths, --out"),
        (
            "eval --lengths far",
            "argument --lengths: must be a number of tokens, as 131072, 131,072",
        ),
        ("check m --length 1,2", "128k, got '1,2'"),
    ],
)
def test_a_mistake_is_one_line(arguments, told, capsys):
    with pytest.raises(SystemExit) as exit_:
        extrope_cli.main(arguments.split())
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m extrope_kernels") and told in line
    assert line.endswith(" --help shows all")


@pytest.mark.parametrize(
    ("text", "count"),
    [("131072", 131072), ("131,072", 131072), ("128k", 131072), ("1M", 2**20)],
)
def test_tokens_as_people_write_them(text, count):
    assert extrope_cli.tokens(text) == count
    if "," not in text:
        assert extrope_cli.lengths(f"{text},8k") == [count, 8192]


EVAL = "eval --model smollm2 --methods rope --lengths 8k --out /nowhere"
NOWHERE = "no such folder, .gguf file or config.json, and not in the hub's local cache"
# Answered without torch, in a fraction of a second: what is told contains this.
AT_ONCE = {
    "": "usage: ",
    "--version": f"extrope_kernels {extrope_kernels.__version__}\n",
    "check --help": "usage: ",
    "check nope.json": f"check: nope.json: {NOWHERE}\n",
    "check smolm2": f"check: smolm2: {NOWHERE}; did you mean smollm2?\n",
    "check no/Llama-3": f"no/Llama-3: {NOWHERE}; to fetch it: hf download no/Llama-3 config.json\n",
    "check nowhere": f"check: nowhere: {NOWHERE}\n",
    "fly": "argument COMMAND: invalid choice: 'fly'",
    "eval --lengths x": "argument --lengths: must be a number of tokens",
    f"{EVAL} --text nope.txt": "eval: text nope.txt: no such file\n",
    f"{EVAL} --model smolm2": "model smolm2: no such folder or .gguf file; did you mean smollm2?",
    f"{EVAL} --param yarn.factor=2": "eval: --param yarn.factor: yarn is not among --methods\n",
    EVAL.replace("--methods rope ", ""): (
        "eval: --methods must be named for a model that was not saved as extended\n"
    ),
}


@pytest.mark.parametrize("arguments", AT_ONCE)
def test_help_and_mistakes_are_answered_without_torch(arguments, run_python):
    told = run_python(f"""
        import contextlib, sys, extrope_cli
        with contextlib.redirect_stderr(sys.stdout), contextlib.suppress(SystemExit):
            extrope_cli.main({arguments.split()!r})
        assert not {{"torch", "extrope_kernels"}} & sys.modules.keys()
    """)
    assert AT_ONCE[arguments] in told


def test_models_of_packages_are_named_alike():
    pytest.importorskip("transformers")
    from extrope_kernels.evaluation.packages import PACKAGES

    assert tuple(PACKAGES) == extrope_cli.PACKAGED


def test_the_version_is_the_package_s(capsys):
    assert extrope_cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"extrope_kernels {extrope_kernels.__version__}\n"


@pytest.mark.parametrize("command", ["info", "check", "eval", "bench"])
def test_help_has_examples_that_parse(command, capsys):
    with pytest.raises(SystemExit):
        extrope_cli.main([command, "--help"])
    examples = capsys.readouterr().out.partition("examples:\n")[2]
    called = f"  python -m extrope_kernels {command}"
    lines = [line for line in examples.splitlines() if line.startswith(called)]
    assert lines
    for line in lines:
        extrope_cli.make_parser().parse_args(line.split()[3:])


def test_an_interrupted_command_is_one_line(monkeypatch, capsys):
    """As it runs, while torch is imported, or before."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "info", interrupted)
    assert extrope_cli.main(["info"]) == 130
    assert capsys.readouterr().err == "info: interrupted\n"
    monkeypatch.setattr(sys, "argv", ["extrope", "info"])
    for of, name, told in (
        (extrope_cli.importlib, "import_module", "info"),
        (extrope_cli, "make_parser", "extrope"),
    ):
        monkeypatch.setattr(of, name, interrupted)
        assert extrope_cli.run() == 130
        assert capsys.readouterr().err == f"{told}: interrupted\n"
