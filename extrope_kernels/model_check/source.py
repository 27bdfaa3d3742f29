"""Read a model's configuration: as its file states it, and as transformers understands it."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import json
import logging
import re
import tempfile
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extrope_cli import not_found

from .. import methods
from .._usage import UsageError, require, shortened
from ..integrations._shared.saved import TRAINED, SavedFolder, find

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# A configuration's keys about positions: a reader that does not read one ignores it.
_ABOUT_POSITIONS = re.compile(
    "rope|rotary|yarn|ntk|logn|log_n|dual_chunk|alibi|original_max_position|self_extend"
)
_WRONG = re.compile("Unrecognized keys|Missing required|must ")
# What to read for a model_type whose code is in its repositories alone.
_INSTEAD = {
    "kimi_k2": 'a copy with "model_type": "deepseek_v3" is read',
    "minimax_text_01": "read the file of the same model for transformers' minimax (-hf)",
    "chatglm": "read the file of the same model for transformers' glm (-hf)",
}


@dataclass(frozen=True)
class Source:
    """A model's configuration.

    config: the language model's, as transformers reads it; whole: the one around it.
    stated: the file's entries for the language model; beside: those of the rest, if separate.
    warnings: transformers' warnings about it.
    gguf: the prefix of a GGUF file's keys.
    unread: keys that transformers skips when it reads a GGUF file.
    saved: how the folder was saved as extended, None if it was not.
    """

    config: PreTrainedConfig
    whole: PreTrainedConfig
    stated: Mapping[str, Any]
    beside: Mapping[str, Any]
    warnings: tuple[str, ...] = ()
    gguf: str | None = None
    unread: tuple[str, ...] = ()
    saved: SavedFolder | None = None

    @property
    def code(self) -> str:
        """The text of transformers' modules for such a model, which are not imported."""
        names = dict.fromkeys(type(each).__module__ for each in (self.whole, self.config))
        modeling = (name.replace(".configuration_", ".modeling_") for name in names)
        found = map(importlib.util.find_spec, (*names, *modeling))
        return "".join(Path(each.origin).read_text() for each in found if each and each.origin)

    @property
    def reads_by_kind(self) -> bool:
        """True if the model's class reads the rope_parameters of each kind of layers."""
        return "rope_parameters[layer_type]" in self.code

    def ignored(self) -> list[str]:
        """Return the keys about positions that transformers does not read for this model."""
        code, found = self.code, list(self.unread)
        if self.stated.get("rope_scaling") and self.stated.get("rope_parameters"):
            found.append("rope_parameters beside rope_scaling")
        for key in ("rope_parameters", "rope_scaling"):
            own = (None, self.stated.get(key), getattr(self.config, key, None))
            if self.beside.get(key) not in own:
                found.append(f"{key} beside the language model's part")
        key = "rope_parameters"  # of which a class may drop some of the file's
        own = {**(getattr(self.config, key, None) or {}), **(self.stated.get(key) or {})}
        found += [f'{key}["{name}"]' for name in methods.stray({key: own}, self.reads_by_kind)]
        for config, stated in ((self.config, self.stated), (self.whole, self.beside)):
            known = {*inspect.signature(type(config)).parameters, *config.attribute_map}
            # A trained length may have been moved there.
            rope = getattr(config, "rope_parameters", None) or {}
            known |= {key for key in rope if rope[key] == stated.get(key)}
            if self.saved is not None:  # it keeps the trained length for the next extension
                known.add(TRAINED)
            found += [
                key
                for key, value in stated.items()
                if value and _ABOUT_POSITIONS.search(key) and key in vars(config)
                if key not in known and f"config.{key}" not in code and f'"{key}"' not in code
            ]
        return found

    def sees_both_ways(self) -> bool:
        """Return True if tokens of an image see one another, as token_type_ids tell them."""
        takes = re.search(r"\btoken_type_ids: ", self.code) is not None
        return takes or bool(getattr(self.config, "use_bidirectional_attention", None))


def with_one_axis(config: Any, by_kind: bool = True) -> Any:
    """Return a configuration without the axes of mRoPE, which agree on a text.

    A model reads a text whatever its sections add up to. by_kind: False for one that reads one set
    of parameters: without those of kinds of layers too.
    """
    config, parameters = copy.copy(config), config.rope_parameters or {}
    left_out = {"mrope_section", *(() if by_kind else methods.stray(config, by_type=False))}
    config.rope_parameters = {k: v for k, v in parameters.items() if k not in left_out}
    return config


