"""What a user may get wrong: one line on stderr, exit code 2, and nothing slow before it."""

import importlib.util
import re
import shutil

import pytest
from tiny_model import files_of_at_most, results

from extrope_kernels.evaluation import cli


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"methods": "rope,yarm"},
            "eval: did you mean 'yarn'? method must be one of rope, abf, pi",
        ),
        ({"methods": ","}, "--methods: must list at least one value"),
        (
            {"lengths": "64,x"},
            "--lengths: must be a number of tokens, as 131072, 131,072",
        ),
        ({"lengths": "1"}, "argument --lengths: must be at least 2 tokens each, got 1"),
        ({"param": "yarn.beta_fast=16"}, "yarn is not among --methods"),
        ({"param": "rope.beta_fast=16"}, "eval: rope has no beta_fast; it has base"),
        ({"param": "rope.base"}, "--param: must read METHOD.NAME=VALUE, got rope.base"),
        (
            {"param": "rerope.shift=2", "methods": "rerope"},
            "rerope has no shift; it has window, log_n",
        ),
        ({"bucket": 0}, "argument --bucket: must be a whole number >= 1, got '0'"),
        ({"trials": 0}, "argument --trials: must be a whole number >= 1, got '0'"),
        ({"model": "/nowhere/model"}, "eval: model /nowhere/model: no such folder or .gguf file"),
        ({"text": "/nowhere/text"}, "eval: text /nowhere/text: no such file"),
        ({"lengths": "9999"}, "story.txt: 240 tokens, too short for 9,999"),
        ({"device": "nonsense"}, "eval: device nonsense: "),
    ],
)
def test_mistakes_are_told_before_the_model_is_loaded(run, monkeypatch, capsys, given, message):
    def load_model(*_):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("extrope_kernels.evaluation.models.load_model", load_model)
    assert run(**given) == 2
    captured = capsys.readouterr()
    last = captured.err.splitlines()[-1]
    assert re.match(r"(.* )?eval: ", last) and message in last
    assert captured.out == "" and "Traceback" not in captured.err


def test_other_unusable_files(run, text, tmp_path, capsys):
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9")
    empty = tmp_path / "empty"
    empty.mkdir()
    ggufs = tmp_path / "ggufs"
    ggufs.mkdir()
    for name in ("a.gguf", "b.gguf"):
        (ggufs / name).touch()
    for given, message in (
        ({"text": latin}, "not UTF-8 at byte 3"),
        ({"out": text / "sub"}, "cannot write there: Not a directory"),
        ({"model": empty}, "holds neither config.json nor a .gguf file"),
        ({"model": ggufs}, "holds several models, name one of a.gguf, b.gguf"),
    ):
        assert run(**given) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_damaged_model_is_told_in_one_line(run, folder, tmp_path, capsys):
    for name in ("model.safetensors", "tokenizer.json"):
        damaged = tmp_path / f"damaged-{name}"
        shutil.copytree(folder, damaged)
        whole = (damaged / name).read_bytes()
        for left in (len(whole) // 2, 0):
            (damaged / name).write_bytes(whole[:left])
            assert run(model=damaged) == 2
            last = capsys.readouterr().err.splitlines()[-1]
            assert re.match(r"eval: cannot load the (model|tokenizer): \w", last), last


def test_parameters_that_a_method_refuses(run, tmp_path, capsys):
    assert run(methods="rope,yarn", param="yarn.beta_fast=nonsense") == 2
    captured = capsys.readouterr()
    assert "yarn: beta_fast must be a number" in captured.err and captured.out == ""
    assert list((tmp_path / "out").iterdir()) == []
    assert run(methods="rope,self_extend", param="self_extend.factor=2.5") == 2
    assert "self_extend: factor must be a whole number, got 2.5" in capsys.readouterr().err
    assert run(methods="self_extend", param="self_extend.window=half") == 2
    assert "self_extend: window must be an int, got str" in capsys.readouterr().err


def without(monkeypatch, missing):
    """Let a package seem not to be installed."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == missing else find_spec(name, *rest),
    )


def test_a_missing_package_is_named_behind_other_mistakes(run, monkeypatch, capsys):
    without(monkeypatch, "transformers")
    assert run(plot=True) == 2
    told = "transformers not installed; run: pip install transformers (or, in a checkout, "
    assert capsys.readouterr().err == f"eval: {told}pip install '.[demo]')\n"
    assert run(model="/nowhere/model") == 2
    assert "no such folder or .gguf file" in capsys.readouterr().err


def test_tables_need_no_matplotlib(run, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        without(patch, "matplotlib")
        assert run(plot=True) == 0
    shown = capsys.readouterr()
    assert "eval: no plot will be drawn: matplotlib is not installed" in shown.err
    assert shown.out.splitlines()[1].startswith("rope ")
    assert shown.err.splitlines()[-1] == f"wrote {tmp_path / 'out' / 'loss.json'}"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["loss.json"]
    assert (
        run(plot=True) == 0 and (tmp_path / "out" / "loss.png").exists()
    )  # of the rows that were there


def test_a_full_disk_is_told_and_what_was_measured_stays(run, tmp_path, capsys):
    out = tmp_path / "out"

    def told(most, **given):
        with files_of_at_most(most):
            assert run(**given) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        return last == f"eval: [Errno 27] File too large; finished rows are in {out}"

    assert told(4096, plot=True)  # the plot does not fit
    assert [path.name for path in out.iterdir()] == ["loss.json"]
    kept = results(tmp_path)
    assert told((out / "loss.json").stat().st_size, methods="rope,pi")  # nor does another row
    assert results(tmp_path) == kept and [row["method"] for row in kept["rows"]] == ["rope"]
    assert [path.name for path in out.iterdir()] == ["loss.json"]
    assert run(methods="rope,pi") == 0
    assert results(tmp_path)["rows"][0] == kept["rows"][0]


def test_an_interrupt_before_the_first_row_names_none(run, monkeypatch, capsys):
    def interrupted(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "evaluate", interrupted)
    assert run() == 130
    assert capsys.readouterr().err.splitlines()[-1] == "eval: interrupted"


def test_lengths_within_the_training_are_told(run, capsys):
    told = "nothing is extended: 32 tokens are within the 32 that the model was trained to\n"
    for methods, lengths, count in (("rope,yarn", "16,32", 1), ("rope", "32", 0), ("pi", "64", 0)):
        assert run(methods=methods, lengths=lengths) == 0
        assert capsys.readouterr().err.count(told) == count
