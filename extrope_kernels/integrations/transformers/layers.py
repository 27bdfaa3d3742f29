"""Which layers of a model can attend by a score method, found out with four tokens.

The model is run twice with an attention that only records what it gets: once with tables of
position 0, once with those of positions 0 to 3 and frequencies made for the purpose. What differs
is the rotation, wherever in a layer it happens. Then the op attends to the same, by a score that
changes nothing, and must give what the layer's own attention gives.
"""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ... import RopeFreqs, apply_rope
from ...ops.attention import attend
from .._shared.kinds import is_bounded
from .._shared.plain import PLAIN
from .architecture import RotarySite, kind_of, shortened, unsupported
from .attending import Heads, rotated_first
from .calls import Call, calls_in, dropout_of
from .fused import rotating_layers
from .layer_options import KNOWN, refuse_options, softmax_options
from .rows import no_mask
from .trial import (
    TOKENS,
    Recorded,
    Recorder,
    TrialTables,
    UnfitLayer,
    entrance,
    ladders_of,
    replaced,
    run_on_trial,
    sees_chunks,
)


class Layers:
    """The attention layers that an owner's rotary embeddings serve.

    far: those that see all keys, to be extended, and which of their dims are rotated.
    near: those that attend as before: the ones without a rotation and, but for layers="all", those
        with a sliding window or chunks: no distance in them is past what training has covered.
    chunks: the size of chunks of the far layers that have them.
    calls: how each of them calls its attention. mask_name: of its mask, where layers get several.
    needs_mask: more than the attention of far layers looks at the mask.
    around: for rotary embeddings that are a layer's own, that layer.
    shapes: head_dim of queries and of values, and dtype, of the far layers.

    Raises ValueError where a layer does what the ops do not.
    """

    def __init__(
        self, owner: nn.Module, sites: list[RotarySite], layers: str, model: nn.Module
    ) -> None:
        self.owner = owner
        self.entrance = entrance(model, owner)
        self.sites = sites
        self.far: dict[nn.Module, Heads] = {}
        self.near: list[nn.Module] = []
        self.shapes: set[tuple[int, int, torch.dtype]] = set()
        self.chunks: dict[nn.Module, int] = {}
        self.mask_name: str | None = None
        self.calls = calls_in(owner)
        self.around = {
            site.rotary: layer
            for layer in self.calls
            for site in sites
            if site.rotary in layer.modules()
        }
        self.ladders = ladders_of(sites)
        still, moved = self._try_out()
        for layer in moved.called:
            if layer not in moved.seen:
                name = type(layer).__name__
                raise unsupported(
                    owner, f"{name} computes its attention itself, with nothing to replace"
                )
        rotates = False
        for layer, got in moved.seen.items():
            heads, freqs = self._heads(layer, still.seen[layer], got)
            rotates = rotates or heads is not None
            if heads is None or self._is_near(layer, got.options, layers):
                self.near.append(layer)
            else:
                check_options(owner, layer, got.options)
                self._check_attention(layer, heads, freqs, still.seen[layer], got)
                self.far[layer] = heads
                self.shapes.add((got.q.shape[-1], got.v.shape[-1], got.v.dtype))
        if not self.far:
            raise unsupported(
                owner,
                "all its layers that rotate have a sliding window or chunks, "
                "so none sees distances past it"
                if rotates
                else "none of its layers rotates",
            )
        self.needs_mask = self._needs_mask()

    def _try_out(self) -> tuple[Recorder, Recorder]:
        """Run the owner twice; where layers get several masks, find the attention's among them."""
        recorder = Recorder(self.calls)
        try:
            return self._record(recorder, still=True), self._record(Recorder(self.calls))
        except ValueError:
            for name in recorder.names:
                try:
                    found = [
                        self._record(Recorder(self.calls, name), still=x) for x in (True, False)
                    ]
                except ValueError:
                    continue
                self.mask_name = name
                return found[0], found[1]
            raise

    def _is_near(self, layer: nn.Module, options: dict[str, Any], layers: str) -> bool:
        """A window tells the attention; chunks are in the mask alone, but have a name."""
        if options.get("sliding_window"):
            return layers == "full"
        if not is_bounded(kind_of(layer)):
            return False
        size = getattr(getattr(layer, "config", None), "attention_chunk_size", None)
        if layers == "full" or not size or not self._has_chunks(layer):
            return True
        self.chunks[layer] = size
        return False

    def _has_chunks(self, layer: nn.Module) -> bool:
        """Say whether the layer's mask is one of chunks of the size that the config names."""
        config = copy.copy(self.owner.config)
        config.attention_chunk_size = 2
        recorder = Recorder(self.calls, self.mask_name)
        with replaced([(self.owner, "config", config)]):
            self._record(recorder)
        return sees_chunks(recorder.masks[layer], 2)

    def _needs_mask(self) -> bool:
        """Say whether more than the attention of extended layers looks at the mask.

        A token of padding must not change the others: in convolutions and states, it would.
        """
        if len(self.far) != getattr(self.owner.config, "num_hidden_layers", None):
            return True
        padded = torch.ones(1, TOKENS, dtype=torch.int64)
        padded[0, 0] = 0
        masked, free = (
            self._record(Recorder(self.calls, self.mask_name), still=True, attention_mask=mask)
            for mask in (padded, no_mask())
        )
        return not torch.equal(masked.output[0][:, 1:], free.output[0][:, 1:])

    def _record(self, recorder: Recorder, still: bool = False, **options: Tensor) -> Recorder:
        """Run the owner on four tokens; still: all of them at position 0."""
        overrides = [
            (site.rotary, "forward", TrialTables(site, self.ladders, still)) for site in self.sites
        ]
        hooks = [(layer, recorder.note_layer) for layer in rotating_layers(self.owner)]
        try:
            with recorder.in_place(overrides, hooks):
                recorder.output = run_on_trial(self.entrance, **options)
        except UnfitLayer as unfit:
            raise unsupported(self.owner, str(unfit)) from unfit
        except Exception as error:  # whatever a foreign layer leads to
            reason = f"its layers cannot be tried out on four tokens ({shortened(error)})"
            if Recorder.__name__ in str(error):
                reason = (
                    "its layers choose or weigh keys by a mask made of their contents, "
                    "a score method by distances alone"
                )
            raise unsupported(self.owner, reason) from error
        return recorder

    def _heads(
        self, layer: nn.Module, still: Recorded, moved: Recorded
    ) -> tuple[Heads | None, RopeFreqs]:
        """Return how a layer rotates, None where it does not, and the trial's frequencies."""
        freqs = RopeFreqs(still.q.new_zeros(1).float())
        if close(still.q, moved.q) and close(still.k, moved.k):
            return None, freqs
        if not close(still.v, moved.v):
            name = type(layer).__name__
            raise unsupported(
                self.owner, f"{name} rotates its values too, so its output is not of distances"
            )
        for site, _, inv_freq in self.ladders:
            if self.around.get(site.rotary, layer) is not layer:
                continue
            pairs = inv_freq.numel()
            last = still.q.shape[-1] - 2 * pairs
            starts = {0, last} if last >= 0 else set()
            for start, interleaved, sign in product(starts, (False, True), (1, -1)):
                heads = Heads(start, 2 * pairs, interleaved, sign)
                freqs = RopeFreqs(sign * inv_freq.to(still.q.device))
                if all(
                    close(_rotated(a, freqs, heads), rotated_first(b, start))
                    for a, b in ((still.q, moved.q), (still.k, moved.k))
                ):
                    return heads, freqs
        name = type(layer).__name__
        raise unsupported(
            self.owner,
            f"what {name} does after its rotation makes its logits depend on more than distances",
        )

    def _check_attention(
        self,
        layer: nn.Module,
        heads: Heads,
        freqs: RopeFreqs,
        still: Recorded,
        moved: Recorded,
    ) -> None:
        """Compare the op with the layer's own attention, where positions are as they were."""
        q, k = (rotated_first(x, heads.start).transpose(1, 2) for x in (still.q, still.k))
        options = softmax_options(layer, moved.options) | {"interleaved": heads.interleaved}
        v = moved.v
        with torch.no_grad():
            got = attend(
                PLAIN,
                q.to(v.dtype),
                k.to(v.dtype),
                v.transpose(1, 2),
                freqs,
                op="extend",
                **options,
            )
        compare_with_own(self.owner, layer, self.calls[layer], got, moved)


