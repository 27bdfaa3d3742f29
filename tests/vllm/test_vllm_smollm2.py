"""SmolLM2 in vLLM, past the window of a score method, as in transformers."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

pytest.importorskip("vllm.version")  # this folder is a "vllm", too

from support.vllm_engines import difference, engine, expected, generated, tokens_of

from extrope_kernels.evaluation import UsageError, models, packages

PROMPT_TOKENS = 1000
SIZES = {"max_model_len": 2048, "max_num_batched_tokens": 512, "block_size": 128}
METHODS = {
    "yarn": {"method": "yarn", "factor": 2.0},
    "rerope": {"method": "rerope", "window": 256},
}


@pytest.fixture(scope="module")
def smollm2():
    """The model, its folder, and a text of the standard library."""
    try:
        files = models.find_model(packages.SMOLLM2)
    except UsageError as error:
        pytest.skip(str(error))
    model, tokenizer = models.load_model(files, "float32", "cpu"), models.load_tokenizer(files)
    model.generation_config.eos_token_id = None
    text = Path(textwrap.__file__).read_text()
    ids = tokenizer(text)["input_ids"][:PROMPT_TOKENS]
    return model, files.folder, [ids, ids[:400]]


@pytest.mark.parametrize("name", METHODS)
def test_smollm2(smollm2, name):
    model, folder, prompts = smollm2
    method = METHODS[name]
    plain = expected(model, [], prompts)
    want = expected(model, [method], prompts)
    extrope = {"score": method} if name == "rerope" else method
    with engine(folder, extrope, **SIZES) as llm:
        got = generated(llm, prompts)
    assert tokens_of(got) == tokens_of(want)
    found, changed = difference(got, want), difference(want, plain)
    print(f"{name}: {found:.1e}, plain {changed:.1e}")
    # Both are in float32; they add in other orders, the logits of 30 layers over 49,152 words.
    assert found < changed / 100
