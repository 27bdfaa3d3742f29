"""A model whose tokens are spread over ranks: every layer attends round the group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ... import RopeFreqs
from ...scores import Score
from .._shared.plain import PLAIN, no_freqs
from .calls import Call
from .forwards import argument_names, by_name, cache_of, tokens_of
from .layer_options import refuse_options, softmax_options
from .rotation import ARGUMENT
from .rows import full_mask, no_mask

if TYPE_CHECKING:
    from ...distributed.attend import Strategy
    from ...distributed.layout import Balance, Mesh


class Shared:
    """The ranks that share a sequence with this one, and how they attend."""

    def __init__(self, mesh: Mesh, strategy: Strategy, balance: Balance) -> None:
        # Imported where there is a mesh: it takes half a second, and not every torch has it.
        from ... import distributed

        try:  # refuses a wrong mesh or balance; a strategy is, as it is used
            distributed.local_positions(0, mesh, balance=balance)
        except (TypeError, ValueError) as error:
            _, _, refusal = str(error).partition(": ")
            raise type(error)(f"extend: {refusal}") from None
        self.distributed = distributed
        self.mesh = mesh
        self.strategy = strategy
        self.balance = balance

    @property
    def size(self) -> int:
        return self.mesh.size()

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        """Copies of a model attend round the same group."""
        return self

    def positions(self, tokens: Tensor) -> Tensor:
        """(1, seqlen / P) int64, of this rank's tokens."""
        return self.distributed.local_positions(
            tokens.shape[1] * self.size, self.mesh, balance=self.balance, device=tokens.device
        )[None]

    def rows(self, tokens: Tensor) -> SharedRows:
        """The rows of a forward, none of which has padding."""
        return SharedRows(self, self.positions(tokens))

    def attend(
        self, score: Score, q: Tensor, k: Tensor, v: Tensor, freqs: RopeFreqs, **options: Any
    ) -> Tensor:
        """Attend from this rank's queries to the keys of all; tensors as the ops take them."""
        options = {"op": "extend", **options}
        return self.distributed.attend(
            score,
            q,
            k,
            v,
            freqs,
            mesh=self.mesh,
            strategy=self.strategy,
            balance=self.balance,
            **options,
        )


@dataclass(frozen=True, eq=False)
class SharedRows:
    """This rank's tokens of a forward, and those that it shares their sequences with.

    positions: (1, seqlen / P) int64.
    """

    shared: Shared
    positions: Tensor
    leftpad: None = None

    def to(self, device: torch.device | str | int) -> SharedRows:
        return self

    def attend(
        self,
        layer: nn.Module,
        score: Score,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        freqs: RopeFreqs,
        options: dict[str, Any],
    ) -> Tensor:
        """Attend from (batch, seqlen / P, heads, head_dim) to the keys of all ranks."""
        if "chunk_size" in options:
            raise ValueError(
                "extend: layers with chunks must not be extended over a mesh, got "
                f"{type(layer).__name__}"
            )
        return self.shared.attend(score, q, k, v, freqs, keys_stored=True, **options)


class SharedAttention:
    """Takes the mask's place in layers that rotate by themselves, and attends round the group."""

    def __init__(self, shared: Shared) -> None:
        self.shared = shared

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, options: Mapping[str, Any]
    ) -> Tensor:
        """q, k, v: (batch, heads, seqlen / P, head_dim), rotated."""
        refuse_options(module, options)
        q, k, v = (x.transpose(1, 2).to(v.dtype) for x in (q, k, v))
        options = softmax_options(module, options)
        return self.shared.attend(PLAIN, q, k, v, no_freqs(q), keys_stored=True, **options)


class SharedForward:
    """Hooks around the forwards of a model whose tokens are spread over ranks."""

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
        """Forward pre-hook of the owner: the positions of this rank's tokens, and no mask."""
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
        given = arguments.get("position_ids")
        if given is not None and not _same(given, positions):
            raise ValueError(
                "extend: position_ids must be those of `distributed.local_positions` with "
                f"balance={self.shared.balance!r}, got others"
            )
        arguments |= {"use_cache": False, "attention_mask": no_mask(tokens.device)}
        if given is None:
            arguments["position_ids"] = positions
        return (), arguments

    def before_layer(
        self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        """Forward pre-hook of a layer that rotates by itself."""
        arguments = by_name(self.layer_argument_names[layer], args, kwargs)
        attending = SharedAttention(self.shared)
        arguments["attention_mask"] = self.calls[layer].mask(layer, attending)
        return (), by_its_name(layer, arguments, attending)


def by_its_name(layer: nn.Module, arguments: dict[str, Any], attending: Any) -> dict[str, Any]:
    """Return a layer's arguments with what attends among those that it hands on, if it does."""
    named = {ARGUMENT: attending} if "kwargs" in argument_names(layer) else {}
    return arguments | named


def refuse_labels(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a model with a head: its loss shifts labels within a rank's tokens."""
    arguments = by_name(argument_names(module), args, kwargs)
    if arguments.get("labels") is not None and arguments.get("shift_labels") is None:
        raise ValueError(
            "extend: labels must come with shift_labels over a mesh, shifted before they were "
            "sharded, got labels alone"
        )


def in_region() -> bool:
    """Whether torch's `context_parallel` has put its own attention in the place of PyTorch's."""
    function = nn.functional.scaled_dot_product_attention
    return (getattr(function, "__module__", None) or "").startswith("torch.distributed")


def _refuse_padding(mask: Any) -> None:
    """mask: what a model takes, of all tokens or of this rank's."""
    if mask is None or (isinstance(mask, Tensor) and mask.shape[-2:] == (1, 1)):
        return
    if not isinstance(mask, Tensor) or mask.dim() != 2 or not bool(mask.all()):
        raise ValueError(
            "extend: a model over a mesh must have rows without padding and no mask of its own, "
            "got an attention_mask with zeros or of another kind"
        )


def _same(given: Tensor, positions: Tensor) -> bool:
    return given.shape[-1] == positions.shape[-1] and bool((given == positions).all())
