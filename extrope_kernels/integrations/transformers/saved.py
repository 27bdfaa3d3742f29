"""An extension on disk: a config for other programs, and the arguments of `extend` beside it.

Other programs read some frequency methods from `rope_parameters` of a config. Frequencies without a
name there become factors of LongRoPE. Score methods, XPOS and frequencies that follow the length
are only in extrope.json, for `extend_from_saved`.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import math
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...methods import METHODS
from ...scores import SCORES
from .._shared.parameters import BY_AXIS, PARAMETERS, SAVED, bind_method, plain, values_for
from .patch.frequencies import values_of
from .patch.hooks import ON_OWNER, Applied
from .probe.rotary import RotaryModule, attribute_of, find_rotary_modules

_TRAINED = "original_max_position_embeddings"
_STILL = 1e30  # factor of a pair that does not rotate; in float32 there is no difference
# Methods with a name in configs: that name, and its parameters.
_TYPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "rope": ("default", ()),
    "abf": ("default", ()),
    "ntk_aware": ("default", ()),
    "pi": ("linear", ("factor",)),
    "dynamic_ntk": ("dynamic", ("factor",)),
    "yarn": (
        "yarn",
        (
            *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
            *("attention_factor", "mscale", "mscale_all_dim", "truncate"),
        ),
    ),
    "llama3": (
        "llama3",
        ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    ),
    "longrope": (
        "longrope",
        (
            *("short_factor", "long_factor", "factor", "original_max_position_embeddings"),
            "attention_factor",
        ),
    ),
}
_AMPLITUDES = ("short_mscale", "long_mscale")  # of LongRoPE, as vLLM and Phimoe name them
# All other entries of a config on a rotation (a share of the dims, axes) stay.
_SCALING = {name for _, names in _TYPES.values() for name in names}
_SCALING |= {"rope_type", "type", "rope_theta", "alpha", *_AMPLITUDES}
# Methods that stretch the trained length by their factor.
_STRETCHING = (
    *("pi", "ntk_aware", "ntk_by_parts", "ntk_mixed", "yarn", "mrrope", "llama3"),
    "longrope",
)
_STRETCHING_SCORES = ("leaky_rerope", "self_extend")


@dataclass(frozen=True)
class Saved:
    """An extension in its stored form.

    parameters: for a frequency method also the model's, if all kinds of layers share them.
    length: the number of tokens that the extended model can read; None: no limit.
    """

    method: str
    parameters: dict[str, Any]
    layers: str
    length: int | None = None
    cache: str | None = None


def describe(model: nn.Module, applied: Applied) -> Saved:
    """Return the stored form of an extension of a model."""
    method, rotary_modules = applied.method, find_rotary_modules(model, applied.layers)
    values = [values_of(each, kind) for each in rotary_modules for kind in each.layer_types]
    shared: dict[str, Any] = {}
    if method not in SCORES:
        first, *others = (
            {
                name: plain(value)
                for name, value in values_for(method, each, applied.parameters).items()
            }
            for each in values
        )
        shared = {k: v for k, v in first.items() if all(other.get(k) == v for other in others)}
        shared.pop("dim", None)
        if "over" in PARAMETERS[method] and not any("over" in each for each in (first, *others)):
            shared["over"] = None  # a saved config may name a scaling, which is this one
        if method == "rope" and any(each.trained for each in values):
            shared.pop("base", None)  # the model as it was trained, not plain RoPE
    given = shared | applied.parameters
    parameters = {name: plain(value) for name, value in given.items()}
    known = dict(values[0].values)
    if _TRAINED in values[0].trained and not {"base", _TRAINED} & set(applied.parameters):
        known[_TRAINED] = values[0].trained[_TRAINED]
    own = rotary_modules[0].parameters(rotary_modules[0].layer_types[0])
    if applied.before is not None:
        known["max_position_embeddings"] = describe(model, applied.before).length
    elif own.get("rope_type", "default") == "default":  # a saved config has the extended length
        known["max_position_embeddings"] = known.get("original_max_position_embeddings")
    length = _length(method, {**known, **parameters})
    return Saved(method, parameters, applied.layers, length, applied.cache)


def _length(method: str, values: Mapping[str, Any]) -> int | None:
    """Return the tokens that a method reaches; values: the model's and the method's parameters."""
    factor, longest = values.get("factor"), values.get("max_position_embeddings")
    if method in SCORES:
        if method not in _STRETCHING_SCORES or longest is None or factor == math.inf:
            return None
        # Frequencies reach `longest`; a score stretches the part past the window.
        window = min(values["window"], longest)
        return window + int((longest - window) * factor)
    trained = values.get("original_max_position_embeddings")
    if "seq_len" in values or method == "rope":
        return values.get("seq_len", trained)
    if method == "longrope" and factor is None:
        return longest
    stretches = method in _STRETCHING and None not in (trained, factor)
    return int(trained * factor) if stretches else None


def save_plain(
    module: nn.Module,
    model: nn.Module,
    applied: Applied,
    save_directory: str | os.PathLike,
    *args: Any,
    **options: Any,
) -> None:
    """Replace a module's `save_pretrained`, which writes the plain model's config."""
    _refuse_upload(options)
    type(module).save_pretrained(module, save_directory, *args, **options)
    if not options.get("is_main_process", True):
        return
    _write([describe(model, each) for each in applied.all()], save_directory)
    warnings.warn(
        f"extend: config.json in {save_directory} is the plain model's; its extension by "
        f"{applied.method} is in {SAVED}, which extend_from_saved reads. save_pretrained of "
        "what extend returned writes a config that other programs read",
        stacklevel=2,
    )


def save_beside_adapters() -> None:
    """Let PEFT write the extensions of a model beside adapters that are added to it later.

    A PeftModel that is extended itself has its own `save_pretrained` (`save_plain`). It is the
    class's method, for all models, and stays: it does nothing for those that are not extended.
    """
    peft = sys.modules.get("peft")
    if peft is None or hasattr(peft.PeftModel.save_pretrained, "original"):
        return
    original = peft.PeftModel.save_pretrained

    @functools.wraps(original)
    def save_pretrained(self, save_directory, *args, **options):
        result = original(self, save_directory, *args, **options)
        extended = (vars(each).get(ON_OWNER) for each in self.modules())
        applied = next((each for each in extended if each is not None), None)
        if applied is not None and options.get("is_main_process", True):
            _write([describe(self, each) for each in applied.all()], save_directory)
        return result

    save_pretrained.original = original
    peft.PeftModel.save_pretrained = save_pretrained


def save(
    model: nn.Module,
    folder: str | os.PathLike,
    length: int | None,
    options: Mapping[str, Any],
) -> None:
    """Save an extended model: weights, a config, and its extensions."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"extend: save_pretrained needs a model of transformers, got {type(model).__name__}; "
            "merge adapters, or save them and the model apart"
        )
    _refuse_upload(options)
    applied = vars(find_rotary_modules(model, "all")[0].owner)[ON_OWNER]
    extensions = [describe(model, each) for each in applied.all()]
    type(model).save_pretrained(model, folder, **options)  # completes its config too
    if not options.get("is_main_process", True):
        return
    config = copy.deepcopy(model.config)
    unknown = [each.method for each in extensions if each.method in SCORES]
    # The last one replaces the scaling of those before it.
    for extension in [each for each in extensions if each.method not in SCORES][-1:]:
        if (found := _config_with(model, extension)) is not None:
            config = found
        else:
            unknown.insert(0, extension.method)
    if length is not None:
        _set_longest(config.get_text_config(decoder=True), length)
    config.save_pretrained(folder)
    _write(extensions, folder)
    if unknown:
        warnings.warn(
            f"extend: a config cannot tell transformers, vLLM and GGUF converters of "
            f"{' and '.join(unknown)} with these parameters, so config.json in {folder} is without "
            f"it; extend_from_saved applies it from {SAVED}",
            stacklevel=3,
        )


