"""Tiny random transformers models, and their logits with exact rotations, for the tests."""

from __future__ import annotations

import copy
import inspect
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from packaging.version import Version
from support import score_examples
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from extrope_kernels import RopeFreqs

transformers = pytest.importorskip("transformers")
transformers.utils.logging.set_verbosity_error()

TRAINED = 32  # tokens
LAYERS = 2
VOCAB = 128
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": TRAINED,
    # Large enough for the attention to depend on positions as that of a trained model does.
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 1, "sliding_window": 24},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 24},
    "gemma": {"num_key_value_heads": 1, "head_dim": 32},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 32, "sliding_window": 24},
    "gemma3_text": {
        "num_key_value_heads": 2,
        "head_dim": 32,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi": {"partial": 0.5},
    "gpt_neox": {"partial": 0.25},
    "cohere": {"num_key_value_heads": 2},  # interleaved pairs
}
# What `build` needs for the families' layers to attend to all keys, without soft-capping.
ATTENDING: dict[str, dict[str, Any]] = {family: {} for family in FAMILIES} | {
    "mistral": {"sliding_window": None},
    "gemma2": {"attn_logit_softcapping": None},
}
# For each score method the parameters that `extend` takes; relative positions are the oracle's.
# The first, which meets every family, stores rotated keys.
SCORE_PARAMETERS: dict[str, dict[str, Any]] = {
    name: score_examples.EXAMPLES[name].parameters
    for name in sorted(score_examples.EXAMPLES, key=lambda name: name != "self_extend")
}
PLAIN = {"rope_type": "default"}
# What a model's cache is called, as an argument and in its output: it was renamed within version 5.
CACHE = "cache"
if CACHE not in inspect.signature(transformers.LlamaForCausalLM.forward).parameters:
    CACHE = "past_key_values"


def pairs(firsts: Iterable[Any], seconds: Iterable[Any]) -> list[Any]:
    """The first of each with all of the other: no grid."""
    (first, *others), (second, *more) = firsts, seconds
    return [(first, second), *((first, each) for each in more), *((x, second) for x in others)]


def since(version: str, reason: str) -> None:
    """Skip a test that an older transformers cannot pass, for a reason of its own."""
    if Version(transformers.__version__) < Version(version):
        pytest.skip(f"before transformers {version} {reason}")


def build(family: str, rope: dict[str, Any] | None = None, **sizes: Any) -> nn.Module:
    """Return an AutoModelForCausalLM whose weights depend on the family and the sizes alone."""
    settings = SIZES | FAMILIES.get(family, {}) | sizes
    parameters = {"rope_theta": 10000.0} | (rope or PLAIN)
    if (partial := settings.pop("partial", None)) is not None:
        parameters["partial_rotary_factor"] = partial
    if family == "gemma3_text":
        if parameters["rope_type"] == "yarn":
            since("5.14", "YaRN of one kind of layers is not read")
        local = PLAIN | {"rope_theta": 1000.0}
        parameters = {"full_attention": parameters, "sliding_attention": local}
    config = transformers.AutoConfig.for_model(family, **settings, rope_parameters=parameters)
    torch.manual_seed(0)
    # Its cap is no part of PyTorch's attention, which old versions choose all the same.
    own = {"attn_implementation": "eager"} if family == "gemma2" else {}
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, **own).eval()


def rotary_dim(family: str) -> int:
    """Return the rotary dimension of the models that `build` makes."""
    head_dim = FAMILIES[family].get("head_dim", 16)
    return int(head_dim * FAMILIES[family].get("partial", 1))


def rotary_of(model: nn.Module) -> nn.Module:
    """Return the one rotary embedding of a model."""
    (rotary,) = (m for m in model.modules() if hasattr(m, "rope_type"))
    return rotary


def freqs_of(model: nn.Module) -> RopeFreqs:
    """Return the frequencies that transformers' own rotary embedding holds at this moment."""
    rotary = rotary_of(model)
    prefix = "full_attention_" if isinstance(rotary.rope_type, dict) else ""
    inv_freq = getattr(rotary, f"{prefix}inv_freq").clone()
    return RopeFreqs(inv_freq, getattr(rotary, f"{prefix}attention_scaling"))


def tokens(batch: int, seqlen: int, seed: int = 1) -> Tensor:
    """Return token ids without the padding token: (batch, seqlen) int64."""
    return torch.randint(3, VOCAB, (batch, seqlen), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor, **inputs: Any) -> Tensor:
    """Return the logits of a forward without a cache."""
    return model(input_ids=ids, use_cache=False, **inputs).logits


def generate(model: nn.Module, ids: Tensor, **settings: Any) -> Tensor:
    """Return the logits of the tokens that greedy decoding adds: (batch, new tokens, vocab)."""
    output = model.generate(
        ids,
        **{"attention_mask": torch.ones_like(ids), "do_sample": False, **settings},
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.stack(output.logits, 1)


def gradients(model: nn.Module, ids: Tensor, **inputs: Any) -> dict[str, Tensor]:
    """Return the gradient of the mean next-token loss to every weight."""
    model.zero_grad()
    model(input_ids=ids, labels=ids, **inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def exact(model: nn.Module, freqs: RopeFreqs) -> nn.Module:
    """Return a float64 copy of a model that rotates by tables of `freqs` made in float64."""
    model = copy.deepcopy(model).double()
    rotary = rotary_of(model)
    local = getattr(rotary, "sliding_attention_inv_freq", None)
    interleaved = "Cohere" in type(rotary).__name__

    def forward(x, position_ids, layer_type=None):
        is_local = layer_type == "sliding_attention"
        inv_freq = local if is_local else freqs.inv_freq
        angles = position_ids[..., None].double() * inv_freq.double()
        if interleaved:
            angles = angles.repeat_interleave(2, dim=-1)
        else:
            angles = torch.cat((angles, angles), dim=-1)
        amplitude = 1.0 if is_local else freqs.attention_factor
        return angles.cos() * amplitude, angles.sin() * amplitude

    rotary.forward = forward
    return model


def error(got: Tensor, want: Tensor) -> float:
    """Return the largest absolute difference."""
    return (got.double() - want.double()).abs().max().item()


def assert_as_exact_as(ours: Tensor, theirs: Tensor, want: Tensor) -> None:
    """Our error is at most twice that of transformers, plus one rounding of the largest logit."""
    ulp = torch.finfo(ours.dtype).eps * 2.0 ** math.floor(math.log2(want.abs().max().item()))
    assert error(ours, want) <= 2 * error(theirs, want) + ulp


def assert_same(got: Tensor, want: Tensor) -> None:
    """The same tokens, and in float64 the same logits but for the order of some sums."""
    assert torch.equal(got.argmax(-1), want.argmax(-1))
    torch.testing.assert_close(got, want)


class CountOps(TorchDispatchMode):
    """Counts ops by their full names inside a `with` block; elements: of the largest tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.counts[str(func)] += 1
        made = [x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.elements = max(self.elements, *made, 0)
        return out

    def of(self, *prefixes: str) -> int:
        return sum(n for name, n in self.counts.items() if name.startswith(prefixes))

    @property
    def rotations(self) -> int:
        """Calls of the rotary op."""
        return self.of("extrope.rope_fwd")

    @property
    def tables(self) -> int:
        return self.of("aten.cos.", "aten.sin.")
