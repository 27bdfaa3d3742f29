"""Passkey retrieval: can the model repeat a number that a long text mentions once?

Task: https://arxiv.org/abs/2305.16300
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import UsageError, plots, texts
from .forward import batches, logits, run_body
from .report import share_interval

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# A plain model of 135M parameters continues this one, where it is far from answering a question.
_NEEDLE = "\n\nThe pass key is {key}. Remember it. The pass key is {key}.\n\n"
_QUESTION = "\n\nThe pass key is"
# Models without an opening token look at a text's first ones whatever these say, and recall a key
# there less often: SmolLM2 six of ten in 4,096 tokens, nine behind so many.
_LEAD = 64


@dataclass(frozen=True)
class Prompt:
    """A text that hides a key, asks for it, and answers.

    ids: (seqlen,) int64, the answer included
    answer: how many tokens at the end of `ids` are the answer.
    needle: position of the first token of the sentence with the key.
    """

    ids: Tensor
    answer: int
    needle: int


def key(trial: int, seed: int = 0) -> str:
    """Return the five digits of a trial, the same in every run of a seed."""
    return str(random.Random(f"{seed} {trial}").randint(10000, 99999))


def depths(count: int) -> list[float]:
    """Return `count` depths from 0, near the start of the text, to 1, its end."""
    return [0.5] if count == 1 else [index / (count - 1) for index in range(count)]


def make_prompt(
    tokenizer: PreTrainedTokenizerBase,
    text: texts.Text,
    length: int,
    depth: float,
    trial: int,
    seed: int = 0,
) -> Prompt:
    """Return a prompt of exactly `length` tokens with a trial's key at `depth` of a piece of text.

    depth: 0 puts the key behind the first 64 tokens, 1 right before the question.

    Raises UsageError when the length leaves no room for any text.
    """

    def encode(written: str) -> list[int]:
        return tokenizer(written, add_special_tokens=False, verbose=False).input_ids

    secret = key(trial, seed)
    needle = encode(_NEEDLE.format(key=secret))
    question, answer = _question_and_answer(encode, secret)
    opening = text.opening.tolist()
    room = length - len(opening) - len(needle) - len(question) - len(answer)
    if room < 0:
        raise UsageError(f"--lengths {length}: a passkey prompt needs {length - room} tokens")
    start = text.start(room, trial, seed)
    filler = text.ids[start : start + room].tolist()
    lead = min(_LEAD, room)
    cut = lead + round(depth * (room - lead))
    ids = opening + filler[:cut] + needle + filler[cut:] + question + answer
    return Prompt(torch.tensor(ids), len(answer), len(opening) + cut)


def _question_and_answer(
    encode: Callable[[str], list[int]], key: str
) -> tuple[list[int], list[int]]:
    # Tokenizers may treat a text's first word in another way than the same word inside it, so the
    # answer is cut off the end of the whole.
    question = encode(_QUESTION)
    whole = encode(f"{_QUESTION} {key}")
    shared = 0
    while shared < len(question) and question[shared] == whole[shared]:
        shared += 1
    return whole[:shared], whole[shared:]


@torch.inference_mode()
def recalls(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    on_layer: Callable[[int], None] = lambda rows: None,
) -> list[bool]:
    """Return of each prompt whether greedy decoding after the question would give the answer.

    One pass over question and answer decides it: decoding follows the answer exactly as long as
    each of its tokens is the likeliest after those before it.

    prompts: all of one length.
    on_layer: called after each decoder layer with the number of prompts that went through it.
    """
    found: list[bool] = []
    for ids in batches(prompt.ids for prompt in prompts):
        rows, seqlen = ids.shape
        body = run_body(model, ids.to(model.device), lambda rows=rows: on_layer(rows))
        answers = [prompt.answer for prompt in prompts[len(found) : len(found) + rows]]
        start = seqlen - max(answers)
        guesses = logits(model, body, start - 1, seqlen - 1).argmax(-1).cpu()
        right = guesses == ids[:, start:]
        found += [bool(row[-count:].all()) for row, count in zip(right, answers, strict=True)]
    return found


class PasskeyTask:
    """How many of a few keys the model recalls, by how deep in the text they are hidden."""

    name = "passkey"

    def __init__(
        self,
        args: argparse.Namespace,
        lengths: Sequence[int],
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        if len(args.text) > 1:
            raise UsageError(f"--text: passkey hides its keys in one text, got {len(args.text)}")
        self._tokenizer = tokenizer
        self._depths = depths(args.depths)
        self._trials, self._seed = args.trials, args.seed
        self._text = texts.load_texts(tokenizer, args.text, max(lengths))[0]
        for length in lengths:
            make_prompt(tokenizer, self._text, length, 0.0, 0)

    def settings(self) -> dict[str, Any]:
        return {
            "depths": self._depths,
            "lead": _LEAD,
            "texts": [self._text.about()],
            "trials": self._trials,
            "seed": self._seed,
        }

    def heads(self) -> list[str]:
        return [f"{depth:.0%}" for depth in self._depths]

    def ticks(self, layers: int) -> int:
        return layers * len(self._depths) * self._trials

    def measure(
        self, model: PreTrainedModel, length: int, on_progress: Callable[[int], None]
    ) -> dict[str, Any]:
        recalled = []
        for depth in self._depths:
            prompts = [
                make_prompt(self._tokenizer, self._text, length, depth, trial, self._seed)
                for trial in range(self._trials)
            ]
            recalled.append(sum(recalls(model, prompts, on_progress)))
        return {
            "tokens": length * len(self._depths) * self._trials,
            "recalled": recalled,
            "accuracy": [count / self._trials for count in recalled],
            "intervals": [share_interval(count, self._trials) for count in recalled],
        }

    def cells(self, row: dict[str, Any]) -> list[str]:
        """By Wilson's interval of 95%: 80% (49-94)."""
        return [
            f"{share:.0%} ({100 * low:.0f}-{100 * high:.0f})"
            for share, (low, high) in zip(row["accuracy"], row["intervals"], strict=True)
        ]

    def plot(self, results: dict[str, Any], path: Path) -> None:
        plots.plot_passkey(results, path)
