"""The two tasks: what each measures at one length, and how its rows look."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from extrope_kernels.evaluation import loss, passkey, plots, texts
from extrope_kernels.evaluation.report import range_label

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Task(Protocol):
    """A measurement that yields one row for a model as it is at one length."""

    name: str

    def settings(self) -> dict[str, Any]:
        """Return what the numbers depend on besides model and method."""

    def heads(self) -> list[str]:
        """Return the heads of the table's columns."""

    def ticks(self, layers: int) -> int:
        """Return how often `measure` reports progress with a model of so many layers."""

    def measure(
        self, model: PreTrainedModel, length: int, on_progress: Callable[[], None]
    ) -> dict[str, Any]:
        """Return the numbers of a row."""

    def cells(self, row: dict[str, Any]) -> list[str]:
        """Return the row's cells, one for each head that the row reaches."""

    def plot(self, results: dict[str, Any], path: Path) -> None:
        """Draw all rows as PNG."""


class LossTask:
    """The mean next-token loss of the text's first `length` tokens, by bucket of positions."""

    name = "loss"

    def __init__(
        self,
        args: argparse.Namespace,
        lengths: Sequence[int],
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        text = texts.load_text(args.text)
        self._text_name = Path(args.text).name
        self._bucket = args.bucket
        self._ids = texts.first_tokens(tokenizer, text, max(lengths), args.text)

    def settings(self) -> dict[str, Any]:
        return {
            "bucket": self._bucket,
            "text": {"name": self._text_name, "tokens": len(self._ids)},
        }

    def heads(self) -> list[str]:
        edges = loss.bucket_edges(len(self._ids), self._bucket)
        return [range_label(start, stop) for start, stop in edges]

    def ticks(self, layers: int) -> int:
        return layers + 1

    def measure(
        self, model: PreTrainedModel, length: int, on_progress: Callable[[], None]
    ) -> dict[str, Any]:
        ids = self._ids[:length].to(model.device)
        losses = loss.token_losses(model, ids, on_progress)
        return {
            "tokens": length,
            "loss": losses.double().mean().item(),
            "buckets": loss.bucket_means(losses, self._bucket),
        }

    def cells(self, row: dict[str, Any]) -> list[str]:
        return [f"{bucket['loss']:.3f}" for bucket in row["buckets"]]

    def plot(self, results: dict[str, Any], path: Path) -> None:
        plots.plot_loss(results, path)


class PasskeyTask:
    """How many of a few keys the model recalls, by how deep in the text they are hidden."""

    name = "passkey"

    def __init__(
        self,
        args: argparse.Namespace,
        lengths: Sequence[int],
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self._tokenizer = tokenizer
        self._depths = passkey.depths(args.depths)
        self._trials = args.trials
        for length in lengths:
            passkey.make_prompt(tokenizer, passkey.key(0), length, 0.0)

    def settings(self) -> dict[str, Any]:
        return {"depths": self._depths, "trials": self._trials}

    def heads(self) -> list[str]:
        return [f"{depth:.0%}" for depth in self._depths]

    def ticks(self, layers: int) -> int:
        return layers * len(self._depths) * self._trials

    def measure(
        self, model: PreTrainedModel, length: int, on_progress: Callable[[], None]
    ) -> dict[str, Any]:
        recalled = [0] * len(self._depths)
        for index, depth in enumerate(self._depths):
            for trial in range(self._trials):
                key = passkey.key(index * self._trials + trial)
                prompt = passkey.make_prompt(self._tokenizer, key, length, depth)
                recalled[index] += passkey.recalls(model, prompt, on_progress)
        return {
            "tokens": length * len(self._depths) * self._trials,
            "recalled": recalled,
            "accuracy": [count / self._trials for count in recalled],
        }

    def cells(self, row: dict[str, Any]) -> list[str]:
        return [f"{accuracy:.0%}" for accuracy in row["accuracy"]]

    def plot(self, results: dict[str, Any], path: Path) -> None:
        plots.plot_passkey(results, path)


TASKS = {task.name: task for task in (LossTask, PasskeyTask)}