def _refuse_upload(options: Mapping[str, Any]) -> None:
    """Raise ValueError for an upload, which transformers does before the extension is written."""
    if options.get("push_to_hub"):
        raise ValueError(
            "extend: push_to_hub must be left out in save_pretrained, got True; upload the folder "
            "afterwards (huggingface_hub.upload_folder)"
        )


def _config_with(model: nn.Module, extension: Saved) -> Any:
    """Return a copy of the config that yields an extension's frequencies; None if none can.

    Some classes of configs know no type but LongRoPE (Phi-3).
    """
    rotary_modules = find_rotary_modules(model, extension.layers)
    if any(rotary_module.learned for rotary_module in rotary_modules):
        return None  # those who read it would multiply by the weights again
    text = model.config.get_text_config(decoder=True)
    if any(type(rotary_module.module.config) is not type(text) for rotary_module in rotary_modules):
        return None
    if "over" in PARAMETERS[extension.method] and "over" not in extension.parameters:
        return None  # kinds of layers were trained under different scalings: read them there
    for entries_of in (_entries, _factors):
        config = _written(model.config, rotary_modules, extension, entries_of)
        if config is not None and _agrees(rotary_modules, extension, config):
            return config
    return None


def _written(
    plain: Any,
    rotary_modules: Sequence[RotaryModule],
    extension: Saved,
    entries_of: Callable[..., dict[str, Any] | None],
) -> Any:
    """Return a copy of a config with an extension's entries; None if there are none."""
    config = copy.deepcopy(plain)
    text = config.get_text_config(decoder=True)
    for rotary_module in rotary_modules:
        for layer_type in rotary_module.layer_types:
            entries = entries_of(rotary_module, layer_type, extension)
            if entries is None:
                return None
            if layer_type is None:
                text.rope_parameters = entries
            else:
                text.rope_parameters = {**text.rope_parameters, layer_type: entries}
    if getattr(text, "rope_scaling_layers", None) is not None:  # Molmo 2 scales these alone
        text.rope_scaling_layers = list(range(text.num_hidden_layers))
    trained = values_of(rotary_modules[0], rotary_modules[0].layer_types[0]).values.get(_TRAINED)
    if not _names_trained(text) and trained != getattr(text, "max_position_embeddings", None):
        text.original_max_position_embeddings = trained  # the scaling before had it
    if extension.length is not None:
        longest = getattr(text, "max_position_embeddings", None) or 0
        _set_longest(text, max(extension.length, longest))
    elif extension.method == "dynamic_ntk":  # its type takes the longest for the trained length
        text.max_position_embeddings = extension.parameters["max_position_embeddings"]
    return config


