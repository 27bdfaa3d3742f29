"""A run goes on with results of its own model and texts only, not with any of the same names."""

import json

import pytest
import torch

pytest.importorskip("transformers", minversion="5")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from tiny_model import CONFIG, results, retrained
from torch.testing._internal.two_tensor import TwoTensor
from transformers import LlamaConfig, LlamaForCausalLM

from extrope_kernels.evaluation.digests import model_digest, tokens_digest

REFUSED = "loss.json is of other settings ({}); name another --out, or move it"


def last_line(capsys):
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()[-1]


def test_another_model_of_the_same_name(run, folder, tmp_path, capsys):
    assert run() == 0
    kept = results(tmp_path)
    capsys.readouterr()
    other = retrained(folder, tmp_path)
    assert run(model=other) == 2
    assert last_line(capsys).endswith(REFUSED.format("model_digest"))
    assert results(tmp_path) == kept
    assert run() == 0 and results(tmp_path) == kept


def test_another_configuration_of_the_same_weights(run, folder, tmp_path, capsys):
    other = retrained(folder, tmp_path)
    assert run(model=other) == 0
    capsys.readouterr()
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    assert run(model=other) == 2
    assert last_line(capsys).endswith(REFUSED.format("model_digest"))


@pytest.mark.parametrize("task", ["loss", "recall", "passkey"])
def test_another_text_of_the_same_name_and_length(run, tmp_path, capsys, task):
    text = tmp_path / "story.txt"
    text.write_text("".join(chr(33 + n % 90) for n in range(0, 8000, 7)))
    given = {"task": task, "text": text, "lengths": 480}
    assert run(**given) == 0
    kept = results(tmp_path, task)
    capsys.readouterr()
    text.write_text(text.read_text()[::-1])
    assert run(**given) == 2
    refused = REFUSED.replace("loss", task).format("texts")
    assert last_line(capsys).endswith(refused)
    assert results(tmp_path, task) == kept


@pytest.mark.parametrize(
    "content", [b'{"task": "loss", "rows', b"", b"[]", b'{"rows": 1}', b"\xff"]
)
def test_damaged_results_are_told_and_kept(run, tmp_path, capsys, content):
    path = tmp_path / "out" / "loss.json"
    path.parent.mkdir()
    path.write_bytes(content)
    assert run() == 2
    last = last_line(capsys)
    assert last.startswith(f"eval: {path} cannot be read (")
    assert last.endswith("); name another --out, or move it")
    assert path.read_bytes() == content


def test_digest_of_a_model():
    def made(seed=0, **changes):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**CONFIG | changes))

    digest = model_digest(made())
    assert model_digest(made()) == digest
    assert model_digest(made(seed=1)) != digest
    assert model_digest(made(rms_norm_eps=1e-5)) != digest
    assert model_digest(made(rope_parameters={"rope_type": "default", "rope_theta": 5e5})) != digest
    assert model_digest(made().bfloat16()) != digest
    swapped = made()
    first, second = swapped.model.layers
    first.mlp, second.mlp = second.mlp, first.mlp
    assert model_digest(swapped) != digest
    elsewhere = made(architectures=["LlamaForCausalLM"])
    elsewhere.config._name_or_path = "elsewhere"
    assert model_digest(elsewhere) == digest


def test_digest_of_tensors():
    ids = torch.arange(6)
    assert tokens_digest(ids) == tokens_digest(torch.arange(12)[:6].clone())
    assert tokens_digest(ids[::2]) == tokens_digest(torch.tensor([0, 2, 4]))
    different = [ids, ids.flip(0), ids[:0], ids[:5], ids.int(), ids.reshape(2, 3)]
    different += [TwoTensor(ids, ids), TwoTensor(ids, ids + 1)]  # a tensor of tensors
    assert len({tokens_digest(each) for each in different}) == len(different)


@pytest.mark.parametrize(("task", "length"), [("loss", 64), ("recall", 480)])
@pytest.mark.parametrize("trials", [1, 2])
def test_losses_that_are_no_numbers_are_shown_and_resumed(
    run, folder, tmp_path, capsys, task, length, trials
):
    broken = retrained(folder, tmp_path)
    model = LlamaForCausalLM.from_pretrained(broken)
    model.model.norm.weight.data[0] = torch.nan
    model.save_pretrained(broken)
    text = tmp_path / "story.txt"
    text.write_text("".join(chr(33 + n % 90) for n in range(0, 8000, 7)))
    tables = []
    for _ in range(2):
        given = {"task": task, "text": text, "lengths": length, "trials": trials}
        assert run(model=broken, bucket=64, **given) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1]
    assert set(tables[0].splitlines()[1].split()[2:]) == {"nan"}
    (row,) = results(tmp_path, task)["rows"]
    assert row.get("loss") is None
