"""Guards against trainers that compare a plain model, and torch's regions."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import nn

from .patches import ON_OWNER
from .saved import save_beside_adapters


class Guard:
    """The hook that looks at the few forwards that need it.

    why: the method is wrong in a region of torch's `context_parallel`, "" if positions make it
        right; None over a mesh. trainers: look for one.
    """

    def __init__(self, why: str | None, trainers: bool) -> None:
        self.why = why
        self.looked = not trainers

    def before_forward(self, module: nn.Module, arguments: dict[str, Any]) -> None:
        """Look at the callers and at PyTorch's attention: hook before the owner's forward."""
        if torch.compiler.is_compiling():
            return
        attention = getattr(nn.functional.scaled_dot_product_attention, "__module__", None) or ""
        if self.why is not None and attention.startswith("torch.distributed"):
            refuse_region(arguments.get("position_ids"), self.why)
        training = module.training and torch.is_grad_enabled()
        if not self.looked and (training or "trl" in sys.modules):
            self.looked = look_for_trainer(module)


def refuse_region(given: Any, why: str) -> None:
    """Raise in a region of torch's `context_parallel` if the model would compute something else.

    The region shards tokens and replaces PyTorch's attention. Only frequencies that no length
    changes are right, at positions that are sharded too.

    given: the forward's position_ids. why: the method is wrong in any case; "" if it is not.
    """
    if why or given is None:
        raise ValueError(
            "extend: a model in a region of torch's context_parallel must be extended with a "
            f"mesh, got one without; {why or 'position_ids are not given'}"
        )


def look_for_trainer(owner: nn.Module) -> bool:
    """Warn of a trainer among the callers whose reference is not extended; return True if seen.

    TRL's trainers load `ref_model` anew from the model's folder, so the losses of DPO and the
    divergence of GRPO would be those of two different models. The log-probabilities that they
    compute before the training are kept under a hash of dataset and weights.

    Outside a training, which every trainer begins with, only TRL's are looked for. Adapters of PEFT
    that were added since keep the extension.
    """
    training = owner.training and torch.is_grad_enabled()
    if training:
        save_beside_adapters()
    for frame in _callers():
        if not training and not str(frame.f_globals.get("__name__")).startswith("trl."):
            continue
        trainer = frame.f_locals.get("self")
        held = getattr(trainer, "__dict__", {})
        reference, name = held.get("ref_model"), type(trainer).__name__
        if isinstance(reference, nn.Module) and not any(
            ON_OWNER in vars(each) for each in reference.modules()
        ):
            _warn(
                f"ref_model of {name} is the plain model, this one is extended: call "
                "handle.extend(trainer.ref_model) before train() and evaluate()"
            )
        if held.get("precompute_ref_logps"):
            _warn(
                f"{name} keeps precomputed reference log-probabilities by dataset and weights, not "
                "by the extension: after a run under another one they are that one's. Leave "
                "precompute_ref_log_probs out, or empty datasets' cache first"
            )
        if "ref_model" in held:
            return True
    return training


def _callers() -> Iterator[FrameType]:
    frame = inspect.currentframe()
    while frame is not None:
        yield frame
        frame = frame.f_back


def _warn(text: str) -> None:
    warnings.warn(f"extend: {text}", stacklevel=4)
