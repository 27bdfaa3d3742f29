"""Ms-PoE on SmolLM2 past its length: python bench/smollm2_ms_poe.py {loss,recall,long} jargon.txt

`extend` has no Ms-PoE, which orders the heads of every layer by their attention in a request. Here
they are ordered as its authors do: by the share of the keys that the last token, by plain RoPE,
gives more than three times the average attention. Rows go to those of bench/model_runs.py, measured
alike.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import evaluations
import model_runs
import torch
from torch import Tensor, nn

from extrope_kernels import RopeFreqs, apply_rope, methods
from extrope_kernels.evaluation import cli, models, runner
from extrope_kernels.evaluation.memory import keep_freed_memory
from extrope_kernels.evaluation.options import Plan
from extrope_kernels.evaluation.tasks import TASKS
from extrope_kernels.integrations.transformers import extend
from extrope_kernels.integrations.transformers.rotation import Rotation

# The paper's; and with which no head sees a distance past the training length.
PAPER = {"min_ratio": 1.2, "max_ratio": 1.8}
RATIOS = {16384: {"min_ratio": 2.0, "max_ratio": 3.0}, 32768: {"min_ratio": 4.0, "max_ratio": 6.0}}


def awareness(q: Tensor, k: Tensor, freqs: RopeFreqs, positions: Tensor) -> Tensor:
    """How aware of positions each head of k is: (heads_k,). q, k: (1, seqlen, heads, head_dim)"""
    last = apply_rope(q[:, -1:], freqs, positions=positions[:, -1:]).float()
    keys = apply_rope(k, freqs, positions=positions).float()
    last = last.unflatten(2, (k.shape[2], -1))
    logits = torch.einsum("bihgd,bjhd->hgj", last, keys) * q.shape[-1] ** -0.5
    weights = logits.softmax(-1)
    return (weights > 3 / weights.shape[-1]).double().mean((1, 2))


class ByHead(Rotation):
    """Rotates the heads of a layer by ratios of their own; one sequence, all of it at once."""

    def __init__(self, plain: Rotation, ratios: dict[str, float]) -> None:
        super().__init__(plain.freqs, plain.positions, plain.interleaved)
        self.ratios = ratios

    def rotate(self, q: Tensor, k: Tensor, unsqueeze_dim: int) -> tuple[Tensor, Tensor]:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        order = awareness(q, k, self.freqs, self.positions).argsort(descending=True).tolist()
        group = q.shape[2] // k.shape[2]
        q, k = (
            apply_rope(
                x,
                methods.ms_poe(self.freqs, heads=heads, group=each, order=order, **self.ratios),
                positions=self.positions,
            )
            for x, heads, each in ((q, q.shape[2], group), (k, k.shape[2], 1))
        )
        return q.transpose(1, 2), k.transpose(1, 2)


@contextmanager
def by_head(model: nn.Module, _: str, **ratios: float) -> Iterator[None]:
    """In the place of `extend`."""
    with extend(model, "rope"):
        rotary = model.base_model.rotary_emb
        plain = rotary.forward

        def forward(x: Tensor, position_ids: Tensor) -> tuple[ByHead, None]:
            return ByHead(plain(x, position_ids)[0], ratios), None

        rotary.forward = forward
        try:
            yield
        finally:
            rotary.forward = plain


class Given(Plan):
    """Parameters as they are given, with none of `eval`'s."""

    def method_params(self, method: str, length: int, training_length: int) -> dict[str, Any]:
        return self.params[method]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", choices=("loss", "recall", "long"))
    parser.add_argument("text", help="of the Jargon File")
    asked = parser.parse_args()
    evaluation = argparse.ArgumentParser()
    cli.add_arguments(evaluation)
    run = model_runs.RUNS[asked.run]
    args = evaluation.parse_args(model_runs.arguments(run, ["pydocs", asked.text], {}))
    models.quiet()
    keep_freed_memory()
    files, lengths = models.find_model(args.model), [int(run.lengths)]
    task = TASKS[args.task](args, lengths, models.load_tokenizer(files))
    model = models.load_model(files, args.dtype, "cpu")
    runner.extend = by_head
    for ratios in (PAPER, RATIOS[lengths[0]]):
        plan = Given(["ms_poe"], lengths, {"ms_poe": ratios})
        runner.run_rows(task, model, plan, args, Path(args.out))
    evaluations.keep(Path(args.out) / f"{run.task}.json", run.name, run.task)


if __name__ == "__main__":
    sys.exit(main())
