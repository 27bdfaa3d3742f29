"""Training on sequences that ranks share: transformers' Trainer, and the example."""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import socket
import sys
from pathlib import Path

import pytest
import torch
from support.ranks import SECONDS

pytest.importorskip("transformers", minversion="5")

STEPS, SEQLEN, VOCABULARY = 10, 64, 101
METHODS = {"yarn": {"factor": 2.0}, "rerope": {"window": 16}}


def answers(context, function, size, *arguments):
    """What `function(*arguments)` returns on each of `size` ranks, alike in their environment."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    pipes, processes = [], []
    for rank in range(size):
        here, there = context.Pipe()
        given = (there, function, (rank, size, port), arguments)
        processes.append(context.Process(target=_answer, args=given, daemon=True))
        processes[-1].start()
        there.close()
        pipes.append(here)
    try:
        assert all(pipe.poll(SECONDS) for pipe in pipes), "a rank did not end in time"
        return [pipe.recv() for pipe in pipes]
    finally:
        for process in processes:
            process.kill()


def _answer(pipe, function, place, arguments):
    torch.set_num_threads(1)
    rank, size, port = place
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({"MASTER_ADDR": "localhost", **{k: str(v) for k, v in where.items()}})
    pipe.send(function(*arguments))


def on_cpus_as_on_gpus(size):
    """accelerate has context parallelism on GPUs alone: let it take these processes for such."""
    from accelerate import state
    from accelerate.utils import DistributedType

    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
    chosen = ("gloo", DistributedType.MULTI_GPU)
    state.PartialState._prepare_backend = lambda *args, **kwargs: chosen
    state.PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


def trained(size, folder):
    """By method what `ten_steps` returns."""
    if size > 1:
        on_cpus_as_on_gpus(size)
    return {method: ten_steps(size, method, folder) for method in METHODS}


def ten_steps(size, method, folder):
    """Losses and norms of gradients, and the weights thereafter."""
    from accelerate.parallelism_config import ParallelismConfig
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    from extrope_kernels.integrations.transformers import extend

    shared = {}
    if size > 1:
        shared = {"parallelism_config": ParallelismConfig(cp_size=size), "fsdp": True}
        shared["fsdp_config"] = {"version": 2}
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=SEQLEN // 2,
    )
    ids = torch.randint(0, VOCABULARY, (2 * STEPS, SEQLEN))
    trainer = Trainer(
        model=LlamaForCausalLM(config),
        train_dataset=[{"input_ids": x, "labels": x} for x in ids],
        args=TrainingArguments(
            output_dir=folder,
            max_steps=STEPS,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            **shared,
        ),
    )
    mesh = trainer.accelerator.torch_device_mesh["cp"] if size > 1 else None
    with extend(trainer.model, method, mesh=mesh, **METHODS[method]):
        trainer.train()
    steps = [row for row in trainer.state.log_history if "loss" in row]
    whole = StateDictOptions(full_state_dict=True)
    weights = get_model_state_dict(trainer.model, options=whole)
    return (
        [row["loss"] for row in steps],
        [float(row["grad_norm"]) for row in steps],
        {name.removeprefix("module."): x.tolist() for name, x in weights.items()},
    )


@pytest.mark.thorough
def test_ten_steps_are_those_of_one_process(ranks, tmp_path):
    pytest.importorskip("accelerate")
    (one,) = answers(ranks.context(), trained, 1, 1, str(tmp_path))
    for found in answers(ranks.context(), trained, 2, 2, str(tmp_path)):
        for method, (losses, norms, weights) in one.items():
            assert len(losses) == STEPS
            assert found[method][0] == pytest.approx(losses, rel=1e-6)
            assert found[method][1] == pytest.approx(norms, rel=1e-5)
            # Adam divides by a gradient's size: weights whose gradient is rounding go astray.
            for name, want in weights.items():
                got, want = torch.tensor(found[method][2][name]), torch.tensor(want)
                assert (got - want).abs().median() <= 1e-6 * want.abs().max(), name


SCRIPT = Path(__file__).parents[2] / "examples" / "train_context_parallel.py"


def printed(*arguments):
    sys.argv = [str(SCRIPT), *arguments]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return out.getvalue()


def losses(ranks, size, *arguments):
    """Of every step of a run, as rank 0 prints them."""
    given = ("--seqlen", "64", "--batch", "2", *arguments)
    first, *_ = answers(ranks.context(), printed, size, *given)
    found = re.findall(r"step (\d+): loss (\d+\.\d+)", first)
    return {int(step): float(loss) for step, loss in found}


@pytest.mark.thorough
def test_goes_on_with_another_number_of_ranks(ranks, tmp_path):
    given = ("--method", "rerope", "--window", "16")
    expected = losses(ranks, 1, "--steps", "8", *given)
    assert list(expected) == list(range(8)) and expected[7] < expected[0] - 0.5
    given += ("--checkpoint", str(tmp_path / "run"))
    found = losses(ranks, 2, "--steps", "4", *given)
    found |= losses(ranks, 4, "--cp", "2", "--steps", "8", "--strategy", "ring", *given)
    assert found == pytest.approx(expected, abs=1e-4)  # six decimals, of float32
