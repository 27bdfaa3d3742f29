"""Find and load causal language models on this machine's disk, never from the network."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from .._ext import cache_dirs, load
from .._usage import UsageError, quiet, require, shortened
from ..integrations._shared.parameters import lengths_in
from ..integrations.transformers import register_interface
from ..integrations.transformers.model import generation_config_owner
from ..methods import Lengths
from .packages import PACKAGES, find_gguf, keep_in_cache, only_gguf

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class ModelFiles(NamedTuple):
    """A model's folder, and the GGUF file in it if that holds the model."""

    folder: Path
    gguf_file: str | None = None


def find_model(name: str) -> ModelFiles:
    """Return the files of a model: one of PACKAGES, a transformers folder or a GGUF file.

    Raises UsageError if there is no such model, or a package that reads it is missing.
    """
    files = ModelFiles(unpacked(name)) if name in PACKAGES else _files_at(Path(name))
    if files.gguf_file is not None:
        require("gguf", "accelerate")
    return files


def _files_at(path: Path) -> ModelFiles:
    if path.is_file() and path.suffix == ".gguf":
        return ModelFiles(path.parent, path.name)
    if not path.is_dir():
        raise UsageError(f"model {path}: no such folder or .gguf file")
    if (path / "config.json").is_file():
        return ModelFiles(path)
    return ModelFiles(path, only_gguf(path).name)


def prepared(name: str, device: str | None) -> tuple[ModelFiles, str]:
    """Return a model's files and the device, before anything slow; raises UsageError."""
    chosen = pick_device(device)
    files = find_model(name)
    require("transformers")
    quiet()
    if chosen.startswith("cpu"):
        load("cpu")  # the first time it is compiled: before progress is told, and the time it takes
    print(f"loading {name}", file=sys.stderr, flush=True)
    return files, chosen


def load_tokenizer(files: ModelFiles) -> PreTrainedTokenizerBase:
    """Return the tokenizer from the model's folder; raises UsageError."""
    from transformers import AutoTokenizer

    return _load("tokenizer", AutoTokenizer, files)


def load_model(files: ModelFiles, dtype: str, device: str) -> PreTrainedModel:
    """Return the model in evaluation mode; raises UsageError.

    dtype: name of a torch dtype, "float32" or "bfloat16".
    """
    from transformers import AutoModelForCausalLM

    model = with_body(_load("model", AutoModelForCausalLM, files, dtype=getattr(torch, dtype)))
    if device.startswith("cpu"):  # where our op is faster than torch's
        register_interface()
        with contextlib.suppress(ValueError):  # of layers that cannot attend by it
            model.set_attn_implementation("extrope")
    return model.to(device).eval()


def with_body(model: nn.Module) -> PreTrainedModel:
    """Return a model, without a wrapper (PEFT's); raises UsageError unless body and head differ."""
    model = generation_config_owner(model)
    if getattr(model, "base_model", model) is model:
        raise UsageError(f"{type(model).__name__} has no body apart from its head")
    return model


def _load(what: str, auto: Any, files: ModelFiles, **options: Any) -> Any:
    if files.gguf_file is not None:
        options["gguf_file"] = files.gguf_file
    try:
        return auto.from_pretrained(files.folder, local_files_only=True, **options)
    except Exception as error:  # readers raise all kinds of errors for damaged files
        raise UsageError(f"cannot load the {what}: {shortened(error)}") from error


def pick_device(name: str | None) -> str:
    """Return the name of the device to run on; raises UsageError if torch cannot use it."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name}: {shortened(error)}") from error
    return name


def lengths_of(model: PreTrainedModel) -> Lengths:
    """Return the model's lengths, as `extend` reads them; raises UsageError if it names none."""
    if (known := lengths_in(model.config.get_text_config(decoder=True))) is None:
        raise UsageError("the model's config names no max_position_embeddings")
    return known


def decoder_layers(model: PreTrainedModel) -> Sequence[nn.Module]:
    """Return the decoder layers in order; none if they are not found."""
    lists = (each for each in model.get_decoder().modules() if isinstance(each, nn.ModuleList))
    return list(next(lists, []))


@contextlib.contextmanager
def after_each_layer(model: PreTrainedModel, call: Callable[[], None]) -> Iterator[None]:
    """Call a function after each forward of a decoder layer, in a `with` block."""
    handles = [layer.register_forward_hook(lambda *_: call()) for layer in decoder_layers(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def unpacked(name: str) -> Path:
    """Return the folder of one of PACKAGES in transformers' format; raises UsageError.

    The first call makes it, in float32, in the user's cache: it loads in a second, the GGUF file in
    half a minute.
    """
    if (target := cache_dirs()[0] / Path(PACKAGES[name].file).stem).exists():
        return target
    readers = ("gguf", "accelerate", "transformers")
    gguf = find_gguf(name, *readers)
    require(*readers)
    quiet()
    print(f"unpacking {name} from {gguf}, half a minute or more", file=sys.stderr, flush=True)
    files = ModelFiles(gguf.parent, gguf.name)
    model, tokenizer = load_model(files, "float32", "cpu"), load_tokenizer(files)
    # transformers refuses to save a model while it remembers the quantization.
    model.hf_quantizer = None
    del model.config.quantization_config

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return keep_in_cache(name, target, save)
