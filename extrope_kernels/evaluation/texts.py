"""Texts to read, and their tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from extrope_kernels.evaluation import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_text(name: str) -> str:
    """Return the text of a UTF-8 file, or for `pydocs` the Python reference; raises UsageError."""
    if name == "pydocs":
        from pydoc_data.topics import topics

        return "\n\n".join(topics[topic] for topic in sorted(topics))
    try:
        return Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--text {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--text {name}: not UTF-8 at byte {error.start}") from error


def first_tokens(tokenizer: PreTrainedTokenizerBase, text: str, length: int, name: str) -> Tensor:
    """Return the first `length` tokens of the text: (length,) int64.

    A token that opens every sequence of this model (BOS) counts among them.

    Raises UsageError, calling the text `name`, when it is shorter.
    """
    ids = tokenizer(text, verbose=False).input_ids
    if len(ids) < length:
        raise UsageError(f"--text {name}: {len(ids):,} tokens, too short for --lengths {length:,}")
    return torch.tensor(ids[:length])
