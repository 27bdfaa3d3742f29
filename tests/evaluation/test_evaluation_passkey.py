"""Passkey retrieval: the prompts, the scoring, and the command."""

import pytest
import torch

pytest.importorskip("transformers", minversion="5")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from tiny_model import check_image, results
from transformers import LlamaForCausalLM

from extrope_kernels.evaluation import UsageError, passkey, plots


def test_passkey_prompt(tokenizer):
    shortest = None
    for length in range(150, 400):
        try:
            passkey.make_prompt(tokenizer, "54321", length, 0.5)
        except UsageError as error:
            assert f"--lengths {length}" in str(error)
            continue
        shortest = shortest or length
    assert shortest is not None
    for length in (shortest, shortest + 1, 511, 512, 1000):
        for depth in passkey.depths(5):
            prompt = passkey.make_prompt(tokenizer, "54321", length, depth)
            assert len(prompt.ids) == length
            shown = "".join(tokenizer.convert_ids_to_tokens(prompt.ids.tolist()))
            assert shown[prompt.needle :].startswith("The pass key is 54321. Remember it.")
            assert shown.endswith("What is the pass key? The pass key is 54321")
            assert shown[-prompt.answer :] == " 54321"
            start = passkey.make_prompt(tokenizer, "54321", length, 0.0).needle
            assert prompt.needle == start + round(depth * (length - shortest))


def test_passkey_depths_and_keys():
    assert passkey.depths(5) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert passkey.depths(1) == [0.5]
    keys = [passkey.key(trial) for trial in range(20)]
    assert keys == [passkey.key(trial) for trial in range(20)]
    assert len(set(keys)) == 20 and all(len(key) == 5 and key.isdigit() for key in keys)


def test_recall_is_what_greedy_decoding_gives(folder):
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    question = torch.randint(0, 100, (1, 24), generator=torch.Generator().manual_seed(1))
    decoded = model.generate(question, max_new_tokens=5, do_sample=False, pad_token_id=0)[0]
    assert passkey.recalls(model, passkey.Prompt(decoded, 5, 0))
    for position in range(24, 29):
        wrong = decoded.clone()
        wrong[position] = (wrong[position] + 1) % 100
        assert not passkey.recalls(model, passkey.Prompt(wrong, 5, 0))


def test_passkey_end_to_end(run, tmp_path, monkeypatch, capsys):
    asked = []

    def recalls(model, prompt, on_layer):
        asked.append((len(prompt.ids), prompt.needle))
        return len(asked) % 3 != 0

    monkeypatch.setattr(passkey, "recalls", recalls)
    given = {"methods": "rope,pi", "lengths": "300,400", "depths": 3, "trials": 2}
    assert run(task="passkey", **given) == 0
    found = results(tmp_path, "passkey")
    assert found["depths"] == [0.0, 0.5, 1.0] and found["trials"] == 2
    assert [row["recalled"] for row in found["rows"]] == [[2, 1, 1]] * 4
    assert [row["accuracy"] for row in found["rows"]] == [[1.0, 0.5, 0.5]] * 4
    assert [length for length, _ in asked] == ([300] * 6 + [400] * 6) * 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["method", "tokens", "0%", "50%", "100%"]
    assert lines[1].split() == ["rope", "300", "100%", "50%", "50%"]
    check_image(tmp_path / "out" / "passkey.png")


def test_plots_take_what_an_unfinished_run_has(tmp_path):
    passkeys = {"model": "m", "training_length": 8, "depths": [0.0, 1.0]}
    rows = [("a", 8), ("a", 16), ("b", 8)]
    passkeys["rows"] = [{"method": m, "length": n, "accuracy": [0.0, 1.0]} for m, n in rows]
    plots.plot_passkey(passkeys, tmp_path / "passkey.png")
    check_image(tmp_path / "passkey.png")