def read_source(name: str) -> Source:
    """Read MODEL: a folder, a GGUF file, a config.json, or a model in the hub's cache.

    Raises UsageError, of one line, if it is missing or cannot be read.
    """
    require("transformers")
    path = Path(name)
    if not (path / "config.json").is_file() and not path.is_file():
        path = _other(name)
    with _said_by_transformers() as warnings:
        try:
            source = _from_gguf(path) if path.suffix == ".gguf" else _from_json(name, path)
        except UsageError:
            raise
        except Exception as error:  # readers of a damaged file may raise anything
            raise UsageError(f"{name}: cannot be read: {shortened(error)}") from error
    if hasattr(source.config, "standardize_rope_params"):  # as transformers does to build it
        source.config.standardize_rope_params()
    if getattr(source.config, "is_heterogeneous", False):  # Gemma 4: sizes by layer
        source.config.allow_global_per_layer_attribute_access = True
    heard = [textwrap.shorten(each, 300) for each in warnings if _WRONG.search(each)]
    try:
        return replace(source, warnings=tuple(dict.fromkeys(heard)), saved=find(path))
    except ValueError as error:
        raise UsageError(str(error)) from error


def _other(name: str) -> Path:
    """Return the GGUF file in a folder or a package, else the path as it is."""
    from ..evaluation.packages import PACKAGES, find_gguf, only_gguf  # late: seconds

    if name in PACKAGES:
        return find_gguf(name, "gguf")
    return only_gguf(Path(name)) if Path(name).is_dir() else Path(name)


def _from_json(name: str, path: Path) -> Source:
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

    file = path / "config.json" if path.is_dir() else path
    if file.is_file() and not isinstance(held := json.loads(file.read_text()), dict):
        raise UsageError(f"{name}: must hold a JSON object, got a {type(held).__name__}")
    try:
        written, _ = PreTrainedConfig.get_config_dict(name, local_files_only=True)
    except (OSError, ValueError) as error:
        if path.exists():
            raise
        raise UsageError(f"{name}: {not_found(name)}") from error
    kind = written.get("model_type")
    if not isinstance(kind, str):
        raise UsageError(f"{name}: must name a model_type, got {kind!r}")
    if kind not in CONFIG_MAPPING and (kind in _INSTEAD or "auto_map" in written):
        instead = f"; {_INSTEAD[kind]}" if kind in _INSTEAD else ""
        raise UsageError(
            f"{name}: model_type {kind!r} is none of transformers' own, and code in a repository "
            f"never runs here{instead}"
        )
    whole = AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    config = whole.get_text_config(decoder=True)
    part = next((key for key in whole.sub_configs if getattr(whole, key, None) is config), None)
    if part not in written:  # None: no parts; Qwen2-VL's first files have all in one
        return Source(config, whole, written, {})
    return Source(config, whole, written[part], written)


def _from_gguf(path: Path) -> Source:
    """Read a GGUF file's metadata without its vocabulary, which takes transformers long."""
    require("gguf")
    from gguf import GGUFReader, GGUFValueType, GGUFWriter
    from transformers import AutoConfig

    reader = GGUFReader(path)
    fields = {k: v for k, v in reader.fields.items() if not k.startswith(("GGUF.", "tokenizer."))}
    values = {key: field.contents() for key, field in fields.items()}
    kind = values["general.architecture"]
    with tempfile.TemporaryDirectory() as folder:
        writer = GGUFWriter(Path(folder) / path.name, kind)
        for key, field in fields.items():
            if key != "general.architecture":
                of = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
                writer.add_key_value(key, values[key], field.types[0], of)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        config = AutoConfig.from_pretrained(folder, gguf_file=path.name, local_files_only=True)
    scaling = {
        key.rpartition(".")[2]: value
        for key, value in values.items()
        if key.startswith(f"{kind}.rope.scaling.")
    }
    stated: dict[str, Any] = {"max_position_embeddings": values.get(f"{kind}.context_length")}
    parameters = getattr(config, "rope_parameters", None) or {}
    unread = []
    if scaling.get("type", "none") != "none" and parameters.get("rope_type") == "default":
        original = scaling.get("original_context_length", stated["max_position_embeddings"])
        stated["rope_parameters"] = {
            **parameters,
            "rope_type": scaling["type"],
            "factor": scaling.get("factor", 1.0),
            "original_max_position_embeddings": original,
        }
        unread.append(f"{kind}.rope.scaling.*")
    unread += [each.name for each in reader.tensors if each.name.startswith("rope_f")]
    return Source(config, config, stated, {}, gguf=kind, unread=tuple(unread))


@contextmanager
def _said_by_transformers() -> Iterator[list[str]]:
    """Collect transformers' warnings about rope parameters."""
    heard: list[str] = []

    def hear(record: logging.LogRecord) -> bool:
        heard.append(record.getMessage())
        return False  # nobody else shall

    logger = logging.getLogger("transformers.modeling_rope_utils")
    level = logger.level
    logger.addFilter(hear)
    logger.setLevel(logging.WARNING)
    try:
        yield heard
    finally:
        logger.removeFilter(hear)
        logger.setLevel(level)
