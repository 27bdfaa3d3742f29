"""Finds and loads causal language models on this machine's disk, never from the network."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import UsageError, packaged
from .options import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SMOLLM2 = "smollm2"  # of packaged.PACKAGES


@dataclass(frozen=True)
class ModelFiles:
    """Where a model lies: its folder, and the GGUF file in it when that holds the model."""

    folder: Path
    gguf_file: str | None = None


def find_model(name: str) -> ModelFiles:
    """Return the files of a model: one of PACKAGES, a transformers folder or a GGUF file.

    Raises UsageError when there is no such model, or a package to read it with is missing.
    """
    files = _packaged(name) if name in packaged.PACKAGES else _files_at(Path(name))
    if files.gguf_file is not None:
        require("gguf", "accelerate")
    return files


def _packaged(name: str) -> ModelFiles:
    gguf = packaged.find_gguf(name)
    converted = packaged.converted_folder(name)
    if (converted / "config.json").is_file():
        return ModelFiles(converted)
    return ModelFiles(gguf.parent, gguf.name)


def _files_at(path: Path) -> ModelFiles:
    if path.is_file() and path.suffix == ".gguf":
        return ModelFiles(path.parent, path.name)
    if not path.is_dir():
        raise UsageError(f"--model {path}: no such folder or .gguf file")
    if (path / "config.json").is_file():
        return ModelFiles(path)
    ggufs = sorted(file.name for file in path.glob("*.gguf"))
    if not ggufs:
        raise UsageError(f"--model {path}: holds neither config.json nor a .gguf file")
    if len(ggufs) > 1:
        raise UsageError(f"--model {path}: holds several models, name one of {', '.join(ggufs)}")
    return ModelFiles(path, ggufs[0])


def load_tokenizer(files: ModelFiles) -> PreTrainedTokenizerBase:
    """Return the tokenizer that lies beside the model; raises UsageError."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(files.folder, **_loading(files))
    except Exception as error:  # of a damaged file each reader raises what it likes
        raise UsageError(f"cannot load the tokenizer: {_first_line(error)}") from error


def load_model(files: ModelFiles, dtype: str, device: str) -> PreTrainedModel:
    """Return the model in evaluation mode; raises UsageError.

    dtype: name of a torch dtype, "float32" or "bfloat16".
    """
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            files.folder, dtype=getattr(torch, dtype), **_loading(files)
        )
    except Exception as error:  # of a damaged file each reader raises what it likes
        raise UsageError(f"cannot load the model: {_first_line(error)}") from error
    if model.base_model is model:
        raise UsageError(f"{type(model).__name__} has no body apart from its head")
    if device.startswith("cpu"):
        _attend_by_ops(model)
    return model.to(device).eval()


def _attend_by_ops(model: PreTrainedModel) -> None:
    """Let layers attend by our op, which is faster on a CPU than torch's, where they can."""
    from ..integrations.transformers import register_interface

    register_interface()
    try:
        model.set_attn_implementation("extrope")
    except ValueError:
        return


def keep_converted(
    name: str, files: ModelFiles, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Keep a copy of a packaged model that loads faster next time."""
    of_package = name in packaged.PACKAGES and files.gguf_file is not None
    if of_package and model.dtype == torch.float32:
        packaged.save_converted(name, model, tokenizer)


def unpacked(name: str) -> Path:
    """Return the folder of a packaged model as transformers writes one, for who reads no other.

    It is made from the GGUF file the first time. Raises UsageError.
    """
    files = find_model(name)
    if files.gguf_file is not None:
        keep_converted(name, files, load_model(files, "float32", "cpu"), load_tokenizer(files))
        files = find_model(name)
    if files.gguf_file is not None:
        raise UsageError(f"--model {name}: cannot write {packaged.converted_folder(name)}")
    return files.folder


def pick_device(name: str | None) -> str:
    """Return the name of the device to run on; raises UsageError when torch cannot use it."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name}: {_first_line(error)}") from error
    return name


def quiet() -> None:
    """Keep transformers off the network, and its progress bars off the terminal.

    To be called before transformers is imported: it reads the environment then.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["TQDM_DISABLE"] = "1"
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def training_length(model: PreTrainedModel) -> int:
    """Return how many positions the model was trained on, as its config says; raises UsageError."""
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not length:
        raise UsageError("the model's config names no max_position_embeddings")
    return int(length)


def unscaled_length(model: PreTrainedModel) -> int:
    """Return the length that a frequency method extends, in place of the model's own scaling."""
    parameters = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    by_type = [each for each in parameters.values() if isinstance(each, dict)]
    for each in (parameters, *by_type):
        if each.get("original_max_position_embeddings"):
            return int(each["original_max_position_embeddings"])
    return training_length(model)


def decoder_layers(model: PreTrainedModel) -> Sequence[nn.Module]:
    """Return the decoder layers in order."""
    count = model.config.get_text_config().num_hidden_layers
    for module in model.base_model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    return []


def _loading(files: ModelFiles) -> dict[str, Any]:
    options: dict[str, Any] = {"local_files_only": True}
    if files.gguf_file is not None:
        options["gguf_file"] = files.gguf_file
    return options


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
