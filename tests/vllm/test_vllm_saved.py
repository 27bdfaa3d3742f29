"""Models saved as extended: an engine takes its entry from the extrope.json beside the weights."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest

from extrope_kernels.integrations.vllm.saved import check_layers, take_saved
from extrope_kernels.integrations.vllm.settings import read_settings

YARN = {"method": "yarn", "factor": 4.0}
RERO = {"method": "rerope", "window": 64}


def content(*extensions, **changes):
    stored = [
        {"method": each["method"], "parameters": {k: v for k, v in each.items() if k != "method"}}
        | {"layers": "full", "length": None, "cache": None}
        | changes
        for each in extensions
    ]
    return json.dumps({"extensions": stored, "in_config": False}).encode()


@pytest.mark.parametrize(
    ("extensions", "changes", "entry"),
    [
        ([YARN], {}, YARN),
        ([RERO], {}, {"score": RERO}),
        ([YARN, RERO], {}, YARN | {"score": RERO}),
        ([{"method": "pi", "factor": 2.0}, YARN], {}, YARN),
        ([RERO], {"cache": "raw"}, {"score": RERO, "cache": "raw"}),
    ],
    ids=str,
)
def test_the_entry_of_what_was_saved(extensions, changes, entry):
    given = {"another": 1}
    taken, said = take_saved(given, "folder", content(*extensions, **changes))
    assert taken == {"another": 1, "extrope": entry} and given == {"another": 1}
    assert said == "taken from the file extrope.json of folder"
    assert read_settings(taken).raw == ("cache" in entry)


@pytest.mark.parametrize("own", [YARN, None], ids=str)
def test_an_entry_of_the_configuration_wins(own):
    given = {"extrope": own}
    taken, said = take_saved(given, "folder", content(RERO))
    assert taken is given
    assert said == "additional_config's entry is taken, not extrope.json of folder"


@pytest.mark.parametrize(
    ("stored", "got"),
    [
        (content(RERO, RERO), "one score method at most, got rerope, rerope"),
        (content(), "must hold an extension, and one score method at most, got none"),
        (b"{}", "must hold what an extension has saved, got KeyError"),
        (b"no JSON", "must hold what an extension has saved, got JSONDecodeError"),
    ],
)
def test_what_no_entry_can_stand_for(stored, got):
    with pytest.raises(ValueError, match=rf"^extrope: extrope\.json of folder .*{got}"):
        take_saved({}, "folder", stored)


def test_all_layers_where_some_have_a_window():
    windows = SimpleNamespace(layer_types=["sliding_attention", "full_attention"])
    linear = SimpleNamespace(layer_types=["linear_attention", "full_attention"])
    everywhere = content(YARN, layers="all")
    for text in (windows, SimpleNamespace(sliding_window=24)):
        with pytest.raises(ValueError, match=r"must be of layers='full' .* got 'all'"):
            check_layers("folder", everywhere, text)
        check_layers("folder", content(YARN), text)
    for text in (linear, SimpleNamespace()):
        check_layers("folder", everywhere, text)


@pytest.mark.parametrize("methods", [[RERO], [YARN], [YARN, RERO]], ids=str)
def test_an_engine_generates_as_the_model_that_was_saved(tmp_path, monkeypatch, methods):
    pytest.importorskip("vllm.version")  # this folder is a "vllm", too
    from support.vllm_engines import build, difference, engine, expected, generated, tokens_of

    from extrope_kernels.integrations.transformers import extend
    from extrope_kernels.integrations.vllm.plugin import LOGGER

    model, said = build("Llama", tmp_path / "plain"), []
    plain, want = expected(model, []), expected(model, methods)
    ref = expected(copy.deepcopy(model).double(), methods)
    folder = tmp_path / "saved"
    handles = [extend(model, **each) for each in methods]
    handles[-1].save_pretrained(folder)
    monkeypatch.setattr(LOGGER, "info", lambda line, *values: said.append(line % values))
    with engine(folder, None) as llm:  # longer than its configuration says
        got = generated(llm)
    assert tokens_of(got) == tokens_of(want)
    assert difference(got, ref) <= 2 * difference(want, ref)
    assert difference(got, plain) > 0.01
    taken, loaded = said
    assert taken == f"extrope: taken from the file extrope.json of {folder}"
    assert loaded.startswith(f"extrope: {methods[-1]['method']} ")
