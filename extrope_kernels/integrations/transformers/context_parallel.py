"""A model over a mesh: ranks share its tokens, and every layer attends across ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..._usage import shortened
from .._shared.parameters import is_bounded
from .attention import softmax_options
from .batch import Batch
from .batch.padded import full_mask, no_mask
from .model import cache_of, reprefix_error, tokens_of, unsupported
from .patch.hooks import Patches
from .patch.rotary_forward import RotaryForward
from .probe.attention import (
    ARGUMENT,
    Call,
    attend_as_own,
    calls_in,
    check_options,
    no_freqs,
    refuse_options,
)
from .probe.layers import (
    LayerProbe,
    Recorder,
    first_call,
    kind_of,
    mixes,
    probe_layers,
    refuse_without_weights,
    window_of_cache,
)
from .probe.rotary import argument_names, by_name

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
        last: list = []
        for owner in owners:
            refuse_without_weights(owner, "a mesh")
            layers = _rotating_by_themselves(model, owner, patches.probe)
            hooks = SharedHooks(owner, self, layers)
            first.append((owner, hooks.before_forward, None))
            for layer, call in layers.items():
                patches.overrides += call.overrides(layer)
            last += [(layer, hooks.before_layer, None) for layer in layers]
        patches.hooks = first + patches.hooks + last
        patches.then = [partial(_try_patched, model, owners)]

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        """Return itself: copies of a model attend across the same ranks."""
        return self

    def positions(self, tokens: Tensor) -> Tensor:
        """Return the positions of this rank's tokens: (1, seqlen / P) int64."""
        return self.distributed.local_positions(
            tokens.shape[1] * self.size, self.mesh, balance=self.balance, device=tokens.device
        )[None]

    def batch(self, tokens: Tensor) -> SharedBatch:
        """Return this rank's tokens of a forward."""
        return SharedBatch(self, self.positions(tokens))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **call: Any) -> Tensor:
        """Attend from this rank's queries to the keys of all ranks; tensors in the ops' layout."""
        mesh = {"mesh": self.mesh, "strategy": self.strategy, "balance": self.balance}
        return self.distributed.rope_attention(q, k, v, rotated="k", **mesh, **call)


@dataclass(frozen=True, eq=False)
class SharedBatch(Batch):
    """This rank's tokens of a forward, and the ranks that share their sequences.

    positions: (1, seqlen / P) int64.
    """

    shared: Shared
    positions: Tensor

    def for_layer(self, layer: nn.Module, arguments: dict[str, Any], attention: Any) -> Any:
        return by_its_name(layer, arguments, attention)

    def attend(
        self, layer: nn.Module, q: Tensor, k: Tensor, v: Tensor, call: dict[str, Any]
    ) -> Tensor:
        if "chunk_size" in call:
            raise ValueError(
                "extend: layers with chunks must not be extended over a mesh, got "
                f"{type(layer).__name__}"
            )
        return self.shared.attend(q, k, v, **call)


