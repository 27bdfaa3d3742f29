"""A method's parameters: those the user gives, and the model's own for the rest."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ... import RopeFreqs
from ..._names import no_argument
from ...methods import METHODS, WRAPPERS, Lengths, lengths, stated_yarn, trained
from ...methods import is_bounded as is_bounded
from ...ops.attention import check_log_n
from ...scores import SCORES, Score

_FUNCTIONS = METHODS | SCORES
_RESONANCE, BY_AXIS = "resonance", "by_axis"  # parameters of all frequency methods
# For dual_chunk: the length from which its temperature grows (`scores.query_scale.qwen_1m`).
_TRAINED = "original_max_position_embeddings"
# Every method that an integration takes, with the names of its parameters: its own, and those that
# all methods of its kind take.
PARAMETERS: dict[str, tuple[str, ...]] = {
    name: (
        *inspect.signature(function).parameters,
        *(("log_n",) if name in SCORES else (_RESONANCE, BY_AXIS)),
        *((_TRAINED,) if name == "dual_chunk" else ()),
    )
    for name, function in _FUNCTIONS.items()
}
# Parameters that a method exists to choose: the model's value is no default for them.
_OWN_DEFAULTS = {"abf": {"base"}, "dynamic_yarn": {"max_position_embeddings"}}
DUAL_CHUNKS = "dual_chunk_attention_config"  # of a transformers configuration
SPARSE = (
    f"of {DUAL_CHUNKS} the sparse part (vertical and slash lines) is left out: "
    "each query sees all keys"
)
# Methods that take over what a configuration says of its YaRN beside the factor.
_YARNS = ("yarn", "dynamic_yarn")


@dataclass(frozen=True)
class ModelValues:
    """A model's own values for one of its rotations.

    values: parameters of methods by name, including dim.
    trained: what replaces them for methods that scale, if the model was trained under a scaling:
        `over`, and the length of that training.
    yarn: what its configuration says of YaRN beside the factor, which a new factor leaves.
    unrotated: number of its last frequencies that are 0: dims that the model has never rotated.
    axes: returns the axis of positions of each frequency, None if there is one axis.
    """

    values: Mapping[str, Any]
    trained: Mapping[str, Any]
    yarn: Mapping[str, Any]
    unrotated: int
    axes: Callable[[], Tensor | None]

    @property
    def dim(self) -> int:
        """The rotary dimension."""
        return self.values["dim"]


def plain(value: Any) -> Any:
    """Return numbers, lists and mappings, as JSON has, for those of torch and for RopeFreqs."""
    if isinstance(value, RopeFreqs):
        return {"inv_freq": plain(value.inv_freq), "attention_factor": value.attention_factor}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return value.tolist() if hasattr(value, "tolist") else value


def model_values(
    config: Any, kind: str | None, parameters: Mapping[str, Any], dim: int, unrotated: int
) -> ModelValues:
    """Return a transformers configuration's values for one rotation.

    kind: of layers, None if all rotate alike. parameters: its rope_parameters.
    """
    known = lengths_in(config, kind)
    values = {
        "dim": dim,
        "base": parameters.get("rope_theta"),
        "max_position_embeddings": getattr(config, "max_position_embeddings", None),
        _TRAINED: None if known is None else known.unscaled,
    }
    values = {name: value for name, value in values.items() if value is not None}
    yarn: dict[str, Any] = {}
    if (parameters.get("rope_type") or parameters.get("type")) == "yarn":
        kinds = (getattr(config, "rope_parameters", None) or {}).values()
        yarn = stated_yarn(parameters, any(isinstance(each, Mapping) for each in kinds))
    axes = partial(_axes_in, config, parameters, dim)
    return ModelValues(values, trained_in(config, kind, parameters, dim), yarn, unrotated, axes)


def trained_in(
    config: Any, kind: str | None, parameters: Mapping[str, Any], dim: int
) -> dict[str, Any]:
    """Return the values of a model that was trained under a scaling: `over`, and its length.

    Empty for plain RoPE, and for the scalings that a new factor replaces (yarn, dynamic).
    """
    if (known := lengths_in(config, kind)) is None:
        return {}
    described = {name: value for name, value in parameters.items() if name != "mrope_section"}
    if described.get("rope_type") != "proportional":  # dim has the share already
        described.pop("partial_rotary_factor", None)
    of_kind = {
        "head_dim": dim,
        "max_position_embeddings": config.max_position_embeddings,
        _TRAINED: getattr(config, _TRAINED, None),
        "rope_parameters": described,
    }
    over = trained(of_kind)
    if over == METHODS["rope"](dim, base=described.get("rope_theta") or 10000.0):
        return {}
    return {_TRAINED: known.trained, "over": over}


def _axes_in(config: Any, parameters: Mapping[str, Any], dim: int) -> Tensor | None:
    """Return the axis of positions of each frequency (mRoPE); None if there is one axis."""
    if parameters.get("mrope_section") is None:
        return None
    names = ("mrope_section", "mrope_interleaved")
    of_kind = {
        "model_type": getattr(config, "model_type", None),
        "head_dim": dim,
        "rope_parameters": {name: parameters.get(name) for name in names},
    }
    return trained(of_kind).axes


def freqs_of(stored: Mapping[str, Any]) -> RopeFreqs:
    """Return the RopeFreqs that `plain` has made JSON of."""
    inv_freq = torch.tensor(stored["inv_freq"], dtype=torch.float32, device="cpu")
    return RopeFreqs(inv_freq, float(stored["attention_factor"]))


def lengths_in(config: Any, kind: str | None = None) -> Lengths | None:
    """Return `methods.lengths`; None if the configuration names no length (RecurrentGemma)."""
    unnamed = getattr(config, "max_position_embeddings", None) is None
    return None if unnamed else lengths(config, kind)


def values_for(
    method: str, model: ModelValues, given: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return a model's values for parameters of a frequency method.

    given: by the user. A base, a trained length or `over` among them decide what is scaled.
    """
    accepted, own = PARAMETERS[method], _OWN_DEFAULTS.get(method, ())
    values = dict(model.values)
    if "over" in accepted and not {"base", _TRAINED, "over"} & set(given or ()):
        values |= model.trained
    if method in _YARNS:
        values |= model.yarn
    if method == "dynamic_ntk" and _TRAINED in values:  # its name for the trained length
        values["max_position_embeddings"] = values[_TRAINED]
    return {k: v for k, v in values.items() if k in accepted and k not in own}