def _entries(
    rotary_module: RotaryModule, layer_type: str | None, extension: Saved
) -> dict[str, Any] | None:
    """Return the rope_parameters for one kind of layers; None if no type takes them."""
    method, given = extension.method, extension.parameters
    wrapped = given.get("resonance") or given.get(BY_AXIS)
    if method not in _TYPES or wrapped or given.get("ramp", "index") != "index":
        return None
    # Read again with the changed base, its factor would apply twice.
    if "seq_len" in given or (method == "ntk_aware" and "base" not in given):
        return None
    kind, names = _TYPES[method]
    signature = inspect.signature(METHODS[method]).parameters
    values = {name: each.default for name, each in signature.items()}
    own = values_of(rotary_module, layer_type)
    values |= values_for(method, own, given) | given
    if values.get("over") is not None or (method == "rope" and own.trained and "base" not in given):
        return None  # no type scales another scaling
    base = values["base"]
    if method == "ntk_aware":
        dim = rotary_module.dim(layer_type)
        base *= values["factor"] ** (dim / (dim - 2))
    if method == "longrope" and values["factor"] is None:
        values["factor"] = (
            values["max_position_embeddings"] / values["original_max_position_embeddings"]
        )
    kept = {k: v for k, v in rotary_module.parameters(layer_type).items() if k not in _SCALING}
    told = {name: values[name] for name in names if values[name] is not None}
    if method == "longrope":
        told |= _by_vllms_names(values)
    return {**kept, "rope_type": kind, "rope_theta": base, **told}


