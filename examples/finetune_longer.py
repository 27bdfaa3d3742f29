"""Fine-tune a model to eight times its context with YaRN, or with ReRoPE.

A tiny Llama learns the bytes of Python's own library in pieces of 64, is extended, and is
fine-tuned for some steps on pieces of 512. It shows the loss past the training length before and
after, and that an extended model trains like any other: its attention has gradients.

    python examples/finetune_longer.py [yarn | rerope]
"""

import argparse
import random
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from extrope_kernels.integrations.transformers import extend

SHORT, LONG = 64, 512
METHODS = {"yarn": {"factor": LONG / SHORT}, "rerope": {"window": SHORT // 2}}


def library_bytes() -> torch.Tensor:
    """Return the source of two modules, as token ids 0 to 255."""
    text = b"".join(Path(module.__file__).read_bytes() for module in (argparse, random))
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def draw(text: torch.Tensor, count: int, length: int) -> torch.Tensor:
    starts = torch.randint(len(text) - length, (count,)).tolist()
    return torch.stack([text[start : start + length] for start in starts])


def train(model: LlamaForCausalLM, text: torch.Tensor, steps: int, length: int, lr: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for step in range(steps):
        ids = draw(text, 16 * SHORT // length + 2, length)
        found = model(ids, labels=ids).loss
        found.backward()
        if step % 10 == 0:
            print(f"    step {step} of {steps}: loss {found.item():.2f}", flush=True)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def loss(model: LlamaForCausalLM, ids: torch.Tensor) -> str:
    """Return the loss in nats per byte, of the first SHORT bytes and of the last SHORT."""
    logits = model(ids).logits[:, :-1].transpose(1, 2)
    each = torch.nn.functional.cross_entropy(logits, ids[:, 1:], reduction="none")
    return f"first {SHORT} bytes {each[:, :SHORT].mean():.2f}, last {each[:, -SHORT:].mean():.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("method", nargs="?", default="yarn", choices=METHODS)
    method = parser.parse_args().method
    torch.manual_seed(0)
    text = library_bytes()
    held_out = draw(text[-8192:], 8, LONG)
    text = text[:-8192]
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=SHORT,
    )
    model = LlamaForCausalLM(config)
    train(model, text, steps=150, length=SHORT, lr=3e-3)
    print(f"trained on pieces of {SHORT}:      {loss(model, held_out)}", flush=True)
    with extend(model, method, **METHODS[method]):
        print(f"extended by {method}:          {loss(model, held_out)}", flush=True)
        train(model, text, steps=20, length=LONG, lr=1e-3)
        print(f"fine-tuned on pieces of {LONG}: {loss(model, held_out)}", flush=True)


if __name__ == "__main__":
    main()
