"""An extension on disk: the arguments of `extend` in extrope.json, and a config for other programs.

A config has those frequencies for which transformers has a type (`with_frequencies`). All others,
score methods, XPOS and frequencies that follow the length are in extrope.json alone, which
`extend_from_saved` reads.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..._rope_types import ROPE_TYPES
from ...methods import METHODS, stray
from .._shared.parameters import BY_AXIS, PARAMETERS, bind_method, plain, values_for
from .._shared.saved import SAVED, Saved, length_of
from .attention import plain_class
from .frequencies import values_of
from .model import adapters_of, generation_config_owner
from .patches import ON_OWNER, Applied
from .rotary import RotaryModule, attribute_of, find_rotary_modules

TRAINED = "original_max_position_embeddings"
# Methods with a type in configs.
_TYPES = {each.method: name for name, each in reversed(ROPE_TYPES.items()) if name != "axial"}
_TYPES |= {"abf": "default", "ntk_aware": "default"}
# All other entries of a config on a rotation (a share of the dims, axes) stay.
_SCALING = {key for each in ROPE_TYPES.values() for key in each.keys}
_SCALING |= {"rope_type", "type", "rope_theta", "alpha"}
# The entry of auto_mapping, PEFT's free field of an adapter's configuration, which comes along with
# an adapter: a loaded one has no folder, and PEFT calls nobody when it loads one.
ADAPTER_MARK = "extrope"
_CARD = "README.md"  # the model card, which PEFT writes and others show


def describe(model: nn.Module, applied: Applied) -> Saved:
    """Return the stored form of an extension of a model."""
    method, rotary_modules = applied.method, find_rotary_modules(model, applied.layers)
    values = [values_of(each, kind) for each in rotary_modules for kind in each.layer_types]
    shared: dict[str, Any] = {}
    if method in PARAMETERS and not applied.is_score:
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
    before = applied.before
    reach = rotary_modules[0].reach if before is None else describe(model, before).length
    known = {**values[0].values, "max_position_embeddings": reach}
    if TRAINED in values[0].trained and not {"base", TRAINED} & set(applied.parameters):
        known[TRAINED] = values[0].trained[TRAINED]
    length = None if applied.own else length_of(method, {**known, **parameters})
    return Saved(method, parameters, applied.layers, length, applied.cache)


def save_plain(
    module: nn.Module,
    model: nn.Module,
    applied: Applied,
    save_directory: str | os.PathLike,
    *args: Any,
    **options: Any,
) -> None:
    """Replace a module's `save_pretrained`, which writes the plain model's config, or adapters."""
    _refuse_upload(options)
    type(module).save_pretrained(module, save_directory, *args, **options)
    if not options.get("is_main_process", True) or not _write(model, applied, save_directory):
        return
    if not Path(save_directory, "config.json").exists():
        return  # adapters, which a plain model takes too
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
            _write(self, applied, save_directory)
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

    inner = generation_config_owner(model)
    if any(type(each).__module__.startswith("peft.tuners.") for each in inner.modules()):
        raise TypeError(
            f"extend: save_pretrained needs a model of transformers, got {type(model).__name__}; "
            "merge adapters, or save them and the model apart"
        )
    model = inner  # PEFT's wrapper stays around a model whose adapters were merged
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"extend: save_pretrained needs a model of transformers, got {type(model).__name__}"
        )
    _refuse_upload(options)
    applied = vars(find_rotary_modules(model, "all")[0].owner)[ON_OWNER]
    type(model).save_pretrained(model, folder, **options)  # completes its config too
    if not options.get("is_main_process", True):
        return
    config = copy.deepcopy(model.config)
    unknown = [each.method for each in applied.all() if each.is_score]
    # The last one replaces the scaling of those before it.
    for each in [each for each in applied.all() if not each.is_score][-1:]:
        found = None if each.own else with_frequencies(model, describe(model, each))
        if found is None:
            unknown.insert(0, each.method)
        config = found or config
    if length is not None:
        set_longest(config.get_text_config(decoder=True), length)
    config.save_pretrained(folder)
    if _write(model, applied, folder, bool(unknown)) and unknown:
        warnings.warn(
            "extend: transformers has no rope_parameters for "
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


def _write(
    model: nn.Module, applied: Applied, folder: str | os.PathLike, card: bool = True
) -> bool:
    """Write all extensions of a model into a folder.

    card: the configuration is without them: say so in the model card too.

    Returns False, with a warning, if one is by a Score or a RopeFreqs of the user's own.
    """
    if own := [each.method for each in applied.all() if each.own is not None]:
        warnings.warn(
            f"extend: {own[0]} of your own is not saved: {folder} has the plain model",
            stacklevel=4,
        )
        return False
    extensions = [asdict(describe(model, each)) for each in applied.all()]
    text = json.dumps({"extensions": extensions, "in_config": not card}, indent=2)
    Path(folder, SAVED).write_text(text + "\n", encoding="utf-8")
    for name in ("", *adapters_of(model)):
        _mark(Path(folder, name, "adapter_config.json"), str(applied))
    path = Path(folder, _CARD)
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    if card and SAVED not in before:
        path.write_text(before + _card(applied), encoding="utf-8")
    return True


def _mark(adapter_config: Path, extensions: str) -> None:
    """Write into an adapter's configuration, if there is one, what it was saved as extended by."""
    if not adapter_config.is_file():
        return
    config = json.loads(adapter_config.read_text(encoding="utf-8"))
    config["auto_mapping"] = {**(config.get("auto_mapping") or {}), ADAPTER_MARK: extensions}
    adapter_config.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _card(applied: Applied) -> str:
    """Return the section of a model card."""
    return f"""
## Extended: {applied}

This model was saved as extended. Loaded by transformers or PEFT alone it is the plain model. To
extend it as it was (`{SAVED}` says how):

```python
from extrope_kernels.integrations.transformers import extend_from_saved

extend_from_saved(model, "this folder")
```
"""


