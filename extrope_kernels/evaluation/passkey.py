"""Passkey retrieval: can the model repeat a number that a long text mentions once?

Task: https://arxiv.org/abs/2305.16300
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from extrope_kernels.evaluation import UsageError
from extrope_kernels.evaluation.forward import logits, run_body

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_INTRODUCTION = "A pass key is hidden in the text below. Find it and remember it.\n\n"
_FILLER = "The river runs past the mill. A cart rolls along the road. Rain falls on the roof. "
_NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key. "
_QUESTION = "\n\nWhat is the pass key? The pass key is"


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


def key(trial: int) -> str:
    """Return the five digits of a trial, the same in every run."""
    return str(random.Random(trial).randint(10000, 99999))


def depths(count: int) -> list[float]:
    """Return `count` depths from 0, the start of the text, to 1, its end."""
    return [0.5] if count == 1 else [index / (count - 1) for index in range(count)]


def make_prompt(tokenizer: PreTrainedTokenizerBase, key: str, length: int, depth: float) -> Prompt:
    """Return a prompt of exactly `length` tokens with the key at `depth` of the filler.

    depth: 0 puts the key right after the introduction, 1 right before the question.

    Raises UsageError when the length leaves no room for any filler.
    """

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    opening = tokenizer("", verbose=False).input_ids
    opening = opening if opening == [tokenizer.bos_token_id] else []
    introduction = opening + encode(_INTRODUCTION)
    needle = encode(_NEEDLE.format(key=key))
    question, answer = _question_and_answer(encode, key)
    room = length - len(introduction) - len(needle) - len(question) - len(answer)
    if room < 0:
        raise UsageError(f"--lengths {length}: a passkey prompt needs {length - room} tokens")
    sentence = encode(_FILLER)
    filler = (sentence * (room // len(sentence) + 1))[:room]
    cut = round(depth * room)
    ids = introduction + filler[:cut] + needle + filler[cut:] + question + answer
    return Prompt(torch.tensor(ids), len(answer), len(introduction) + cut)


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
    model: PreTrainedModel, prompt: Prompt, on_layer: Callable[[], None] = lambda: None
) -> bool:
    """Return whether greedy decoding after the question would give the answer.

    One pass over question and answer decides it: decoding follows the answer exactly as long as
    each of its tokens is the likeliest after those before it.

    on_layer: called after each decoder layer.
    """
    ids = prompt.ids.to(model.device)
    body = run_body(model, ids, on_layer)
    start = len(ids) - prompt.answer
    guesses = logits(model, body, start - 1, len(ids) - 1).argmax(-1)
    return torch.equal(guesses, ids[start:])