def bind_method(
    op: str, method: str, given: Mapping[str, Any], model: ModelValues
) -> tuple[Callable[..., RopeFreqs], bool]:
    """Bind a frequency method to all its parameters; return also if it still takes seq_len.

    op: the beginning of errors.
    Raises ValueError or TypeError, from here or from the method, for parameters that do not fit.
    """
    if given.get("dim", model.dim) != model.dim:
        raise ValueError(
            f"{op}: dim must be {model.dim}, the rotary dimension of the model, got {given['dim']}"
        )
    accepted, values = PARAMETERS[method], values_for(method, model, given)
    check_names(op, method, given, values)
    takes_length = "seq_len" in accepted and "seq_len" not in given
    parameters = values | given
    rounded = parameters.pop(_RESONANCE, False)
    if not isinstance(rounded, bool):
        raise TypeError(f"{op}: {_RESONANCE} must be True or False, got {rounded!r}")
    axes = parameters.pop(BY_AXIS, None)
    of_pairs = None if axes is None else model.axes()
    if axes is not None and of_pairs is None:
        raise ValueError(
            f"{op}: {BY_AXIS} must be left out for a model whose tokens have one position, "
            f"got {axes!r}"
        )
    over = parameters.get("over")
    if isinstance(over, Mapping):  # as JSON has it
        if set(over) != {"inv_freq", "attention_factor"}:
            raise ValueError(
                f"{op}: over must be a RopeFreqs, or its inv_freq and attention_factor by name, "
                f"got {', '.join(over) or 'none'}"
            )
        parameters["over"] = freqs_of(over)
    bound = partial(METHODS[method], **parameters)
    if method == "rope" and "base" not in given and model.trained:
        bound = partial(_as_trained, model.trained["over"])
    if axes is not None:
        base = model.values.get("base", 10000.0)
        plain = model.trained.get("over") or METHODS["rope"](model.dim, base=base)
        bound = partial(_of_axes, bound, axes, replace(plain, axes=of_pairs))
    _check_dim(op, method, bound(seq_len=1) if takes_length else bound(), model.dim)
    if model.unrotated and method != "proportional":
        bound = partial(_without, bound, model.unrotated)
    return partial(_rounded, bound) if rounded else bound, takes_length


