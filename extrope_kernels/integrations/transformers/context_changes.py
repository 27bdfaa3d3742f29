"""What `extend` changes for a mesh, and whether a model can be spread over one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...ops.attention import attend
from ...scores import SCORES
from .._shared.kinds import is_bounded
from .._shared.parameters import PARAMETERS
from .._shared.plain import PLAIN, no_freqs
from .architecture import RotarySite, kind_of, shortened, unsupported
from .calls import Call, calls_in
from .context_parallel import Shared, SharedForward, in_region, refuse_labels
from .forwards import argument_names, by_name
from .layer_options import softmax_options
from .layers import check_options, close, compare_with_own
from .rotary import Rotary
from .score_methods import ScoreForward
from .trial import Recorded, Recorder, entrance, run_on_trial


def share(
    model: nn.Module, sites: list[RotarySite], shared: Shared, overrides: list, hooks: list
) -> tuple[list, list]:
    """Add to a method's overrides and hooks what a mesh needs; nothing is changed yet."""
    for _, _, value in overrides:
        if isinstance(value, Rotary):
            value.shared = shared
    forwards = [getattr(before, "__self__", None) for _, before, _ in hooks]
    far = {layer for each in forwards if isinstance(each, ScoreForward) for layer in each.heads}
    first: list = [(model, refuse_labels, None)] if "labels" in argument_names(model) else []
    last: list = []
    for owner in {site.owner: None for site in sites}:
        layers = _rotating_by_themselves(model, owner, far)
        forward = SharedForward(owner, shared, layers)
        first.append((owner, forward.before_forward, None))
        for layer, call in layers.items():
            overrides += call.overrides(layer)
        last += [(layer, forward.before_layer, None) for layer in layers]
    return overrides, first + hooks + last


def refuse_second_mesh(sites: list[RotarySite], method: str) -> None:
    """Raise ValueError where an extension before this one is over a mesh."""
    for site in sites:
        before = vars(site.rotary).get("forward")
        if isinstance(before, Rotary) and before.shared is not None:
            raise ValueError(
                f"extend: an extension over a mesh must be the last, got {method} after "
                f"{before.method}; restore that one first"
            )


class RegionGuard:
    """Raises in a region of torch's `context_parallel` where a model has no mesh.

    The region shards tokens and replaces PyTorch's attention, so the model would compute something
    else: everywhere but for frequencies that no length changes, at positions that are sharded too.
    """

    def __init__(self, method: str) -> None:
        self.why = ""
        if method in SCORES:
            self.why = f"{method} does not attend by PyTorch's function"
        elif "seq_len" in PARAMETERS[method]:
            self.why = f"{method} would take the length of a rank's tokens for the sequence's"

    def before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the owner."""
        if torch.compiler.is_compiling() or not in_region():
            return
        given = by_name(argument_names(module), args, kwargs).get("position_ids")
        if self.why or given is None:
            raise ValueError(
                "extend: a model in a region of torch's context_parallel must be extended with a "
                f"mesh, got one without; {self.why or 'position_ids are not given'}"
            )


def _rotating_by_themselves(
    model: nn.Module, owner: nn.Module, known: Collection[nn.Module]
) -> dict[nn.Module, Call]:
    """Return an owner's attention layers but for the known ones, which a score method extends.

    Raises ValueError where a token depends on others in any other way. Four tokens go through the
    model, and the same backwards, with an attention that gives every token its own value: what
    comes out must be the same backwards.
    """
    calls = calls_in(owner)
    recorder = Recorder(calls)
    try:
        with recorder.in_place():
            there = _hidden(run_on_trial(entrance(model, owner)))
            back = _hidden(run_on_trial(entrance(model, owner), backwards=True))
    except Exception as error:  # whatever a foreign model leads to
        reason = f"its layers cannot be tried out on four tokens ({shortened(error)})"
        raise unsupported(owner, reason) from error
    if not close(there, back.flip(1)):
        raise unsupported(
            owner,
            "over a mesh all that makes one token of others must be attention that an op replaces",
        )
    found = {layer: calls[layer] for layer in recorder.seen if layer not in known}
    for layer, call in found.items():
        _check(owner, layer, call, recorder.seen[layer])
    return found


def _check(owner: nn.Module, layer: nn.Module, call: Call, got: Recorded) -> None:
    """Raise ValueError where a layer that rotates by itself does what the op does not."""
    if is_bounded(kind_of(layer)) and not got.options.get("sliding_window"):
        raise unsupported(owner, f"{type(layer).__name__} sees chunks, which a mesh does not have")
    check_options(owner, layer, got.options)
    q, k, v = (x.transpose(1, 2).to(got.v.dtype) for x in (got.q, got.k, got.v))
    with torch.no_grad():
        options = softmax_options(layer, got.options)
        out = attend(PLAIN, q, k, v, no_freqs(q), op="extend", **options)
    compare_with_own(owner, layer, call, out, got)


def _hidden(output: Any) -> Tensor:
    return next(iter(output.values())) if isinstance(output, Mapping) else output[0]
