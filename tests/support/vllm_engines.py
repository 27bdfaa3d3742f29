"""Tiny random models in vLLM's engines, and what transformers with `extend` makes of them."""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from extrope_kernels.integrations.transformers import extend

# Before vLLM is imported: one process, one thread, no network.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
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


class Written(NamedTuple):
    """What comes behind one prompt.

    tokens: greedy ones.
    of_prompt, of_new: the log-probabilities of the prompt's tokens but its first, and of `tokens`.
    cached: how many of the prompt's tokens an engine had in its cache.
    """

    tokens: list[int]
    of_prompt: torch.Tensor | None
    of_new: torch.Tensor
    cached: int = 0


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
def expected(
    model: Any, methods: list[dict[str, Any]], prompts: list[list[int]] = PROMPTS
) -> list[Written]:
    """What transformers makes of prompts, one after another.

    methods: the arguments of `extend`, one after another.
    """
    with ExitStack() as stack:
        for method in methods:
            stack.callback(extend(model, **method).restore)
        return [_one(model, prompt) for prompt in prompts]


def _one(model: Any, prompt: list[int]) -> Written:
    ids = torch.tensor([prompt])
    logprobs = model(ids).logits[0].float().log_softmax(-1)
    of_prompt = logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0]
    options = {"output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}
    out = model.generate(ids, max_new_tokens=NEW, do_sample=False, **options)
    of_new = torch.cat(out.logits).float().log_softmax(-1).amax(-1)
    return Written(out.sequences[0, len(prompt) :].tolist(), of_prompt, of_new)


@torch.no_grad()
def logits_behind(
    model: Any, methods: list[dict[str, Any]], prompt: list[int], tokens: list[int]
) -> torch.Tensor:
    """(tokens, words): from what transformers under `extend` would choose each of the tokens."""
    with ExitStack() as stack:
        for method in methods:
            stack.callback(extend(model, **method).restore)
        logits = model(torch.tensor([prompt + tokens[:-1]])).logits[0]
    return logits[len(prompt) - 1 :].float()


def regret(logits: torch.Tensor, tokens: list[int]) -> float:
    """How much less than the best logit that of a token is, at most."""
    chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return (logits.amax(-1) - chosen).max().item()


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
    plain = extrope is None and not Path(folder, "extrope.json").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1" if plain else "0")
        llm = LLM(str(folder), **settings | options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


def generated(
    llm: Any, prompts: list[list[int]] = PROMPTS, logprobs: bool = True, **options: Any
) -> list[Written]:
    """What an engine makes of prompts, all at once.

    logprobs: those of the prompts, too, for which vLLM computes all of a prompt anew.
    options: of vLLM's `generate`.
    """
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0.0,
        max_tokens=NEW,
        ignore_eos=True,
        detokenize=False,
        logprobs=0,
        prompt_logprobs=0 if logprobs else None,
    )
    ids = [{"prompt_token_ids": p} for p in prompts]
    outs = llm.generate(ids, params, use_tqdm=False, **options)
    found = []
    for prompt, out in zip(prompts, outs, strict=True):
        new = out.outputs[0]
        of_prompt = _of_tokens(prompt[1:], out.prompt_logprobs[1:]) if logprobs else None
        of_new = _of_tokens(new.token_ids, new.logprobs)
        found.append(Written(list(new.token_ids), of_prompt, of_new, out.num_cached_tokens))
    return found


def _of_tokens(tokens: Any, logprobs: Any) -> torch.Tensor:
    pairs = zip(tokens, logprobs, strict=True)
    return torch.tensor([given[token].logprob for token, given in pairs])


def difference(one: list[Written], other: list[Written], of: str = "of_prompt") -> float:
    """The largest difference of log-probabilities."""
    pairs = [(getattr(a, of), getattr(b, of)) for a, b in zip(one, other, strict=True)]
    return max((a - b).abs().max().item() for a, b in pairs)


def rms(one: list[Written], other: list[Written]) -> float:
    """The root mean square difference of the prompts' log-probabilities."""
    given, wanted = (torch.cat([each.of_prompt for each in results]) for results in (one, other))
    return (given - wanted).square().mean().sqrt().item()


def tokens_of(results: list[Written]) -> list[list[int]]:
    """The greedy tokens alone."""
    return [each.tokens for each in results]
