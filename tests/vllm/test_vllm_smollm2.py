"""SmolLM2 in vLLM, past the window of a score method, as in transformers; a tuned folder."""

from __future__ import annotations

import copy
import textwrap
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm.version")  # this folder is a "vllm", too

from support.vllm_engines import NEW, difference, engine, expected, generated, tokens_of
from transformers import AutoModelForCausalLM

from extrope_kernels.evaluation import UsageError, models, packages
from extrope_kernels.integrations.transformers import extend, extend_from_saved

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


def test_a_tuned_folder_gives_the_same_tokens_to_each_client(smollm2, tmp_path):
    """Extended, tuned by adapters, saved; read by transformers, vLLM and lm-eval."""
    peft = pytest.importorskip("peft")
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance

    from extrope_kernels.evaluation.lm_eval.model import ExtropeLM

    model, _, (_, prompt) = smollm2
    tokenizer = models.load_tokenizer(models.find_model(packages.SMOLLM2))
    text = tokenizer.decode(prompt)
    assert tokenizer(text)["input_ids"] == prompt
    tuned = copy.deepcopy(model)
    handle = extend(tuned, "rerope", window=128)
    adapted = peft.get_peft_model(tuned, peft.LoraConfig(target_modules="all-linear"))
    steps = torch.optim.AdamW(adapted.parameters(), lr=1e-3)
    ids = torch.tensor([prompt])
    losses = []
    for _ in range(3):
        losses.append(adapted(ids, labels=ids).loss)
        losses[-1].backward()
        steps.step()
        steps.zero_grad()
    assert losses[-1] < losses[0]
    tuned = adapted.merge_and_unload().eval()
    (want,) = expected(tuned, [], [prompt])
    handle.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    (plain,) = expected(again := AutoModelForCausalLM.from_pretrained(tmp_path), [], [prompt])
    assert (plain.of_prompt - want.of_prompt).abs().max() > 0.1
    extend_from_saved(again, tmp_path)
    assert tokens_of(expected(again, [], [prompt])) == [want.tokens]
    with engine(tmp_path, None, **SIZES) as llm:
        assert tokens_of(generated(llm, [prompt])) == [want.tokens]
    lm = ExtropeLM(str(tmp_path), device="cpu", dtype="float32")
    asked = (text, {"until": [], "max_gen_toks": NEW, "do_sample": False})
    (written,) = lm.generate_until([Instance("generate_until", {}, asked, 0)])
    assert written == tokenizer.decode(want.tokens)
