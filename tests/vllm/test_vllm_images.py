"""Models that see images: the language model rotates by the method, the encoder as ever.

Log-probabilities of a prompt with an image in it, as in test_vllm_methods; but vLLM's encoders have
products of their own, so an engine's error may be four times that of transformers.
"""

from __future__ import annotations

import copy

import pytest

pytest.importorskip("vllm.version")  # this folder is a "vllm", too

from support.vllm_engines import engine
from support.vllm_images import build, prompt_logprobs

YARN = {"method": "yarn", "factor": 4.0}
OPTIONS = {"skip_tokenizer_init": False, "limit_mm_per_prompt": {"image": 1}}
METHODS = {
    "Qwen2_5_VL": [YARN, {"method": "ntk_aware", "factor": 4.0}],
    "Qwen3VL": [{**YARN, "by_axis": [0]}],
    "Llava": [YARN, {"method": "rerope", "window": 64}],
}


@pytest.mark.parametrize("name", METHODS)
def test_images(name, tmp_path):
    seen = build(name, tmp_path)
    exact = copy.deepcopy(seen.model).double()
    plain = seen.logprobs(exact, [])
    for method in None, *METHODS[name]:
        methods = [] if method is None else [method]
        want, ref = (seen.logprobs(model, methods) for model in (seen.model, exact))
        extrope = {"score": method} if method and method["method"] == "rerope" else method
        with engine(tmp_path, extrope, **OPTIONS) as llm:
            got = prompt_logprobs(llm, seen)
        error, theirs = ((x - ref).abs().max().item() for x in (got, want))
        print(f"{name} {method}: {error:.1e}, transformers {theirs:.1e}")
        assert error <= 4 * theirs
        assert method is None or (got - plain).abs().max() > 0.1
