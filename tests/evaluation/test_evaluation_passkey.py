"""Passkey retrieval: the prompts, the scoring, and the command."""

from itertools import product

import pytest
import torch
from tiny_model import check_image, results
from transformers import LlamaForCausalLM

from extrope_kernels.evaluation import UsageError, passkey, plots, texts
from extrope_kernels.evaluation.report import share_interval


@pytest.fixture
def story(tokenizer, text):
    return texts.load_texts(tokenizer, [str(text)], 240)[0]


def test_passkey_prompt(tokenizer, story):
    def prompt_of(length, depth=0.5, trial=0):
        return passkey.make_prompt(tokenizer, story, length, depth, trial)

    shortest = None
    for length in range(50, 200):
        try:
            prompt_of(length)
        except UsageError as error:
            assert f"--lengths {length}" in str(error)
            continue
        shortest = shortest or length
    assert shortest is not None
    for length in (shortest, shortest + 1, 151, 200):
        for depth, trial in product(passkey.depths(5), range(2)):
            prompt = prompt_of(length, depth, trial)
            key = passkey.key(trial)
            assert len(prompt.ids) == length
            shown = "".join(tokenizer.convert_ids_to_tokens(prompt.ids.tolist()))
            assert shown[prompt.needle :].startswith(f"\n\nThe pass key is {key}. Remember it.")
            assert shown.endswith(f"\n\nThe pass key is {key}")
            assert shown[-prompt.answer :] == f" {key}"
            lead = min(64, length - shortest)  # no key among the first tokens
            assert prompt.needle == lead + round(depth * (length - shortest - lead))
            assert shown.startswith("The quick"[: prompt.needle]) or trial


def test_passkey_depths_and_keys():
    assert passkey.depths(5) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert passkey.depths(1) == [0.5]
    keys = [passkey.key(trial) for trial in range(20)]
    assert keys == [passkey.key(trial) for trial in range(20)]
    assert len(set(keys)) == 20 and all(len(key) == 5 and key.isdigit() for key in keys)
    assert passkey.key(0, 1) != keys[0]


def test_intervals_of_shares_are_wilsons():
    # Brown, Cai and DasGupta (2001): 0 of 10 up to 0.278, 5 of 10 from 0.237 to 0.763.
    assert share_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert share_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert share_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_recall_is_what_greedy_decoding_gives(folder):
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    question = torch.randint(0, 100, (1, 24), generator=torch.Generator().manual_seed(1))
    decoded = model.generate(question, max_new_tokens=5, do_sample=False, pad_token_id=0)[0]
    assert passkey.recalls(model, [passkey.Prompt(decoded, 5, 0)]) == [True]
    prompts = [passkey.Prompt(decoded, 3, 0)]
    for position in range(24, 29):
        wrong = decoded.clone()
        wrong[position] = (wrong[position] + 1) % 100
        prompts.append(passkey.Prompt(wrong, 5, 0))
    assert passkey.recalls(model, prompts) == [True] + [False] * 5  # answers of 3 and 5 tokens


def test_passkey_end_to_end(run, tmp_path, monkeypatch, capsys):
    asked = []

    def recalls(model, prompts, on_layer):
        asked.extend((len(prompt.ids), prompt.needle) for prompt in prompts)
        return [index % 3 != 0 for index in range(len(asked) - len(prompts) + 1, len(asked) + 1)]

    monkeypatch.setattr(passkey, "recalls", recalls)
    given = {"methods": "rope,pi", "lengths": "150,240", "depths": 3, "trials": 2}
    assert run(task="passkey", **given) == 0
    found = results(tmp_path, "passkey")
    assert found["depths"] == [0.0, 0.5, 1.0] and found["trials"] == 2
    assert [row["recalled"] for row in found["rows"]] == [[2, 1, 1]] * 4
    assert [row["accuracy"] for row in found["rows"]] == [[1.0, 0.5, 0.5]] * 4
    assert [length for length, _ in asked] == ([150] * 6 + [240] * 6) * 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["method", "tokens", "0%", "50%", "100%"]
    assert lines[1].split() == ["rope", "150", "100%", "(34-100)"] + ["50%", "(9-91)"] * 2
    check_image(tmp_path / "out" / "passkey.png")


def test_plots_take_what_an_unfinished_run_has(tmp_path):
    passkeys = {"model": "m", "training_length": 8, "depths": [0.0, 1.0]}
    rows = [("a", 8), ("a", 16), ("b", 8)]
    passkeys["rows"] = [{"method": m, "length": n, "accuracy": [0.0, 1.0]} for m, n in rows]
    plots.plot_passkey(passkeys, tmp_path / "passkey.png")
    check_image(tmp_path / "passkey.png")