def with_frequencies(model: nn.Module, extension: Saved) -> Any:
    """Return a copy of the config that yields an extension's frequencies; None if none does."""
    rotary_modules = find_rotary_modules(model, extension.layers)
    text = model.config.get_text_config(decoder=True)
    if any(each.learned for each in rotary_modules):
        return None  # those who read it would multiply by the weights again
    if any(plain_class(x.module.config) is not plain_class(text) for x in rotary_modules):
        return None
    if "over" in PARAMETERS[extension.method] and "over" not in extension.parameters:
        return None  # kinds of layers were trained under different scalings: read them there
    config = copy.deepcopy(model.config)
    text = config.get_text_config(decoder=True)
    by_kind = None not in rotary_modules[0].layer_types
    for name in stray(text, by_kind):  # a reader may take them for scalings
        del text.rope_parameters[name]
    for each in rotary_modules:
        for kind in each.layer_types:
            if (entries := _entries(each, kind, extension)) is None:
                return None
            text.rope_parameters = (
                entries if kind is None else {**text.rope_parameters, kind: entries}
            )
    if getattr(text, "rope_scaling_layers", None) is not None:  # Molmo 2 scales these alone
        text.rope_scaling_layers = list(range(text.num_hidden_layers))
    trained = values_of(rotary_modules[0], rotary_modules[0].layer_types[0]).values.get(TRAINED)
    if not _names_trained(text) and trained != getattr(text, "max_position_embeddings", None):
        text.original_max_position_embeddings = trained  # the scaling before had it
    if extension.length is not None:
        longest = getattr(text, "max_position_embeddings", None) or 0
        set_longest(text, max(extension.length, longest))
    elif extension.method == "dynamic_ntk":  # its type takes the longest for the trained length
        text.max_position_embeddings = extension.parameters["max_position_embeddings"]
    return config if _agrees(rotary_modules, extension, config) else None


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
    kind = _TYPES[method]
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
        values["factor"] = values["max_position_embeddings"] / values[TRAINED]
    kept = {k: v for k, v in rotary_module.parameters(layer_type).items() if k not in _SCALING}
    told = {key: values[key] for key in ROPE_TYPES[kind].keys if values[key] is not None}
    return {**kept, "rope_type": kind, "rope_theta": base, **told}


def set_longest(text: Any, length: int) -> None:
    """Write the length that the extended model reaches; keep the trained one."""
    longest = getattr(text, "max_position_embeddings", None)
    if length == longest:
        return
    if not _names_trained(text):
        text.original_max_position_embeddings = getattr(text, TRAINED, None) or longest
    text.max_position_embeddings = length


def _names_trained(text: Any) -> bool:
    """Return True if a config's rope_parameters name the trained length."""
    kinds = text.rope_parameters.values()
    nested = [each for each in kinds if isinstance(each, Mapping)] or [text.rope_parameters]
    return any(TRAINED in each for each in nested)


def _agrees(rotary_modules: Sequence[RotaryModule], extension: Saved, config: Any) -> bool:
    """Return True if transformers reads a config, and computes the extension's frequencies."""
    try:
        text = type(config).from_dict(config.to_dict()).get_text_config(decoder=True)
        with torch.device("cpu"):
            built = [(each, type(each.module)(text)) for each in rotary_modules]
    except Exception:  # each class has its own rules, and its own errors
        return False
    for each, rotary in built:
        for kind in each.layer_types:
            function, takes_length = bind_method(
                "extend", extension.method, extension.parameters, values_of(each, kind)
            )
            freqs = function(seq_len=1) if takes_length else function()
            own = attribute_of(rotary, kind, "inv_freq").float()
            if (order := each.orders[kind]) is not None:
                own = own[order.argsort()]
            factor = float(attribute_of(rotary, kind, "attention_scaling", 1.0))
            same = own.shape == freqs.inv_freq.shape
            same = same and torch.allclose(own, freqs.inv_freq, rtol=1e-5)
            if not same or abs(factor - freqs.attention_factor) > 1e-6:
                return False
    return True
