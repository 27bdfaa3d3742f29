"""Every script of examples/ runs, and shows what it says it shows."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+\.\d+(?:e-?\d+)?", text)]


@pytest.fixture
def run(monkeypatch, capsys):
    """What a script prints. It runs here, where most of what it imports is imported."""

    def run(script: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        monkeypatch.syspath_prepend(str(EXAMPLES))  # as `python examples/SCRIPT` does
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return capsys.readouterr().out

    return run


def run_apart(script: str, *arguments: str) -> str:
    """What a script prints that starts processes itself."""
    paths = [str(EXAMPLES.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_extend_and_generate(run):
    pytest.importorskip("transformers")
    *methods, restored = run("extend_and_generate.py").splitlines()[1:]
    others = [int(line.partition(": ")[2].split()[0]) for line in methods[::2]]
    assert len(others) == 4 and min(others) > 0  # every method has an effect
    assert set(methods[1::2]) == {"    without a cache: the same tokens"}
    assert restored == "restored: the same tokens"


def test_reuse_cached_chunks(run):
    pytest.importorskip("transformers")
    lines = run("reuse_cached_chunks.py").splitlines()
    assert all(0 < share < 100 for share in numbers(" ".join(lines)))
    assert [line for line in lines if "first layer" in line] == [
        "first then second: keys of the first layer equal",
        "second then first: keys of the first layer equal",
    ]


def test_shift_context(run):
    pytest.importorskip("transformers")
    _, whole, keys, rotated, raw, anew = run("shift_context.py").splitlines()
    assert keys == "keys of the first layer: as read anew"
    assert numbers(rotated) == numbers(raw) != numbers(whole)
    assert numbers(anew) != numbers(raw)  # later layers know what is gone


def test_train_with_rope_fwd(run):
    first, *_, last = numbers(run("train_with_rope_fwd.py"))
    assert first > 2.5 and last < 0.1  # ln 16 = 2.8 for a guess


@pytest.mark.thorough
@pytest.mark.parametrize("method", ("rerope", "yarn"))
def test_finetune_longer(run, method):
    pytest.importorskip("transformers")
    lines = run("finetune_longer.py", method).splitlines()
    trained, extended, tuned = (numbers(line) for line in lines if " step " not in line)
    assert trained[-1] > extended[-1] > tuned[-1]


def test_own_score(run):
    output, gradient = numbers(run("own_score.py"))
    assert output < 1e-5 and gradient < 1e-4


def test_serve_vllm(tmp_path):
    """Every token that is served is the best one under `extend`, as far as bfloat16 can tell."""
    pytest.importorskip("vllm.version")
    from support.vllm_engines import TRAINED, build, logits_behind, regret, save_tokenizer
    from transformers import AutoTokenizer

    model = build("Llama", tmp_path)
    save_tokenizer(tmp_path)
    lengths, written = run_apart("serve_vllm.py", "--model", str(tmp_path)).splitlines()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    example = runpy.run_path(str(EXAMPLES / "serve_vllm.py"))
    prompt = example["long_prompt"](tokenizer, TRAINED)
    trained, read = map(int, re.findall(r"\d+", lengths))
    assert trained == TRAINED < read == len(prompt)
    served = tokenizer(written.partition("->")[2])["input_ids"]
    assert len(served) == example["NEW"]
    rerope = {"method": "rerope", "window": TRAINED // 4}
    plain = logits_behind(model, [], prompt, served)
    exact = logits_behind(model, [rerope], prompt, served)
    in_bf16 = logits_behind(model.bfloat16(), [rerope], prompt, served)
    # The best of logits that are each off by an error may be worse than the best by two.
    bound = 2 * 2 * (in_bf16 - exact).abs().max()
    assert regret(exact, served) <= bound < regret(plain, served)


def test_same_scaling():
    for name in ("vllm.version", "trl", "peft"):
        pytest.importorskip(name)
    losses, _, same, plain = run_apart("same_scaling.py").splitlines()[-4:]
    before, after = numbers(losses)
    assert after < before - 1
    # Both are in float32, 5e-6 from float64; a window longer by one changes 3.
    assert numbers(same)[0] < 1e-4 and numbers(plain)[0] > 1


def test_read_alike():
    for name in ("vllm.version", "peft", "lm_eval"):
        pytest.importorskip(name)
    written, read = {}, ""
    for line in run_apart("read_alike.py").splitlines():
        name, _, said = line.partition(": ")
        if name in ("transformers", "vLLM", "lm-eval", "without the extension"):
            written[name] = said
        if name == "extrope eval":
            read = said
    assert written["transformers"] == written["vLLM"] == written["lm-eval"]
    assert written["transformers"] != written["without the extension"]
    as_saved, plain = numbers(read)
    assert as_saved != plain


def test_all_are_tested():
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    tested |= {"train_context_parallel"}  # by tests/distributed, in several processes
    assert {script.stem for script in EXAMPLES.glob("*.py")} <= tested
