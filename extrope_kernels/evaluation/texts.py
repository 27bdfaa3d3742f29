"""Texts to read, their tokens, and pieces of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from extrope_cli import BUILT_IN_TEXT

from .._usage import UsageError
from .digests import tokens_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Text(NamedTuple):
    """The tokens of a text.

    name: its name in tables.
    opening: tokens that open every sequence of this model, usually BOS: (opening tokens,) int64
    ids: (tokens,) int64, without the opening.
    """

    name: str
    opening: Tensor
    ids: Tensor

    @property
    def tokens(self) -> int:
        """The number of tokens, with the opening."""
        return len(self.opening) + len(self.ids)

    @property
    def digest(self) -> str:
        """A digest that tells this text from others of its name."""
        return tokens_digest(torch.cat([self.opening, self.ids]))

    def about(self) -> dict[str, str | int]:
        """Return the description of this text for results."""
        return {"name": self.name, "tokens": self.tokens, "digest": self.digest}

    def piece(self, length: int, index: int, seed: int, more: int = 0) -> Tensor:
        """Return `length` tokens in a row, with the opening, and `more` after them.

        The first piece starts with the text, the others anywhere. After the end of the text it
        starts again.

        Returns: (length + more,) int64
        """
        length -= len(self.opening)
        last = len(self.ids) - length
        start = 0 if index == 0 else random.Random(f"{seed} {index}").randrange(last + 1)
        places = torch.arange(start, start + length + more) % len(self.ids)
        return torch.cat([self.opening, self.ids[places]])


def read_texts(tokenizer: PreTrainedTokenizerBase, names: Sequence[str]) -> list[Text]:
    """Read each text by `read_text`; raises UsageError if two are equal.

    Equal texts would give equal pieces, which would make the standard error too small.
    """
    found: dict[str, Text] = {}
    for name in names:
        text = read_text(tokenizer, name)
        if found.setdefault(text.digest, text) is not text:
            raise UsageError(f"text {name}: is given twice")
    return list(found.values())


def check_files(names: Sequence[str]) -> None:
    """Raise UsageError for a text that cannot be read, before anything slow."""
    for name in names:
        _read(name)


def read_text(tokenizer: PreTrainedTokenizerBase, name: str) -> Text:
    """Return the text of a file, or `pydocs`; raises UsageError."""
    ids = tokenizer(_read(name), add_special_tokens=False, verbose=False).input_ids
    opening, body = (torch.tensor(part, dtype=torch.int64) for part in (_opening(tokenizer), ids))
    return Text(Path(name).name, opening, body)


def check_tokens(texts: Sequence[Text], length: int) -> None:
    """Raise UsageError if a text has fewer than `length` tokens."""
    for text in texts:
        if text.tokens < length:
            raise UsageError(f"{text.name}: {text.tokens:,} tokens, too short for {length:,}")


def _opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # By a word: the tokens of an empty text may also be ones that the tokenizer puts at the end.
    bare = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    fits = (at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
    return whole[: next(fits, 0)]


def _read(name: str) -> str:
    if name == BUILT_IN_TEXT:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[topic] for topic in sorted(topics))
    try:
        return Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"text {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"text {name}: not UTF-8 at byte {error.start}") from error
