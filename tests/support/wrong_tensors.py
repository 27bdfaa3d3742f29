"""What tensors and frequencies must not be, by what they are."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from support.right_calls import FREQS

from extrope_kernels import methods

NOT_A_NUMBER = {
    "text": "4",
    "bytes": b"4",
    "list": [4],
    "complex": 4 + 1j,
    "dict": {},
    "type": int,
    "tensor": torch.ones(2),
}
NOT_ABOVE_0 = {"0": 0.0, "-1": -1.0, "nan": math.nan, "inf": math.inf, "huge": 10**400}


def not_rows(x: torch.Tensor) -> dict:
    """What can be wrong with (batch, seqlen, heads, head_dim), whatever the other tensors are."""
    return {
        "text": "text",
        "number": 1.0,
        "list": x.tolist(),
        "array": x.cpu().numpy(),
        "meta": x.to("meta"),
        "int": x.int(),
        "bool": x.bool(),
        "complex": x.to(torch.complex64),
        "float8": x.to(torch.float8_e4m3fn),
        "sparse": x.to_sparse(),
        "nested": torch.nested.nested_tensor(list(x.unbind())),
        "scalar": x.sum(),
        "row": x.flatten(),
        "no batch": x[0],
        "five dimensions": x[None],
        "strided": torch.stack((x, x), -1)[..., 0],
    }


def not_like(x: torch.Tensor) -> dict:
    """What does not go with the other tensors."""
    return {
        **not_rows(x),
        "None": None,
        "half": x.half(),
        "double": x.double(),
        "batch": x[:1],
        "batch 3": torch.cat((x, x[:1])),
        "no sequences": x[:0],
        "head_dim": x[..., :8].contiguous(),
        "no dims": x[..., :0],
    }


def not_ints(x: torch.Tensor) -> dict:
    """What an int32 tensor of x's shape must not be."""
    return {
        "text": "text",
        "half": 2.5,
        "True": True,
        "list": [1, 2],
        "meta": x.to("meta"),
        "sparse": x.to_sparse(),
        "float": x.double(),
        "float16": x.half(),
        "bool": x.bool(),
        "complex": x.to(torch.complex64),
        "uint8": x.to(torch.uint8),
        "longer": torch.cat((x, x)),
        "shape": x.view(1, 1, 1, *x.shape),
        "scalar": x.flatten()[0],
    }


def not_factors(x: torch.Tensor) -> dict:
    """What a float32 tensor of x's shape must not be."""
    return {
        **{name: value for name, value in NOT_A_NUMBER.items() if name != "tensor"},
        "number": 1.0,
        "True": True,
        "meta": x.to("meta"),
        "sparse": x.to_sparse(),
        "half": x.half(),
        "double": x.double(),
        "int": x.int(),
        "complex": x.to(torch.complex64),
        "longer": torch.cat((x, x)),
        "shorter": x[..., :0],
        "shape": x.view(1, 1, *x.shape),
        "scalar": x.flatten()[0],
    }


def not_freqs() -> dict:
    inv_freq = FREQS.inv_freq
    wrong = {"None": None, "tensor": inv_freq, "text": "yarn", "function": methods.rope}
    fields = {
        "inv_freq": {
            "meta": inv_freq.to("meta"),
            "half": inv_freq.half(),
            "int": inv_freq.int(),
            "complex": inv_freq.to(torch.complex64),
            "sparse": inv_freq.to_sparse(),
            "scalar": inv_freq[0],
            "empty": inv_freq[:0],
            "longer": torch.cat((inv_freq, inv_freq)),
            "rows": inv_freq.expand(5, 8).contiguous(),
            "heads": inv_freq.expand(1, 3, 8).contiguous(),
            "4-D": inv_freq.view(1, 1, 1, 8),
            "strided": torch.stack((inv_freq, inv_freq), -1)[..., 0],
        },
        "attention_factor": {**NOT_A_NUMBER, **NOT_ABOVE_0, "None": None, "True": True},
        "log_decay": {
            "number": 1.0,
            "list": [0.0] * 8,
            "meta": inv_freq.to("meta"),
            "double": inv_freq.double(),
            "shorter": inv_freq[:3],
            "rows": inv_freq[None],
        },
        "axes": {
            "list": [0] * 8,
            "meta": inv_freq.int().to("meta"),
            "long": inv_freq.long(),
            "shorter": inv_freq[:3].int(),
            "rows": inv_freq.int()[None],
            "strided": inv_freq.int().repeat(2)[::2],
        },
    }
    for field, values in fields.items():
        for name, value in values.items():
            wrong[f"{field} {name}"] = replace(FREQS, **{field: value})
    return wrong
