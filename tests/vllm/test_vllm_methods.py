"""An engine of vLLM gives what transformers gives under `extend`.

Four prompts at once, in chunks beside decode steps. Log-probabilities are held against the same
model in float64: the engine's error is at most twice that of transformers in the engine's dtype.
The frequencies of every method are those of test_vllm_settings.py; here is what an engine does with
them: amplitudes, decays, its own length.
"""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("vllm.version")  # this folder is a "vllm", too

from support.vllm_engines import (
    LENGTH,
    PROMPTS,
    SIZES,
    build,
    difference,
    engine,
    expected,
    generated,
    rms,
    tokens_of,
)

from extrope_kernels.integrations._shared.parameters import PARAMETERS
from extrope_kernels.methods import METHODS
from extrope_kernels.scores import SCORES

PAIRS = SIZES["head_dim"] // 2
FREQUENCIES = {
    "rope": {},
    "yarn": {"factor": 4.0},
    "dynamic_ntk": {"factor": 2.0},
    "xpos": {},
    "longrope": {
        "short_factor": [1 + 0.01 * i for i in range(PAIRS)],
        "long_factor": [2.0 + i for i in range(PAIRS)],
        "factor": 4.0,
    },
}
# Of the prompts 300 and 181 tokens are past every window, 37 and 33 past none.
SCORE_METHODS = {
    "rerope": {"window": 64},
    "leaky_rerope": {"window": 64, "factor": 4.0},
    "self_extend": {"window": 64, "factor": 4},
    "dual_chunk": {"chunk_size": 96, "local_window": 32},
    "blockwise_causal": {"block_size": 48},
    "string": {"window": 16, "shift": 48},
    "dpe": {"window": 64, "group_sizes": [1 + n % 5 for n in range(PAIRS)]},
}


@pytest.fixture(scope="module")
def tiny(llama):
    """A Llama, its folder, and the same in float64."""
    return *llama, copy.deepcopy(llama[0]).double()


@pytest.fixture(scope="module")
def plain(tiny):
    return expected(tiny[0], [])


def for_extend(name, parameters):
    """What an engine takes from max_model_len, `extend` is told."""
    length = {"seq_len": LENGTH} if "seq_len" in PARAMETERS[name] else {}
    return {"method": name, **parameters, **length}


def check(tiny, methods, extrope, plain, **options):
    with engine(tiny[1], extrope, **options) as llm:
        got = generated(llm)
    assert_as_exact(tiny, methods, got)
    return difference(got, plain)


def assert_as_exact(tiny, methods, got, prompts=PROMPTS, of="of_prompt"):
    model, _, exact = tiny
    want, ref = (expected(each, methods, prompts) for each in (model, exact))
    assert tokens_of(got) == tokens_of(want)
    # New tokens are few, so their largest error is held against that over the prompts as well.
    theirs = max(difference(want, ref, each) for each in {of, "of_prompt"})
    error = difference(got, ref, of)
    print(f"{methods}: {error:.1e}, transformers {theirs:.1e}")
    assert error <= 2 * theirs


@pytest.mark.parametrize("method", FREQUENCIES)
def test_frequencies(tiny, plain, method):
    parameters = FREQUENCIES[method]
    changed = check(tiny, [for_extend(method, parameters)], {"method": method, **parameters}, plain)
    assert method == "rope" or changed > 0.1


def test_resonance(tiny, plain):
    yarn = {"method": "yarn", "factor": 4.0, "resonance": True}
    assert check(tiny, [yarn], yarn, plain) > 0.1


@pytest.mark.parametrize("method", SCORES)
def test_scores_and_cached_prefixes(tiny, plain, method):
    score = {"method": method, **SCORE_METHODS[method]}
    longer = [PROMPTS[0] + PROMPTS[1], PROMPTS[0] + PROMPTS[3]]
    with engine(tiny[1], {"score": score}, enable_prefix_caching=True) as llm:
        got = generated(llm)
        again = generated(llm, longer, logprobs=False)
    assert_as_exact(tiny, [score], got)
    assert difference(got, plain) > 0.1
    assert all(each.cached >= len(PROMPTS[0]) // 32 * 32 for each in again)
    assert_as_exact(tiny, [score], again, longer, "of_new")
    assert difference(again, expected(tiny[0], [], longer), "of_new") > 0.01


def test_frequencies_and_score(tiny, plain):
    yarn = {"method": "yarn", "factor": 4.0}
    score = {"method": "rerope", "window": 64, "log_n": 128.0}
    assert check(tiny, [yarn, score], {**yarn, "score": score}, plain) > 0.1


def test_xpos_with_positions_that_start_anew(tiny, plain):
    xpos = {"method": "xpos"}
    score = {"method": "blockwise_causal", "block_size": 48}
    assert check(tiny, [xpos, score], {**xpos, "score": score}, plain) > 0.1


@pytest.mark.parametrize("method", ["rerope", "leaky_rerope", "dual_chunk"])
def test_fp8_caches(tiny, method):
    """As far off as vLLM's own kernels are with plain RoPE, which the rounding alone makes."""
    _, folder, exact = tiny
    score = {"method": method, **SCORE_METHODS[method]}
    errors = []
    for extrope, methods in (({"method": "rope"}, []), ({"score": score}, [score])):
        with engine(folder, extrope, kv_cache_dtype="fp8") as llm:
            errors.append(rms(generated(llm), expected(exact, methods)))
    theirs, ours = errors
    print(f"{extrope} in fp8: {ours:.2f}, vLLM's own {theirs:.2f}")
    assert 0.01 < ours <= 1.25 * theirs


def test_compiled(tiny, plain):
    yarn = {"method": "yarn", "factor": 4.0}
    assert check(tiny, [yarn], yarn, plain, enforce_eager=False) > 0.1
    score = {"method": "rerope", "window": 64}
    assert check(tiny, [score], {"score": score}, plain, enforce_eager=False) > 0.1


@pytest.mark.parametrize("name", ["yarn", "rerope"])
def test_bf16(tmp_path, name):
    model = build("Llama", tmp_path, torch.bfloat16)
    method = {"method": name, **(FREQUENCIES | SCORE_METHODS)[name]}
    want, ref = (expected(m, [method]) for m in (model, copy.deepcopy(model).double()))
    extrope = method if name in METHODS else {"score": method}
    with engine(tmp_path, extrope, dtype="bfloat16") as llm:
        got = generated(llm)
    error, theirs = difference(got, ref), difference(want, ref)
    print(f"{extrope}: {error:.1e}, transformers {theirs:.1e}")
    assert error <= 2 * theirs
