"""Rope parameters that a model does not read: the command, `check` and `extend` say the same."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import extrope_cli as cli
from extrope_kernels import check, extend, methods
from extrope_kernels.methods import is_bounded

transformers = pytest.importorskip("transformers")
from support import tiny_models  # noqa: E402

TRAINED, RAISED, LENGTH = 64, 256, 1024
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED}
SOME = {
    "DeepseekV4ForCausalLM": ["applied", "applied", "dropped"],
    "Gemma3ForCausalLM": ["ignored", "applied", "ignored"],
    "LlamaForCausalLM": ["applied", "ignored", "ignored"],
    "Olmo3ForCausalLM": ["ignored", "applied", "ignored"],
    "Qwen3ForCausalLM": ["applied", "ignored"],  # transformers refuses nested ones
    "Step3p7ForConditionalGeneration": ["dropped", "applied", "dropped"],
}
NOT_TOLD = {
    # `extend` finds more by running them, or their configurations do not say what `check` reads.
    *("DiffusionGemmaForBlockDiffusion", "DogeForCausalLM", "IdeficsForVisionText2Text"),
    *("BltForCausalLM", "RecurrentGemmaForCausalLM", "UnlimitedOcrForConditionalGeneration"),
    # Frequencies that are weights; two rotations, one of which takes no scaling; none.
    *("MistralLarge4ForConditionalGeneration", "Molmo2ForConditionalGeneration"),
    "OlmoHybridForCausalLM",
    # They need more than ids.
    *("Gemma4UnifiedAssistantForCausalLM", "Llama4ForConditionalGeneration"),
    "T5Gemma2ForConditionalGeneration",
    # They need timm.
    *("FastVlmForConditionalGeneration", "Gemma3nForConditionalGeneration"),
    "PerceptionLMForConditionalGeneration",
}


def forms(text: Any) -> Iterator[dict[str, Any]]:
    """Yield rope parameters with YaRN: flat, nested, and both ways round beside the model's own."""
    own = copy.deepcopy(text.rope_parameters)
    kinds = [kind for kind, value in own.items() if isinstance(value, dict)]
    wide = min(kinds, key=is_bounded, default="full_attention")
    each = own if kinds else {wide: own}
    yield each[wide] | YARN
    yield each | {wide: each[wide] | YARN}
    yield own | (YARN if kinds else {wide: own | YARN})


def loaded(name: str, form: dict[str, Any]) -> torch.nn.Module | None:
    """Return the model as loaded from a file with `form`; None if transformers runs none."""
    cls = getattr(transformers, name)
    config = tiny_models.tiny_config(cls.config_class)
    text = config.get_text_config(decoder=True)
    try:
        text.rope_parameters, text.max_position_embeddings = copy.deepcopy(form), RAISED
        model = tiny_models.random(cls, type(config).from_dict(config.to_dict()))
        model(input_ids=torch.arange(3, 13)[None])
    except Exception:  # each class has its own rules, and its own errors
        return None
    return model


def chosen(model: torch.nn.Module) -> tuple[str | None, bool]:
    """Return the call that `extend` chooses, None if it changes nothing, and if it warns."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with extend(model, length=LENGTH) as handle:
            given = "".join(f", {k}={v}" for k, v in handle.applied.parameters.items())
    told = [each for each in heard if "which the model does not read" in str(each.message)]
    assert all(each.filename == __file__ for each in told)
    call = f'extend(model, "{handle.method}"{given})' if handle.changes else None
    return call, bool(told)


def said_by_all(name: str, folder: Any, capsys: Any) -> Iterator[str]:
    """Try all forms on a class: what is in force and what is ignored, by each of the three."""
    config = tiny_models.tiny_config(getattr(transformers, name).config_class)
    for form in forms(config.get_text_config(decoder=True)):
        if (model := loaded(name, form)) is None:
            continue
        written = copy.deepcopy(config)
        text = written.get_text_config(decoder=True)
        text.rope_parameters, text.max_position_embeddings = form, RAISED
        (folder / "config.json").write_text(written.to_json_string())
        assert cli.main(["check", str(folder), "--json", "--length", str(LENGTH)]) == 0
        facts, report = json.loads(capsys.readouterr().out), check(model)
        call, warned = chosen(model)
        applied = any("yarn factor 4" in each.stated for each in report.rotations)
        assert all(each.ok for each in report.rotations), report
        assert {each["method"] for each in facts["rotations"]} >= {"yarn"} or not applied
        if not applied and not report.ignored:
            assert facts["ignored"]  # the class drops them, so that the file alone has them
            yield "dropped"
            continue
        assert set(report.ignored) <= set(facts["ignored"])  # a class may drop some of them
        assert applied != bool(report.ignored) and bool(facts["ignored"]) == warned != applied
        assert facts["advice"]["lines"].get("extend") == call, form
        yield "ignored" if report.ignored else "applied"


def test_parameters_that_a_model_passes_over_are_told(tmp_path, capsys):
    found = {name: [*said_by_all(name, tmp_path, capsys)] for name in SOME}
    assert found == SOME


@pytest.mark.thorough
def test_parameters_that_any_class_passes_over_are_told(tmp_path, capsys):
    names = tiny_models.rotary_classes().keys() - NOT_TOLD
    for name in sorted(names):
        assert [*said_by_all(name, tmp_path, capsys)], name


@pytest.mark.parametrize("name", ["Gemma3ForCausalLM", "LlamaForCausalLM"])
def test_a_saved_configuration_leaves_them_out(name, tmp_path):
    *_, mixed = forms(tiny_models.tiny_config(getattr(transformers, name).config_class))
    model, ids = loaded(name, mixed), torch.arange(3, 83)[None]
    with torch.no_grad(), extend(model, "yarn", factor=2.0) as handle:
        handle.save_pretrained(tmp_path)
        want = model(ids).logits
    again = type(model).from_pretrained(tmp_path)
    assert check(again).ok
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, want)


def test_a_trained_length_that_nothing_reads_still_tells_of_the_training():
    nested = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}
    config = {"max_position_embeddings": RAISED, "rope_parameters": nested | YARN}
    assert methods.lengths(config)[:3] == (TRAINED, TRAINED, TRAINED)
    nested["full_attention"] |= YARN
    assert methods.lengths(config)[:3] == (TRAINED, TRAINED, RAISED)  # all of it is read there
