"""A model over a mesh: ranks share its tokens, and every layer attends across ranks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..._usage import shortened
from .._shared.parameters import is_bounded
from .attention import ON_LAYER, ExtendedLayer, attending_overrides, softmax_options
from .layers import (
    LayerProbe,
    attend_as_own,
    check_options,
    first_call,
    kind_of,
    mixes,
    recorded,
    refuse_without_weights,
    run_on_four_tokens,
    window_of_cache,
)
from .model import argument_names, cache_of, reprefix_error, tokens_of, unsupported
from .patches import Patches
from .rotation import RotaryForward

if TYPE_CHECKING:
    from ...distributed.attention import Strategy
    from ...distributed.layout import Balance, Mesh


class Shared:
    """The ranks that share a sequence with this one, and their strategy."""

    def __init__(self, mesh: Mesh, strategy: Strategy, balance: Balance) -> None:
        # Imported only with a mesh: it takes half a second, and not every torch has it.
        from ... import distributed

        try:  # checks mesh and balance; the strategy is checked in its first use
            distributed.local_positions(0, mesh, balance=balance)
        except (TypeError, ValueError) as error:
            raise reprefix_error(error) from None
        self.distributed = distributed
        self.mesh = mesh
        self.strategy = strategy
        self.balance = balance

    @property
    def size(self) -> int:
        return self.mesh.size()

    def share(self, model: nn.Module, owners: Sequence[nn.Module], patches: Patches) -> None:
        """Add the changes of a mesh to a method's; the model is not changed yet."""
        for _, _, value in patches.overrides:
            if isinstance(value, RotaryForward):
                value.shared = self
        first: list = [(model, _refuse_labels, None)] if "labels" in argument_names(model) else []
        for owner in owners:
            refuse_without_weights(owner, "a mesh")
            layers = _rotating_by_themselves(model, owner, patches.probe)
            first.append((owner, SharedHooks(owner, self).before_forward, None))
            shared = ExtendedLayer(shared=self)
            patches.overrides += [(layer, ON_LAYER, shared) for layer in layers]
            patches.overrides += attending_overrides(owner, layers)
        patches.hooks = first + patches.hooks
        for _, name, value in patches.overrides:
            if name == ON_LAYER:
                value.shared = self
        patches.then = [partial(_try_patched, model, owners)]

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        """Return itself: copies of a model attend across the same ranks."""
        return self

    def positions(self, tokens: Tensor) -> Tensor:
        """Return the positions of this rank's tokens: (1, seqlen / P) int64."""
        return self.distributed.local_positions(
            tokens.shape[1] * self.size, self.mesh, balance=self.balance, device=tokens.device
        )[None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **call: Any) -> Tensor:
        """Attend from this rank's queries to the keys of all ranks; tensors in the ops' layout."""
        mesh = {"mesh": self.mesh, "strategy": self.strategy, "balance": self.balance}
        return self.distributed.rope_attention(q, k, v, **mesh, **call)


class SharedHooks:
    """The hook of a model whose tokens are spread over ranks."""

    def __init__(self, owner: nn.Module, shared: Shared) -> None:
        self.shared = shared
        self.argument_names = argument_names(owner)

    def before_forward(self, module: nn.Module, arguments: dict[str, Any]) -> None:
        """Set this rank's positions and drop the mask: hook before the owner's forward."""
        tokens = tokens_of(arguments)
        if cache_of(arguments) is not None or arguments.get("use_cache"):
            raise ValueError(
                "extend: a model over a mesh must run without a cache, got one; restore it to "
                "generate"
            )
        if self.shared.balance is not None and tokens.shape[1] % 2:
            raise ValueError(
                "extend: input_ids must have an even number of tokens on every rank in zigzag, "
                f"got {tokens.shape[1]}"
            )
        _refuse_padding(arguments.get("attention_mask"))
        positions = self.shared.positions(tokens)
        given = arguments.setdefault("position_ids", positions)
        if given is None:
            arguments["position_ids"] = positions
        elif given.shape[-1] != positions.shape[-1] or not bool((given == positions).all()):
            raise ValueError(
                "extend: position_ids must be those of `distributed.local_positions` with "
                f"balance={self.shared.balance!r}, got others"
            )
        if "cache_position" in self.argument_names:  # an older transformers' temperatures read it
            arguments["cache_position"] = positions[0]
        # A finished mask, so that transformers builds none.
        no_mask = torch.ones(1, 1, 1, 1, device=tokens.device)
        arguments |= {"use_cache": False, "attention_mask": no_mask}


def _refuse_padding(mask: Any) -> None:
    """Refuse a mask with padding; mask: a model's, of all tokens or of this rank's."""
    if mask is None or (isinstance(mask, Tensor) and mask.shape[-2:] == (1, 1)):
        return
    if not isinstance(mask, Tensor) or mask.dim() != 2 or not bool(mask.all()):
        raise ValueError(
            "extend: attention_mask must be None or (batch, seqlen) of ones over a mesh, "
            "got zeros or another mask"
        )


def _refuse_labels(module: nn.Module, arguments: dict[str, Any]) -> None:
    """Refuse labels without shift_labels, which the loss would shift within a rank's tokens."""
    if arguments.get("labels") is not None and arguments.get("shift_labels") is None:
        raise ValueError(
            "extend: labels must come with shift_labels over a mesh, got labels alone; "
            "shift them before they are sharded"
        )


def _rotating_by_themselves(
    model: nn.Module, owner: nn.Module, probe: LayerProbe | None
) -> list[nn.Module]:
    """Return an owner's attention layers except those that a score method extends.

    probe: what that method found; None without one.
    Raises ValueError if a token depends on others in any other way.
    """
    if probe is not None:
        seen, mixed, known = probe.seen, probe.others_mix, probe.far
    else:
        recorder, known = recorded(model, owner), {}
        seen, mixed = recorder.seen, mixes(recorder.output)
    if mixed:
        raise unsupported(
            owner,
            "over a mesh tokens must meet in attention alone, which an op replaces",
        )
    found = [layer for layer in seen if layer not in known]
    for layer in found:
        given, name = seen[layer], type(layer).__name__
        if "sliding_window" not in softmax_options(layer, given.options):
            if is_bounded(kind_of(layer)):
                raise unsupported(owner, f"{name} attends in chunks, which a mesh does not support")
            if window_of_cache(owner, layer):
                raise unsupported(
                    owner, f"{name} has a window that it does not hand to its attention"
                )
        check_options(owner, layer, given.options)
        attend_as_own(owner, layer, given)
    return found


def _try_patched(model: nn.Module, owners: Sequence[nn.Module]) -> Patches:
    """Run four tokens, to find what a model does between its rotary embedding and its layers."""
    for owner in owners:
        try:
            run_on_four_tokens(first_call(model, owner))
        except ValueError as error:  # raised by the attention over the mesh
            raise reprefix_error(error) from None
        except Exception as error:  # a foreign model may raise anything
            raise unsupported(owner, f"it does not run over a mesh ({shortened(error)})") from error
    return Patches()
