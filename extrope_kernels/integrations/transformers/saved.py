"""An extension on disk: the arguments of `extend` in extrope.json, and a config for other programs.

A config has those frequencies for which transformers has a type (`rope_parameters`). All others,
score methods, XPOS and frequencies that follow the length are in extrope.json alone, which
`extend_from_saved` reads.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from .._shared.parameters import PARAMETERS, plain, values_for
from .._shared.saved import SAVED, Saved, length_of
from .frequencies import values_of
from .model import adapters_of, generation_config_owner
from .patches import ON_OWNER, Applied
from .rope_parameters import TRAINED, set_longest, with_frequencies
from .rotary import find_rotary_modules

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