class SharedHooks:
    """Hooks around the forwards of a model whose tokens are spread over ranks.

    They are the attention too, in the mask's place, of layers that rotate by themselves.
    """

    def __init__(
        self, owner: nn.Module, shared: Shared, rotating: Mapping[nn.Module, Call]
    ) -> None:
        self.shared = shared
        self.calls = rotating
        self.argument_names = argument_names(owner)
        self.layer_argument_names = {layer: argument_names(layer) for layer in rotating}

    def before_forward(
        self, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        """Set this rank's positions and drop the mask: forward pre-hook of the owner."""
        arguments = by_name(self.argument_names, args, kwargs)
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
        _refuse_padding(full_mask(arguments.get("attention_mask")))
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
        arguments |= {"use_cache": False, "attention_mask": no_mask(tokens.device)}
        return (), arguments

    def before_layer(
        self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        """Hand the attention to a layer that rotates by itself: its forward pre-hook."""
        arguments = by_name(self.layer_argument_names[layer], args, kwargs)
        arguments = self.calls[layer].with_attention(layer, arguments, self)
        return (), by_its_name(layer, arguments, self)

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, options: Mapping[str, Any]
    ) -> Tensor:
        """Attend across ranks; q, k, v: (batch, heads, seqlen / P, head_dim), rotated."""
        refuse_options(module, options)
        q, k, v = (x.transpose(1, 2).to(v.dtype) for x in (q, k, v))
        return self.shared.attend(q, k, v, freqs=no_freqs(q), **softmax_options(module, options))


def by_its_name(layer: nn.Module, arguments: dict[str, Any], attention: Any) -> dict[str, Any]:
    """Return a layer's arguments, with the attention among those that it passes on, if it does."""
    named = {ARGUMENT: attention} if "kwargs" in argument_names(layer) else {}
    return arguments | named


def _refuse_padding(mask: Any) -> None:
    """Refuse a mask with padding; mask: a model's, of all tokens or of this rank's."""
    if mask is None or (isinstance(mask, Tensor) and mask.shape[-2:] == (1, 1)):
        return
    if not isinstance(mask, Tensor) or mask.dim() != 2 or not bool(mask.all()):
        raise ValueError(
            "extend: attention_mask must be None or (batch, seqlen) of ones over a mesh, "
            "got zeros or another mask"
        )


def _refuse_labels(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Refuse labels without shift_labels, which the loss would shift within a rank's tokens."""
    arguments = by_name(argument_names(module), args, kwargs)
    if arguments.get("labels") is not None and arguments.get("shift_labels") is None:
        raise ValueError(
            "extend: labels must come with shift_labels over a mesh, got labels alone; "
            "shift them before they are sharded"
        )


def _rotating_by_themselves(
    model: nn.Module, owner: nn.Module, probe: LayerProbe | None
) -> dict[nn.Module, Call]:
    """Return an owner's attention layers except those that a score method extends.

    probe: what that method found; None without one.
    Raises ValueError if a token depends on others in any other way.
    """
    if probe is not None:
        calls, seen, mixed, known = probe.calls, probe.seen, probe.others_mix, probe.far
    else:
        calls, known = calls_in(owner), {}
        recorder = Recorder(calls)
        try:
            with recorder.in_place():
                there = probe_layers(first_call(model, owner))
                back = probe_layers(first_call(model, owner), backwards=True)
        except Exception as error:  # a foreign model may raise anything
            reason = f"its layers cannot be tried out on four tokens ({shortened(error)})"
            raise unsupported(owner, reason) from error
        seen, mixed = recorder.seen, mixes(there, back)
    if mixed:
        raise unsupported(
            owner,
            "over a mesh tokens must meet in attention alone, which an op replaces",
        )
    found = {layer: calls[layer] for layer in seen if layer not in known}
    for layer, call in found.items():
        given, name = seen[layer], type(layer).__name__
        if "sliding_window" not in softmax_options(layer, given.options):
            if is_bounded(kind_of(layer)):
                raise unsupported(owner, f"{name} attends in chunks, which a mesh does not support")
            if window_of_cache(owner, layer):
                raise unsupported(
                    owner, f"{name} has a window that it does not hand to its attention"
                )
        check_options(owner, layer, given.options)
        qkv = given.q, given.k, given.v
        attend_as_own(owner, layer, call, qkv, no_freqs(given.q), {}, given)
    return found


def _try_patched(model: nn.Module, owners: Sequence[nn.Module]) -> Patches:
    """Run four tokens, to find what a model does between its rotary embedding and its layers."""
    for owner in owners:
        try:
            probe_layers(first_call(model, owner))
        except ValueError as error:  # raised by the attention over the mesh
            raise reprefix_error(error) from None
        except Exception as error:  # a foreign model may raise anything
            raise unsupported(owner, f"it does not run over a mesh ({shortened(error)})") from error
    return Patches()
