"""Raw caches: frequencies of each request by its present length."""

from __future__ import annotations

import copy

import pytest
import torch
from test_vllm_settings import RERO, SEEING, YARN, config

from extrope_kernels import methods, scores
from extrope_kernels.integrations.vllm.engine import make_engine
from extrope_kernels.integrations.vllm.lengths import Lengths
from extrope_kernels.integrations.vllm.settings import describe, read_settings

NTK = {"method": "dynamic_ntk", "factor": 2.0}
DYNAMIC = {"method": "dynamic_yarn"}
RAW = {"cache": "raw"}


def lengths_of(extrope, text=()):
    engine = make_engine(config(extrope, text))
    kinds = {name: kind.by_length for name, kind in engine.kinds.items() if kind.by_length}
    return Lengths(kinds, engine.settings.scale_from, 4, 64, "cpu")


def update(lengths, totals, queries=None):
    queries = queries or [1] * len(totals)
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    lengths.update(starts, torch.tensor(totals, dtype=torch.int32))


@pytest.mark.parametrize("resonance", [False, True])
@pytest.mark.parametrize("extrope", [NTK, DYNAMIC], ids=lambda entry: entry["method"])
def test_frequencies_are_those_of_each_requests_length(extrope, resonance):
    totals = [5, 128, 129, 400]
    lengths = lengths_of({**extrope, **RAW, "resonance": resonance})
    update(lengths, totals)
    rows = lengths.inv_freq(None, 4)
    for n, row in zip(totals, rows, strict=True):
        names = {"dynamic_ntk": "max_position_embeddings"}
        trained = names.get(extrope["method"], "original_max_position_embeddings")
        parameters = {**extrope, trained: 128, "base": 1e4, "seq_len": n}
        want = methods.METHODS[parameters.pop("method")](32, **parameters)
        want = methods.resonance(want) if resonance else want
        # To an ulp: NTK's power of the base is taken in float32 for a tensor.
        torch.testing.assert_close(row, want.inv_freq, atol=0, rtol=4e-6)
        scale = lengths.query_scale(None, False, 4)
        squared = want.attention_factor**2
        assert scale is None if extrope is NTK else scale[totals.index(n)] == pytest.approx(squared)
    plain = methods.rope(32, base=1e4).inv_freq
    plain = methods.resonance(methods.rope(32, base=1e4)).inv_freq if resonance else plain
    assert torch.equal(rows[0], plain) and torch.equal(rows[1], plain)
    pointer = rows.data_ptr()
    update(lengths, [600, 7], [1, 20])
    assert lengths.inv_freq(None, 2).data_ptr() == pointer and torch.equal(rows[1], plain)


def test_amplitudes_and_temperatures_multiply():
    dual = {"method": "dual_chunk", "chunk_size": 96, "local_window": 32}
    score = dual | {"original_max_position_embeddings": 64}
    lengths = lengths_of({**DYNAMIC, **RAW, "score": score})
    update(lengths, [300, 3], [2, 1])
    got, alone = (lengths.query_scale(None, scored, 3) for scored in (True, False))
    n = torch.tensor([299.0, 300.0, 3.0]).double()
    of_score = (0.1 * (n / 64).log() + 1).clamp(min=1) ** 2
    of_method = (0.1 * (torch.tensor([300.0, 300.0, 1.0]).double() / 128).log() + 1).clamp(
        min=1
    ) ** 2
    torch.testing.assert_close(got.double(), of_score * of_method, atol=0, rtol=2e-7)
    torch.testing.assert_close(alone.double(), of_method, atol=0, rtol=2e-7)


def test_a_model_without_a_trained_length_takes_the_given_one():
    given = {**NTK, **RAW, "max_position_embeddings": 64}
    lengths = lengths_of(given, {"max_position_embeddings": None})
    update(lengths, [64, 65])
    within, past = lengths.inv_freq(None, 2)
    plain = methods.rope(32, base=1e4).inv_freq
    assert torch.equal(within, plain) and not torch.equal(past, plain)


def test_a_given_amplitude_is_that_of_all_lengths():
    lengths = lengths_of({**DYNAMIC, **RAW, "attention_factor": 1.5}, {})
    update(lengths, [300])
    assert lengths.query_scale(None, False, 1) is None
    (kind,) = make_engine(config({**DYNAMIC, **RAW, "attention_factor": 1.5})).kinds.values()
    assert kind.freqs.attention_factor == 1.5


