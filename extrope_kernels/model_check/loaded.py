"""`check(model)`: what a loaded model rotates by, beside what its configuration says.

A rotary embedding is run at single positions, in the model's dtype. Where its cosines and sines are
not those of exact angles, the frequencies and the amplitude that they follow are measured. The
probe of `extend` finds the rotary embeddings, and tells the column of each pair.
"""

from __future__ import annotations

import inspect
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import RopeFreqs, methods
from .._rope_types import rope_type
from .._usage import shortened
from ..integrations._shared.saved import SavedFolder, find
from ..integrations.transformers.model import adapters_of, no_model
from ..integrations.transformers.patches import ON_OWNER
from ..integrations.transformers.rotary import (
    Tables,
    attribute_of,
    probe_numbers,
    rotary_embeddings,
)
from ..integrations.transformers.rotation import RotaryForward
from ..integrations.transformers.saved import ADAPTER_MARK
from .source import Source, with_one_axis

AS_STATED = "as stated"
_SHOWS = 0.01  # an error of a cosine that counts


@dataclass(frozen=True)
class RotationInForce:
    """The rotation of a kind of layers, as it runs.

    kind: of layers, None if all rotate alike. embeddings: rotary embeddings that rotate so.
    stated: the rotation by the configuration. in_force: in words, the one that runs.
    ok: True if that is the stated one, an extension, or one whose frequencies are weights.
    rounded: the dtype that frequencies are rounded to, None if no less than float32.
    shows_from: the first position at which that moves a cosine or sine by more than 0.01.
    extended: True for an extension by `extend`.
    error: the largest difference of cosines and sines from those of exact angles, up to `length`.
    """

    kind: str | None
    stated: str
    in_force: str
    ok: bool
    rounded: str | None = None
    shows_from: int | None = None
    error: float | None = None
    length: int | None = None
    embeddings: int = 1
    extended: bool = False

    def __str__(self) -> str:
        count = f" ({self.embeddings} rotary embeddings)" if self.embeddings > 1 else ""
        text = f"{self.kind or 'all layers'}{count}: {self.in_force}"
        if self.in_force == AS_STATED:
            text += f" ({self.stated})"
        elif not self.ok and self.rounded is None:
            text += f"; NOT as stated ({self.stated})"
        if self.shows_from is not None:
            text += f"; off by more than {_SHOWS} from position {self.shows_from:,} on"
        if self.ok and self.error is not None:
            text += f"; off by at most {self.error:.2g} in {self.length:,} tokens"
        return text


