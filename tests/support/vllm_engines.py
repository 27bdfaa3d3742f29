"""Tiny random models in vLLM's engines, and what transformers with `extend` makes of them."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import Any

import torch

from extrope_kernels.integrations.transformers import extend

# Before vLLM is imported: one process, one thread, no network.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
VOCAB = 128
TRAINED = 128  # tokens
LENGTH = 512  # of the engines
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": TRAINED,
    # Large enough for the attention to depend on positions as that of a trained model does.
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,  # vLLM and transformers disagree on what happens behind one
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
# Longer than TRAINED, shorter, and one token behind a page of 32.
PROMPTS = [
    torch.randint(4, VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist()
    for n in (300, 37, 181, 33)
]
NEW = 8


def build(name: str, folder: Any, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model of transformers' class of that name, saved for vLLM."""
    import transformers

    kind = f"{name}TextConfig" if name == "Gemma3" else f"{name}Config"
    config = getattr(transformers, kind)(**SIZES | changes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(dtype).eval()
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    return model


def save_tokenizer(folder: Any) -> None:
    """A tokenizer of words for servers, which want one."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["The", "river", "runs", "past", "the", "mill,", "and", "mill", "grinds", "corn"]
    words += ["for", "village."]
    words += [f"w{i}" for i in range(VOCAB - len(words))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


@torch.no_grad()
def expected(model: Any, methods: list[dict[str, Any]], prompts: list[list[int]] = PROMPTS) -> Any:
    """Greedy tokens behind each prompt, and the log-probabilities of the prompts' tokens.

    methods: the arguments of `extend`, one after another.
    """
    handles = [extend(model, **method) for method in methods]
    try:
        return [_one(model, prompt) for prompt in prompts]
    finally:
        for handle in handles[::-1]:
            handle.restore()


def _one(model: Any, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    ids = torch.tensor([prompt])
    logprobs = model(ids).logits[0].float().log_softmax(-1)
    of_prompt = logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0]
    new = model.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    return new[0, len(prompt) :].tolist(), of_prompt


@contextmanager
def engine(folder: Any, extrope: dict[str, Any] | None, **options: Any):
    """An engine of vLLM over a saved model."""
    from vllm import LLM

    settings = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": LENGTH,
        "max_num_batched_tokens": 64,  # prompts come in chunks, beside decode steps of others
        "max_num_seqs": 4,
        "skip_tokenizer_init": True,
        "block_size": 32,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
    }
    if extrope is not None:
        options["additional_config"] = {"extrope": extrope}
    llm = LLM(str(folder), **settings | options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def generated(llm: Any, prompts: list[list[int]] = PROMPTS, logprobs: bool = True) -> Any:
    """What an engine makes of prompts, all at once, as `expected` gives it."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0.0,
        max_tokens=NEW,
        ignore_eos=True,
        detokenize=False,
        prompt_logprobs=0 if logprobs else None,
    )
    outs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    found = []
    for prompt, out in zip(prompts, outs, strict=True):
        of_prompt = None
        if logprobs:
            pairs = zip(prompt[1:], out.prompt_logprobs[1:], strict=True)
            of_prompt = torch.tensor([given[token].logprob for token, given in pairs])
        found.append((list(out.outputs[0].token_ids), of_prompt))
    return found


def difference(one: Any, other: Any) -> float:
    """The largest difference of log-probabilities."""
    return max((a[1] - b[1]).abs().max().item() for a, b in zip(one, other, strict=True))


def tokens_of(results: Any) -> list[list[int]]:
    """The greedy tokens alone."""
    return [tokens for tokens, _ in results]