def test_settings():
    read = read_settings({"extrope": {**NTK, **RAW}})
    assert read.raw and read.attends and read.parameters == {"factor": 2.0}
    assert not read_settings({"extrope": YARN}).attends
    assert describe({"extrope": {**NTK, **RAW}}) == "dynamic_ntk factor=2.0, keys cached raw"
    read = read_settings({"extrope": {"score": RERO, **RAW}})
    assert read.raw and read.score == scores.rerope(64)


PARTLY = {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}


@pytest.mark.parametrize(
    ("extrope", "text", "model", "message"),
    [
        (NTK | {"cache": "raws"}, {}, {}, "cache must be 'raw' or left out, got 'raws'"),
        (NTK | {"cache": True}, {}, {}, "cache must be 'raw' or left out, got True"),
        (RAW, {}, {}, "must have a method, a score or both"),
        ({"method": "xpos", **RAW}, {}, {}, r"no decay \(xpos\) with a raw cache"),
        (DYNAMIC | RAW, PARTLY, {}, "must have attention_factor for heads that rotate in part"),
        (DYNAMIC | RAW | {"mscale": 1.0}, {}, {}, "must have attention_factor .* mscale"),
        (NTK | RAW, {}, SEEING, "tokens must have one position for .* a raw cache"),
        (NTK | RAW, {"no_rope_layers": [1, 0]}, {}, "all layers must rotate for .* a raw cache"),
    ],
)
def test_refused(extrope, text, model, message):
    with pytest.raises(ValueError, match=f"^extrope: .*{message}"):
        make_engine(config(extrope, text, model))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """One layer: what a cached prefix holds of it, keys and values, depends on no frequencies."""
    pytest.importorskip("vllm.version")  # this folder is a "vllm", too
    from support.vllm_engines import build

    folder = tmp_path_factory.mktemp("llama")
    return build("Llama", folder, num_hidden_layers=1), folder


@torch.no_grad()
def step_by_step(model, chain, prompt):
    """Greedy tokens behind a prompt, each by a forward of its own, by frequencies of its length."""
    from contextlib import ExitStack

    from support.vllm_engines import NEW, Written

    from extrope_kernels.integrations.transformers import extend

    tokens, logprobs = list(prompt), []
    for _ in range(NEW):
        with ExitStack() as stack:
            for method in chain:
                by_length = {} if "window" in method else {"seq_len": len(tokens)}
                stack.callback(extend(model, **method, **by_length).restore)
            logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].float()
        logprobs.append(logits.log_softmax(-1).amax())
        tokens.append(logits.argmax().item())
    return Written(tokens[len(prompt) :], None, torch.stack(logprobs))


@pytest.fixture(scope="module")
def plain(tiny):
    """What vLLM makes of short requests: two that begin alike, and one of another beginning."""
    from support.vllm_engines import PROMPTS, engine, generated

    prefix = PROMPTS[0][:96]
    short = [prefix + PROMPTS[1][:12], prefix + PROMPTS[2][:20], PROMPTS[3]]
    with engine(tiny[1], None) as llm:
        return short, generated(llm, short, logprobs=False)


@pytest.mark.parametrize(
    "extrope", [NTK, DYNAMIC, NTK | {"score": RERO}], ids=["ntk", "yarn", "both"]
)
def test_requests_of_different_lengths_share_a_prefix(tiny, plain, extrope):
    """Prompts in chunks, steps of all at once, every page of the prefix that of a shorter one."""
    from support.vllm_engines import PROMPTS, difference, engine, generated, tokens_of

    model, folder = tiny
    short, theirs = plain
    long = [short[0][:96] + PROMPTS[2], short[0][:96] + PROMPTS[0][50:100]]
    chain = [
        {k: v for k, v in extrope.items() if k != "score"},
        *filter(None, [extrope.get("score")]),
    ]
    exact = copy.deepcopy(model).double()
    want, ref = ([step_by_step(m, chain, p) for p in (*long, *short)] for m in (model, exact))
    with engine(folder, extrope | RAW, enable_prefix_caching=True) as llm:
        generated(llm, short[:1], logprobs=False)
        got = generated(llm, [*long, *short], logprobs=False)
    assert all(each.cached >= 96 for each in got[:-1])
    assert tokens_of(got) == tokens_of(want)
    assert difference(got, ref, "of_new") <= 2 * difference(want, ref, "of_new") + 1e-6
    if "score" not in extrope:
        assert tokens_of(got[2:]) == tokens_of(theirs)
        assert difference(got[2:], theirs, "of_new") < 1e-4
        frozen = [step_by_step(model, [], p) for p in long]
        assert difference(got[:2], frozen, "of_new") > 0.01
