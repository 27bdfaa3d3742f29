"""Texts to read, their tokens, and pieces of them."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import UsageError
from .digests import tokens_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BUILT_IN = "pydocs"


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

    def halves(self) -> tuple[Text, Text]:
        """Return the first half of the text and the second."""
        half = len(self.ids) // 2
        first, second = self.ids[:half], self.ids[half:]
        return (
            Text(f"{self.name}, first half", self.opening, first),
            Text(f"{self.name}, second half", self.opening, second),
        )

    def start(self, length: int, index: int, seed: int) -> int:
        """Return the start of a piece of `length` tokens; the first piece starts with the text."""
        if index == 0:
            return 0
        return random.Random(f"{seed} {index}").randrange(len(self.ids) - length + 1)

    def piece(self, length: int, index: int, seed: int) -> Tensor:
        """Return `length` tokens in a row, with the opening: (length,) int64."""
        length -= len(self.opening)
        start = self.start(length, index, seed)
        return torch.cat([self.opening, self.ids[start : start + length]])

    def after(self, length: int, index: int, seed: int, count: int) -> Tensor:
        """Return the `count` tokens after that piece; the text starts again after its end."""
        length -= len(self.opening)
        start = self.start(length, index, seed) + length
        return self.ids[torch.arange(start, start + count) % len(self.ids)]


@dataclass(frozen=True)
class Asked:
    """The command's options about texts.

    texts: files, or `pydocs`. bucket: tokens per bucket of positions.
    """

    texts: Sequence[str]
    lengths: Sequence[int]
    trials: int = 3
    seed: int = 0
    bucket: int = 2048


class Reading:
    """The pieces of all texts, the same for every method; raises UsageError like `load_texts`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, asked: Asked, longest: int) -> None:
        self._texts = load_texts(tokenizer, asked.texts, longest)
        self._trials, self._seed = asked.trials, asked.seed
        self.count = asked.trials * len(self._texts)

    def about(self) -> dict[str, Any]:
        """Return the description of all texts for results."""
        about = [text.about() for text in self._texts]
        return {"texts": about, "trials": self._trials, "seed": self._seed}

    def pieces(self, length: int, more: int = 0) -> Iterator[Tensor]:
        """Yield each piece with the `more` tokens after it: (length + more,)."""
        for text in self._texts:
            for index in range(self._trials):
                piece = text.piece(length, index, self._seed)
                yield torch.cat([piece, text.after(length, index, self._seed, more)])


def load_texts(
    tokenizer: PreTrainedTokenizerBase, names: Sequence[str], longest: int
) -> list[Text]:
    """Return the texts of these files; `pydocs` is the Python reference.

    Raises UsageError if one cannot be read, is given twice, or has fewer than `longest` tokens.
    """
    texts = read_texts(tokenizer, names)
    for name, text in zip(names, texts, strict=True):
        if text.tokens < longest:
            raise UsageError(
                f"--text {name}: {text.tokens:,} tokens, too short for --lengths {longest:,}"
            )
    return texts


def read_texts(tokenizer: PreTrainedTokenizerBase, names: Sequence[str]) -> list[Text]:
    """Read each text by `read_text`; raises UsageError if two are equal.

    Equal texts would give equal pieces, which would make the standard error too small.
    """
    found: dict[str, Text] = {}
    for name in names:
        text = read_text(tokenizer, name)
        if found.setdefault(text.digest, text) is not text:
            raise UsageError(f"--text {name}: is given twice")
    return list(found.values())


def read_text(tokenizer: PreTrainedTokenizerBase, name: str, option: str = "--text") -> Text:
    """Return the text of a file, or `pydocs`; raises UsageError with the option's name."""
    ids = tokenizer(_read(name, option), add_special_tokens=False, verbose=False).input_ids
    opening, body = (torch.tensor(part, dtype=torch.int64) for part in (_opening(tokenizer), ids))
    return Text(Path(name).name, opening, body)


def _opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    # By a word: the tokens of an empty text may also be ones that the tokenizer puts at the end.
    bare = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    fits = (at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
    return whole[: next(fits, 0)]


def source(name: str) -> str | None:
    """Return one path for all spellings of a text's file; None for `pydocs`."""
    return None if name == _BUILT_IN else os.path.realpath(name)


def _read(name: str, option: str) -> str:
    if name == _BUILT_IN:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[topic] for topic in sorted(topics))
    try:
        return Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{option} {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{option} {name}: not UTF-8 at byte {error.start}") from error