def _as_trained(over: RopeFreqs) -> RopeFreqs:
    """Return the frequencies of the model before any extension: `rope` of a trained scaling."""
    return over


def _of_axes(
    method: Callable[..., RopeFreqs], axes: Any, over: RopeFreqs, **parameters: Any
) -> RopeFreqs:
    """Return a method's frequencies for some axes; the model picks the position of each itself."""
    return replace(WRAPPERS[BY_AXIS](method(**parameters), axes, over=over), axes=None)


def _without(method: Callable[..., RopeFreqs], unrotated: int, **parameters: Any) -> RopeFreqs:
    freqs = method(**parameters)
    freqs.inv_freq[..., -unrotated:] = 0.0
    return freqs


def _rounded(method: Callable[..., RopeFreqs], **parameters: Any) -> RopeFreqs:
    return WRAPPERS[_RESONANCE](method(**parameters))


def bind_score(op: str, method: str, given: Mapping[str, Any]) -> tuple[Score, float | None]:
    """Bind a score method to its parameters; return log_n too.

    Raises ValueError or TypeError, from here or from the method, for parameters that do not fit.
    """
    check_names(op, method, given)
    parameters = dict(given)
    check_log_n(op, log_n := parameters.pop("log_n", None))
    scale_from(op, parameters)
    parameters.pop(_TRAINED, None)
    return SCORES[method](**parameters), log_n


def window_of(method: str, given: Mapping[str, Any]) -> tuple[str, int] | None:
    """Return the parameter of a score method within which distances are a model's own.

    With its value; None if there is no such parameter, or it is not a number of tokens.
    """
    name = {"dual_chunk": "chunk_size", "string": ""}.get(method, "window")
    size = given.get(name) if method in SCORES else None
    return (name, size) if isinstance(size, int) else None


def scale_from(op: str, given: Mapping[str, Any]) -> int | None:
    """Return the length from which dual_chunk's logits grow, or None.

    Raises ValueError if it is not a length.
    """
    trained = given.get(_TRAINED)
    if trained is not None and (type(trained) is not int or trained < 1):
        raise ValueError(f"{op}: {_TRAINED} must be a whole number of tokens > 0, got {trained!r}")
    return trained


def score_values_in(config: Any, method: str) -> dict[str, Any]:
    """Return a transformers configuration's values for parameters of a score method.

    Qwen's models of 1M tokens have some. Their local_size is our local_window: chunks have
    chunk_size - local_size tokens in both.
    """
    found = getattr(config, DUAL_CHUNKS, None) if method == "dual_chunk" else None
    values = {
        "chunk_size": (found or {}).get("chunk_size"),
        "local_window": (found or {}).get("local_size"),
        _TRAINED: (found or {}).get(_TRAINED) or None,  # 0 is none
    }
    return {name: value for name, value in values.items() if value is not None}


def check_names(
    op: str, method: str, given: Mapping[str, Any], others: Iterable[str] | None = ()
) -> None:
    """Raise TypeError for a parameter that the method does not have, ValueError for a missing one.

    given: by the user; others: by the model, None if not known yet; seq_len comes later.
    """
    accepted = PARAMETERS[method]
    if unknown := next((name for name in given if name not in accepted), None):
        names = [name for name in accepted if name != "dim"]
        raise TypeError(f"{op}: {method}: {no_argument(unknown, names)}")
    if others is None:
        return
    missing = [
        name
        for name, parameter in inspect.signature(_FUNCTIONS[method]).parameters.items()
        if parameter.default is parameter.empty and name not in {"seq_len", *given, *others}
    ]
    if missing:
        are = "is" if len(missing) == 1 else "are"
        raise ValueError(f"{op}: {method} needs {' and '.join(missing)}, which {are} missing")


def _check_dim(op: str, method: str, freqs: RopeFreqs, dim: int) -> None:
    if freqs.inv_freq.shape[-1] * 2 != dim:
        raise ValueError(
            f"{op}: {method} must yield {dim // 2} frequencies, got {freqs.inv_freq.shape[-1]}"
        )
