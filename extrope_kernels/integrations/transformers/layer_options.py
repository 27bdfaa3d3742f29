"""What a layer tells the function that computes its attention, and what of it cannot be served."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

# What the ops are told too, or what changes nothing for a layer that is causal over all keys.
KNOWN = {
    *("scaling", "dropout", "is_causal", "softcap", "s_aux", "sliding_window", "position_ids"),
    *("use_cache", "output_attentions", "output_hidden_states", "return_dict"),
    "output_router_logits",
}


def softmax_options(module: nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the layer tells its attention, in the words of the ops."""
    found = {"softmax_scale": options.get("scaling")}
    if found["softmax_scale"] is None:
        found["softmax_scale"] = getattr(module, "scaling", None)
    if options.get("softcap") is not None:
        found["softcap"] = float(options["softcap"])
    if options.get("s_aux") is not None:
        sinks = options["s_aux"]
        found["sinks"] = sinks.to(torch.promote_types(sinks.dtype, torch.float32))
    # Qwen2 MoE's layers leave their window to the mask.
    if window := options.get("sliding_window", getattr(module, "sliding_window", None)):
        found["sliding_window"] = window
    return found


def refuse_options(module: nn.Module, options: Mapping[str, Any], packed: bool = False) -> None:
    """Raise ValueError for what would change the attention and can be switched on at any time.

    packed: the rows are, and say where sequences begin.
    """
    if options.get("dropout"):
        raise ValueError(
            "extend: a model in training must have attention_dropout 0, "
            f"got {options['dropout']} in {type(module).__name__}"
        )
    if options.get("cu_seq_lens_q") is not None and not packed:
        raise ValueError("extend: sequences must come as rows, got cu_seq_lens_q of packed ones")
