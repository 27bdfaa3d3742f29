"""Facts about a model and the arguments of its forwards that every part needs, and our errors."""

from __future__ import annotations

import inspect
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

# A module, the name of an attribute, and the value that hides the class's own.
Override = tuple[nn.Module, str, Any]
# The reason why a model has no layers to extend; its longest distances are all trained.
BOUNDED = "all its layers that rotate have a sliding window or chunks"

in_progress = threading.local()  # the state of each thread's forwards: `generate` says what it has


def generation_config_owner(model: nn.Module) -> nn.Module:
    """Return the model of transformers in a wrapper (PEFT's, torch.compile's), which generates.

    It generates also if the wrapper is called or removed; an encoder beside it has no `generate`.
    """
    from transformers import PreTrainedModel

    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    return next((part for part in parts if hasattr(part, "generate")), model)


def adapters_of(model: nn.Module) -> dict[str, Any]:
    """Return PEFT's configurations of a model's adapters by name, in its wrapper or without."""
    found = (getattr(each, "peft_config", None) for each in model.modules())
    return next((dict(each) for each in found if isinstance(each, Mapping)), {})


def no_model(op: str, given: object) -> TypeError:
    """Return the error for what is no model, with what to pass in its place."""
    text = f"{op}: model must be a loaded model of transformers, got {type(given).__name__}"
    if isinstance(given, str | os.PathLike):
        name = os.fspath(given)
        load = f"AutoModelForCausalLM.from_pretrained({name!r})"
        command = f", or on a command line: extrope check {name}" if op == "check" else ""
        return TypeError(f"{text}; load it: {load}{command}")
    if isinstance(getattr(given, "model", None), nn.Module):  # a pipeline, a trainer, a handle
        text += "; pass its .model"
    return TypeError(text)


def unsupported(owner: nn.Module, reason: str) -> ValueError:
    """Return the error that says why a model cannot be extended."""
    return ValueError(f"extend: {type(owner).__name__} is not a supported architecture: {reason}")


def reprefix_error(error: Exception) -> Exception:
    """Return another function's error with `extend` as its beginning."""
    return type(error)(f"extend: {str(error).partition(': ')[2]}")


def argument_names(module: nn.Module) -> list[str]:
    """Return the names of a forward's arguments in their order."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


def forward_of(module: nn.Module) -> FunctionType | None:
    """Return the function behind a module's forward, or None if it is not Python's."""
    forward = inspect.unwrap(type(module).forward)
    return forward if isinstance(forward, FunctionType) else None


def by_name(names: Sequence[str], args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return all arguments of a forward by their names."""
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def tokens_of(arguments: Mapping[str, Any]) -> Tensor:
    """Return a model's tokens, (batch, seqlen) of ids or (batch, seqlen, hidden_size)."""
    ids = arguments.get("input_ids")
    return arguments.get("inputs_embeds") if ids is None else ids


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """Return the cache given to a model, or None: its name changed within version 5."""
    cache = arguments.get("cache")
    return arguments.get("past_key_values") if cache is None else cache


def tokens_in(cache: Any) -> int:
    """Return a cache's number of tokens; 0 for None."""
    if cache is None:
        return 0
    if past := int(cache.get_seq_length()):
        return past
    # MiniMax's first layers have states, so the cache calls itself empty.
    layers = getattr(cache, "layers", ())
    return max((int(x.get_seq_length()) for x in layers if hasattr(x, "get_seq_length")), default=0)


def caches_in(output: Any) -> Iterator[Any]:
    """Yield the caches that a model returns."""
    if output is None:  # it raised an error
        return
    for value in output.values() if isinstance(output, Mapping) else output:
        if hasattr(value, "get_seq_length"):
            yield value


def exports_to_onnx() -> bool:
    """Return True if a graph is made for ONNX, which has only PyTorch's own operations."""
    onnx = None if torch.compiler.is_dynamo_compiling() else sys.modules.get("torch.onnx")
    return onnx is not None and onnx.is_in_onnx_export()
