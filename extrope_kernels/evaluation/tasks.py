"""The tasks: what each measures at one length, and how its rows look."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .loss import LossTask
from .passkey import PasskeyTask
from .recall import RecallTask

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Task(Protocol):
    """A measurement that yields one row for a model as it is at one length."""

    name: str

    def settings(self) -> dict[str, Any]:
        """Return what the numbers depend on besides model and method."""

    def heads(self) -> list[str]:
        """Return the heads of the table's columns."""

    def ticks(self, layers: int) -> int:
        """Return how much progress `measure` reports with a model of so many layers."""

    def measure(
        self, model: PreTrainedModel, length: int, on_progress: Callable[[int], None]
    ) -> dict[str, Any]:
        """Return the numbers of a row."""

    def cells(self, row: dict[str, Any]) -> list[str]:
        """Return the row's cells, one for each head that the row reaches."""

    def plot(self, results: dict[str, Any], path: Path) -> None:
        """Draw all rows as PNG."""


TASKS = {task.name: task for task in (LossTask, PasskeyTask, RecallTask)}