def _factors(
    rotary_module: RotaryModule, layer_type: str | None, extension: Saved
) -> dict[str, Any] | None:
    """Return LongRoPE's rope_parameters with an extension's frequencies at every length.

    None if it has no such frequencies or changes more, or if the model has no trained length.
    """
    own, given = values_of(rotary_module, layer_type), extension.parameters
    trained = own.values.get(_TRAINED)
    function, takes_length = bind_method("extend", extension.method, given, own)
    if takes_length or trained is None or (freqs := function()).log_decay is not None:
        return None
    if (own.yarn | given).get("mscale_all_dim"):  # latent attention's softmax scale has it
        return None
    base = {"base": own.values.get("base", 10000.0)}  # plain RoPE, whatever was trained
    plain = bind_method("extend", "rope", base, own)[0]().inv_freq
    factors = (plain.double() / freqs.inv_freq.double()).clamp(max=_STILL).tolist()
    parameters = {
        "short_factor": factors,
        "long_factor": factors,
        "factor": max(1.0, (extension.length or trained) / trained),
        "attention_factor": freqs.attention_factor,
    }
    written = replace(extension, method="longrope", parameters=parameters)
    amplitudes = dict.fromkeys(_AMPLITUDES, freqs.attention_factor)  # Phimoe needs them always
    return (_entries(rotary_module, layer_type, written) or {}) | amplitudes


def _by_vllms_names(values: Mapping[str, Any]) -> dict[str, float]:
    """Return LongRoPE's amplitude as vLLM reads it, which has only the usual one by itself."""
    amplitude, factor = values["attention_factor"], max(1.0, values["factor"])
    trained = values["original_max_position_embeddings"]
    usual = math.sqrt(1 + math.log(factor) / math.log(trained))
    if amplitude is None or math.isclose(amplitude, usual, rel_tol=1e-6):
        return {}
    return dict.fromkeys(_AMPLITUDES, amplitude)


def _set_longest(text: Any, length: int) -> None:
    """Write the length that the extended model reaches; keep the trained one."""
    longest = getattr(text, "max_position_embeddings", None)
    if length == longest:
        return
    if not _names_trained(text):
        text.original_max_position_embeddings = getattr(text, _TRAINED, None) or longest
    text.max_position_embeddings = length


def _names_trained(text: Any) -> bool:
    """Return True if a config's rope_parameters name the trained length."""
    kinds = text.rope_parameters.values()
    nested = [each for each in kinds if isinstance(each, Mapping)] or [text.rope_parameters]
    return all(_TRAINED in each for each in nested)


def _agrees(rotary_modules: Sequence[RotaryModule], extension: Saved, config: Any) -> bool:
    """Return True if transformers reads a config, and computes the extension's frequencies."""
    try:
        text = type(config).from_dict(config.to_dict()).get_text_config(decoder=True)
        with torch.device("cpu"):
            fresh = [type(rotary_module.module)(text) for rotary_module in rotary_modules]
    except Exception:  # each class has its own rules, and its own errors
        return False
    return all(
        _same_frequencies(rotary_module, layer_type, extension, rotary)
        for rotary_module, rotary in zip(rotary_modules, fresh, strict=True)
        for layer_type in rotary_module.layer_types
    )


def _same_frequencies(
    rotary_module: RotaryModule, layer_type: str | None, extension: Saved, fresh: nn.Module
) -> bool:
    """Return True if a fresh rotary embedding has an extension's frequencies."""
    function, takes_length = bind_method(
        "extend", extension.method, extension.parameters, values_of(rotary_module, layer_type)
    )
    freqs = function(seq_len=1) if takes_length else function()
    own = attribute_of(fresh, layer_type, "inv_freq").float()
    if (order := rotary_module.orders[layer_type]) is not None:
        own = own[order.argsort()]
    factor = float(attribute_of(fresh, layer_type, "attention_scaling", 1.0))
    same = own.shape == freqs.inv_freq.shape and torch.allclose(own, freqs.inv_freq, rtol=1e-5)
    return same and abs(factor - freqs.attention_factor) <= 1e-6


def _write(extensions: Sequence[Saved], folder: str | os.PathLike) -> None:
    text = json.dumps({"extensions": [asdict(each) for each in extensions]}, indent=2)
    Path(folder, SAVED).write_text(text + "\n", encoding="utf-8")


def read(folder: str | os.PathLike) -> list[Saved]:
    """Return the extensions stored in a folder; raise ValueError if there are none."""
    path = Path(folder, SAVED)
    if not path.is_file():
        raise ValueError(f"extend_from_saved: folder must have a file {SAVED}, got {folder}")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return [Saved(**each) for each in stored["extensions"]]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"extend_from_saved: {path} must hold what an extension has saved, got {error!r}"
        ) from None