@dataclass(frozen=True, repr=False)
class LoadedReport:
    """What rotates in a loaded model: a line for each kind of layers, and for each ignored key.

    ignored: keys of the configuration about positions that nothing reads.
    saved: the folder that the model comes from, if it was saved there as extended, and is not.
    adapters: what PEFT's adapters, by name, were saved as extended by, if the model is not.
    """

    model: str
    rotations: tuple[RotationInForce, ...]
    ignored: tuple[str, ...]
    saved: str | None = None
    adapters: Mapping[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """True if all layers rotate as they should, no key is ignored and no extension missing."""
        missing = self.ignored or self.saved or self.adapters
        return all(each.ok for each in self.rotations) and not missing

    def __str__(self) -> str:
        lines = [f"{self.model}: {'ok' if self.ok else 'NOT ok'}", *map(str, self.rotations)]
        lines += [f"{key} is in the configuration, and nothing reads it" for key in self.ignored]
        if self.saved:
            restored = f"extend_from_saved(model, {self.saved!r}) restores it"
            lines.append(f"saved as extended, and is not; {restored}")
        lines += [
            f"adapter {name!r} was saved as extended by {extensions}, and the model is not; "
            "extend_from_saved(model, folder) restores it, by the adapter's folder"
            for name, extensions in self.adapters.items()
        ]
        return "\n".join(lines)

    __repr__ = __str__


@torch.no_grad()
def check(model: nn.Module) -> LoadedReport:
    """Check what rotates in a loaded model, after whatever loader, trainer or cast touched it.

    Runs each rotary embedding at positions up to twice max_position_embeddings, and compares its
    cosines and sines with the configuration's (`methods.from_hf_config`) at exact angles. Nothing
    in the model changes.

    model: a model of transformers, alone or in a wrapper (PEFT's, FSDP's), with its weights.

    Returns a report: print it, or read `ok` and `rotations`.
    Raises TypeError if it is no module, ValueError if it has no rotary embedding, or no values.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, nn.Module):
        raise no_model("check", model)
    whole = next((each for each in model.modules() if isinstance(each, PreTrainedModel)), None)
    counted: Counter[RotationInForce] = Counter()
    for owner, rotary in rotary_embeddings(model):
        config = rotary.config
        if whole is not None and type(text := _text(whole.config)) is type(config):
            config = text  # a trainer may have given the model another
        for kind in _kinds(rotary):
            counted[_in_force(owner, rotary, kind, config)] += 1
    if not counted:
        raise ValueError(
            "check: model must have a rotary embedding configured by rope_parameters, "
            f"got a {type(model).__name__} without"
        )
    rotations = tuple(replace(each, embeddings=count) for each, count in counted.items())
    if whole is None:
        return LoadedReport(type(model).__name__, rotations, ())
    folder = getattr(whole.config, "_name_or_path", None)
    saved = find(folder) if folder else None
    report = LoadedReport(type(whole).__name__, rotations, tuple(_ignored(whole, saved)))
    if any(each.extended for each in rotations):
        return report
    missing = None if saved is None or saved.in_config else saved.path
    marks = {
        name: (getattr(each, "auto_mapping", None) or {}).get(ADAPTER_MARK)
        for name, each in adapters_of(model).items()
    }
    adapters = {name: mark for name, mark in marks.items() if mark is not None}
    return replace(report, saved=missing, adapters=adapters)


def _text(config: Any) -> Any:
    return config.get_text_config(decoder=True)


def _ignored(whole: nn.Module, saved: SavedFolder | None) -> list[str]:
    config, text = whole.config, _text(whole.config)

    def given(config: Any) -> dict[str, Any]:
        code = inspect.getsource(type(config))  # what it sets itself
        own = {key for key in vars(config) if hasattr(type(config), key)}
        own |= {key for key in vars(config) if re.search(rf"\b{key}\b", code)}
        return {key: value for key, value in vars(config).items() if key not in own}

    beside = {} if text is config else given(config)
    return Source(text, config, given(text), beside, saved=saved).ignored()


def _kinds(rotary: nn.Module) -> list[str | None]:
    if not isinstance(rotary.rope_type, Mapping):
        return [None]
    return [kind for kind in rotary.rope_type if hasattr(rotary, f"{kind}_inv_freq")]


def _in_force(
    owner: nn.Module, rotary: nn.Module, kind: str | None, config: Any
) -> RotationInForce:
    stated = _described(config, kind)
    forward = vars(rotary).get("forward")
    if isinstance(forward, RotaryForward) and kind in forward.freqs:
        extension = vars(owner).get(ON_OWNER) or forward.method
        return RotationInForce(kind, stated, f"extended by {extension}", True, extended=True)
    if getattr(attribute_of(rotary, kind, "inv_freq", None), "is_meta", False):
        raise ValueError("check: model must have its values, got one on the meta device")
    try:
        with _kept(rotary):
            return _Run(owner, rotary, kind, config).compared(stated)
    except Exception as error:  # a foreign module or configuration may raise anything
        return RotationInForce(kind, stated, f"not compared: {shortened(error)}", False)


def _parameters(config: Any, kind: str | None) -> Mapping[str, Any]:
    parameters = getattr(config, "rope_parameters", None) or {}
    return parameters.get(kind) or {} if kind in parameters else parameters


def _described(config: Any, kind: str | None) -> str:
    parameters = _parameters(config, kind)
    factor, base = parameters.get("factor"), parameters.get("rope_theta")
    name = parameters.get("rope_type", "default")
    told = "plain RoPE" if name == "default" else name
    told += "" if factor is None or name == "default" else f" factor {factor:g}"
    return told if base is None else f"{told}, base {base:g}"


@contextmanager
def _kept(module: nn.Module) -> Iterator[None]:
    """Put a module's attributes and buffers back: dynamic ones change in every forward."""
    attributes = dict(vars(module))
    copies = {name: x if x is None else x.clone() for name, x in module._buffers.items()}
    vars(module)["_buffers"] = copies
    try:
        yield
    finally:
        vars(module).clear()
        vars(module).update(attributes)


class _Run:
    """A rotary embedding that runs, for one kind of layers, in the dtype of its model.

    Pairs are in the order of falling frequencies, as values on the CPU.
    """

    def __init__(self, owner: nn.Module, rotary: nn.Module, kind: str | None, config: Any) -> None:
        self.rotary, self.kind = rotary, kind
        self.config = with_one_axis(config, by_kind=kind is not None)
        self.length = getattr(config, "max_position_embeddings", None) or 8192  # RecurrentGemma
        by_length = rope_type(_parameters(config, kind).get("rope_type")).by_length
        # Positions below it have one set of frequencies.
        self.measured = methods.lengths(config, kind).unscaled if by_length else 2 * self.length
        last = min(self.measured, self.length) - 1
        self.positions = sorted(
            {1, (last + 1) // 2, last, self.length - 1, 2 * self.length - 1} - {0}
        )
        inv_freq = attribute_of(rotary, kind, "inv_freq")
        dtypes = (each.dtype for each in owner.parameters() if each.dtype.is_floating_point)
        dtype = next((each for each in dtypes if each.itemsize > 1), torch.float32)
        self.x = torch.zeros(1, 1, 2 * len(inv_freq), dtype=dtype, device=inv_freq.device)
        self.eps = torch.finfo(dtype).eps
        # The column of each pair: where other frequencies are seen.
        others = probe_numbers(0.2, 1.1, len(inv_freq))
        tables = Tables(rotary, kind, RopeFreqs(others.to(inv_freq.device)))
        angles = _complex(tables(self.x.float(), self._position(1))).angle()
        columns = (angles.abs() - others[:, None]).abs().argmin(1)
        order = inv_freq.float().cpu().argsort(descending=True, stable=True)
        self.columns, self.mirrored = columns[order], bool(angles[columns[0]] < 0)

    def _position(self, position: int) -> Tensor:
        return torch.tensor([[position]], device=self.x.device)

    def at(self, position: int) -> Tensor:
        """Return cos + i sin of every pair at a position: (pairs,) complex128."""
        options = {} if self.kind is None else {"layer_type": self.kind}
        forward, positions = self.rotary.forward, self._position(position)
        try:
            made = forward(self.x, positions, **options)
        except IndexError:  # three axes, before transformers 5.19
            made = forward(self.x, positions.expand(3, -1, -1), **options)
        values = _complex(made)[self.columns]
        return values.conj().resolve_conj() if self.mirrored else values

    def promised(self, length: int) -> tuple[Tensor, float]:
        """Return the stated frequencies for a text of `length` tokens, and the amplitude."""
        freqs = methods.from_hf_config(self.config, length, layer_type=self.kind)
        return freqs.inv_freq.double().sort(descending=True).values, freqs.attention_factor

    def compared(self, stated: str) -> RotationInForce:
        """Compare the values at positions up to twice the length with those that are stated."""
        found = RotationInForce(self.kind, stated, AS_STATED, True, length=self.length)
        inv_freq, _ = self.promised(1)
        if len(inv_freq) != len(self.columns):
            says = f"{len(self.columns)} pairs rotate where {len(inv_freq)} are stated"
            return replace(found, in_force=says, ok=False)
        if names := [name for name, _ in self.rotary.named_parameters()]:
            ratio = _ratio(self.measure(), inv_freq)
            in_force = f"frequencies are weights ({', '.join(names)}): {ratio} ({stated})"
            return replace(found, in_force=in_force)
        errors = {at: self.error(at, *self.promised(at + 1)) for at in self.positions}
        wrong = [at for at, (_, is_wrong) in errors.items() if is_wrong]
        if not wrong:
            return replace(found, error=max(errors[at][0] for at in errors if at < self.length))
        found = replace(found, ok=False)
        if wrong[0] >= self.measured:
            says = f"as stated up to position {self.measured - 1:,}, other frequencies past it"
            return replace(found, in_force=says)
        return self._other(found)

    def error(self, position: int, inv_freq: Tensor, factor: float) -> tuple[float, bool]:
        """Return the largest difference from values at exact angles, and if it is wrong.

        Right are values in the model's dtype, of angles in float32, off by less than what counts.
        """
        exact = torch.polar(torch.full_like(inv_freq, factor), inv_freq * position)
        errors = ((self.at(position) - exact).abs() / factor).nan_to_num(math.inf)
        allowed = min(4 * self.eps, _SHOWS) + 2**-22 * (1 + position * inv_freq)
        return float(errors.max()), bool((errors > allowed).any())

    def measure(self) -> Tensor:
        """Return the frequencies that the values follow: ever finer, at positions ever farther."""
        inv_freq, position = self.at(1).angle(), 4
        while position < self.measured:
            angle, circle = self.at(position).angle(), 2 * math.pi
            circles = ((inv_freq * position - angle) / circle).round()
            inv_freq, position = (angle + circles * circle) / position, 4 * position
        return inv_freq

    def follow(self, inv_freq: Tensor, factor: float) -> bool:
        """Return True if the values are those of such frequencies, and of this amplitude."""
        measured = (at for at in self.positions if at < self.measured)
        return not any(self.error(at, inv_freq, factor)[1] for at in measured)

    def _other(self, found: RotationInForce) -> RotationInForce:
        """Return the rotation that the values follow: its frequencies and amplitude, measured."""
        (inv_freq, factor), amplitude = self.promised(1), float(self.at(1).abs().median())
        if not math.isfinite(amplitude):
            return replace(found, in_force="cosines are not finite")
        for dtype in (torch.bfloat16, torch.float16):
            coarse = inv_freq.to(dtype).double()
            if self.follow(coarse, factor):
                name = str(dtype).removeprefix("torch.")
                says = f"{found.stated}, with frequencies rounded to {name}"
                first = math.ceil(_SHOWS / float((coarse - inv_freq).abs().max()))
                return replace(found, in_force=says, rounded=name, shows_from=first)
        if self.follow(inv_freq, amplitude):
            told = "the stated frequencies"
        elif self.follow(torch.zeros_like(inv_freq), amplitude):
            told = "no rotation at all: all frequencies are 0"
        else:
            told = f"other frequencies ({_ratio(self.measure(), inv_freq)})"
        if not math.isclose(amplitude, factor, rel_tol=4 * self.eps + 1e-5):
            told += f", amplitude {amplitude:.3g} where {factor:.3g} is stated"
        return replace(found, in_force=told)


def _ratio(measured: Tensor, inv_freq: Tensor) -> str:
    ratio = measured[inv_freq > 0] / inv_freq[inv_freq > 0]
    return f"{ratio.min():.3g} to {ratio.max():.3g} times those stated"


def _complex(made: Any) -> Tensor:
    """Return the values of tables for one position, cos + i sin: (columns,) complex128."""
    if isinstance(made, Tensor):
        values = made if made.is_complex() else torch.view_as_complex(made)
    else:
        cos, sin = (x.double() for x in made[:2])
        values = torch.complex(cos, sin)
    return values.reshape(-1, values.shape[-1])[0].to("cpu", torch.complex128)