@torch.no_grad()
def compare_with_own(
    owner: nn.Module, layer: nn.Module, call: Call, got: Tensor, given: Recorded
) -> None:
    """Raise ValueError unless a layer's own attention gives what the op has given."""
    v = given.v
    mask = v.new_full((TOKENS, TOKENS), torch.finfo(v.dtype).min).triu(1)
    q, k = given.q.to(v.dtype), given.k.to(v.dtype)
    try:
        want = call.own(layer, q, k, v, mask[None, None], given.options)
    except Exception as error:  # whatever a foreign function leads to
        reason = f"its own attention cannot be tried out ({shortened(error)})"
        raise unsupported(owner, f"{type(layer).__name__}: {reason}") from error
    if want is None or not close(got, want.view_as(got)):
        raise unsupported(owner, f"{type(layer).__name__} attends in a way of its own")


def _rotated(x: Tensor, freqs: RopeFreqs, heads: Heads) -> Tensor:
    """x: (batch, heads, seqlen, head_dim)."""
    x = rotated_first(x, heads.start).transpose(1, 2)
    positions = torch.arange(x.shape[1], device=x.device)
    options = {"positions": positions, "interleaved": heads.interleaved, "backend": "reference"}
    return apply_rope(x, freqs, **options).transpose(1, 2)


def close(a: Tensor, b: Tensor) -> bool:
    """Equal but for a few roundings, of float32 at best: that is what tables are made in."""
    eps = max(torch.finfo(a.dtype).eps, torch.finfo(torch.float32).eps)
    tolerance = 16 * eps * max(b.abs().max().item(), 1e-30)
    return bool((a - b).abs().max() <= tolerance)


def check_options(owner: nn.Module, layer: nn.Module, options: dict[str, Any]) -> None:
    """options: what the layer told its attention."""
    name = type(layer).__name__
    options = {key: value for key, value in options.items() if value is not None}
    if layer.training:
        options["dropout"] = dropout_of(layer)
    refuse_options(layer, options)
    if not getattr(layer, "is_causal", True) or options.get("is_causal") is False:
        raise unsupported(owner, f"{name} is not causal, and later keys have no distance")
    if others := [key for key in options if key not in KNOWN]:
        raise unsupported(owner, f"{name} attends with {' and '.join(sorted(others))}")
