"""Short digests that tell models and texts of the same name apart."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hashlib import _Hash

    from transformers import PreTrainedModel

_DIGITS = 12  # of SHA-256 in hex: enough to tell one user's models and texts apart
# Entries of a configuration about the weights' origin; the weights' digest covers their dtype.
_ORIGIN = {"_name_or_path", "architectures", "dtype", "quantization_config", "torch_dtype"}
_ORIGIN |= {"transformers_version"}


def model_digest(model: PreTrainedModel) -> str:
    """Return the digest of a loaded model's configuration and weights."""
    config = json.loads(
        json.dumps(model.config.to_dict(), default=str),
        object_hook=lambda entries: {k: x for k, x in entries.items() if k not in _ORIGIN},
    )
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            _add(digest, name, tensor)
    return digest.hexdigest()[:_DIGITS]


def tokens_digest(ids: Tensor) -> str:
    """Return the digest of tokens: (tokens,) int64."""
    digest = hashlib.sha256()
    _add(digest, "tokens", ids)
    return digest.hexdigest()[:_DIGITS]


def _add(digest: _Hash, name: str, tensor: Tensor) -> None:
    if hasattr(tensor, "__tensor_flatten__"):  # such as quantized weights with their scales
        for part in tensor.__tensor_flatten__()[0]:
            _add(digest, f"{name}.{part}", getattr(tensor, part))
        return
    digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
