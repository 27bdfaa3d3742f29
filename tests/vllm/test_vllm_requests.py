"""What a request may ask for beside tokens: drafts, several completions, LoRA."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("vllm.version")  # this folder is a "vllm", too

from support.vllm_engines import PROMPTS, engine, expected, generated, logits_behind, tokens_of

from extrope_kernels.integrations.transformers import extend

RERO = {"method": "rerope", "window": 64}
YARN = {"method": "yarn", "factor": 4.0}
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_min": 1,
    "prompt_lookup_max": 2,
}


def greedy(model, method, prompt, count):
    """What transformers writes behind a prompt under `extend`."""
    ids = torch.tensor([prompt])
    with extend(model, **method), torch.no_grad():
        out = model.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("method", [YARN, RERO], ids=lambda method: method["method"])
def test_drafts_from_the_prompt(llama, method, monkeypatch):
    """Several tokens of a request in one step, some of them taken back.

    In a process of its own: vLLM 0.32 makes no engine more in one that has loaded numba.
    """
    model, folder = llama
    # What the model writes begins to repeat itself by then.
    firsts = [PROMPTS[1] * 4, PROMPTS[0][:150]]
    written = [greedy(model, method, prompt, 64) for prompt in firsts]
    prompts = [p + w[:n] for p, w in zip(firsts, written, strict=True) for n in (60, 64)]
    want = expected(model, [method], prompts)
    extrope = method if method is YARN else {"score": method}
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    options = {"speculative_config": NGRAM, "disable_log_stats": False}
    with engine(folder, extrope, **options) as llm:
        got = generated(llm, prompts, logprobs=False)
        counts = {each.name: each for each in llm.get_metrics()}
    drafted, accepted = (
        counts[f"vllm:spec_decode_num_{name}_tokens"].value for name in ("draft", "accepted")
    )
    assert tokens_of(got) == tokens_of(want)
    assert 0 < accepted < drafted


def save_lora(model, folder, rank=8):
    """Save an adapter of the queries and keys, as PEFT does; return the model with it merged."""
    model, weights = copy.deepcopy(model), {}
    generator = torch.Generator().manual_seed(5)
    for i, layer in enumerate(model.model.layers):
        for name in "q_proj", "k_proj":
            weight = getattr(layer.self_attn, name).weight.data
            down, up = (
                torch.randn(size, generator=generator) * 0.2
                for size in ((rank, weight.shape[1]), (weight.shape[0], rank))
            )
            weight += up @ down
            key = f"base_model.model.model.layers.{i}.self_attn.{name}"
            weights |= {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none"}
    config |= {"target_modules": ["q_proj", "k_proj"], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(weights, folder / "adapter_model.safetensors")
    return model


def test_lora_and_several_completions(llama, tmp_path):
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    model, folder = llama
    merged = save_lora(model, tmp_path)
    want = expected(merged, [RERO])
    assert tokens_of(want) != tokens_of(expected(model, [RERO]))
    several = SamplingParams(n=3, max_tokens=8, ignore_eos=True, detokenize=False, logprobs=0)
    with engine(folder, {"score": RERO}, enable_lora=True, max_lora_rank=8) as llm:
        got = generated(llm, logprobs=False, lora_request=LoRARequest("adapter", 1, str(tmp_path)))
        (out,) = llm.generate([{"prompt_token_ids": PROMPTS[1]}], several, use_tqdm=False)
    assert tokens_of(got) == tokens_of(want)
    assert len({tuple(each.token_ids) for each in out.outputs}) == 3
    for each in out.outputs:
        tokens = list(each.token_ids)
        logprobs = logits_behind(model, [RERO], PROMPTS[1], tokens).log_softmax(-1)
        logprobs = logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        found = torch.tensor(
            [given[t].logprob for t, given in zip(tokens, each.logprobs, strict=True)]
        )
        torch.testing.assert_close(found, logprobs, atol=1e-4, rtol=0)
