"""Extended models under `peft` and `Trainer`: LoRA's gradients, and the losses of ten steps.

Compared with the eager formula, which is transformers' own for a frequency method and dense
attention by definition for a score method, in float32 and, for what is exact, in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import attention_oracle as oracle
import pytest
import torch
from hf_models import (
    SCORE_PARAMETERS,
    TRAINED,
    build,
    exact,
    freqs_of,
    one_thread,  # noqa: F401
    tokens,
    transformers,
)
from test_transformers_scores import dense, rms
from torch import nn

from extrope_kernels.integrations.transformers import extend

peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")  # which Trainer needs
SEQLEN = 44
IDS = tokens(4, SEQLEN, seed=3)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED}
METHODS = {"yarn": {"factor": 4.0}, "rerope": SCORE_PARAMETERS["rerope"]}


def with_lora(model: nn.Module) -> nn.Module:
    """The model with adapters that change it from the start."""
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "k_proj", "v_proj", "down_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(model, config)


@contextmanager
def eager(method: str, dtype: torch.dtype) -> Iterator[nn.Module]:
    """A model that computes the method by the eager formula."""
    if method == "yarn":
        model = build("llama", YARN)
        yield exact(model, freqs_of(model)) if dtype == torch.float64 else model
    else:
        formula = oracle.closed_form if dtype == torch.float64 else oracle.plain_formula
        with dense(build("llama").to(dtype), method, formula) as model:
            yield model


def adapter_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.train().zero_grad()
    model(input_ids=IDS[:2], labels=IDS[:2], use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("first", ["extend", "peft"])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_adapters(method, first):
    with eager(method, torch.float64) as model:
        want = adapter_gradients(with_lora(model))
    with eager(method, torch.float32) as model:
        expected = adapter_gradients(with_lora(model))
    model = build("llama")
    if first == "peft":
        adapted = with_lora(model)
    with extend(model, method, **METHODS[method]):
        adapted = with_lora(model) if first == "extend" else adapted
        got = adapter_gradients(adapted)
    assert got.keys() == want.keys() and all("lora" in name for name in got)
    for name, exact_one in want.items():
        ulp = torch.finfo(torch.float32).eps * exact_one.abs().max().item()
        assert rms(got[name] - exact_one) <= 2 * rms(expected[name] - exact_one) + ulp, name


@pytest.mark.parametrize("method", METHODS)
def test_merged_adapters_are_those_of_the_extended_model(method):
    model = build("llama").double()
    with extend(model, method, **METHODS[method]), torch.no_grad():
        adapted = with_lora(model)
        expected = adapted(input_ids=IDS, use_cache=False).logits
        merged = adapted.merge_and_unload()
        got = merged(input_ids=IDS, use_cache=False).logits
        torch.testing.assert_close(got, expected)


class Recorder(transformers.Trainer):
    """A trainer that keeps the loss of every step unrounded."""

    def compute_loss(self, *args, **options):
        result = super().compute_loss(*args, **options)
        loss = result[0] if isinstance(result, tuple) else result
        self.losses = [*getattr(self, "losses", []), loss.item()]
        return result


def losses_of_ten_steps(model: nn.Module, folder, checkpointing: bool) -> list[float]:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=10,
        per_device_train_batch_size=len(IDS),
        learning_rate=1e-3,
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        use_cpu=True,
        seed=0,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Recorder(model, arguments, train_dataset=[{"input_ids": x, "labels": x} for x in IDS])
    trainer.train()
    return trainer.losses


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_losses_of_a_trainer(method, checkpointing, lora, tmp_path):
    def train(model, checkpointing=False):
        model = with_lora(model) if lora else model
        return torch.tensor(losses_of_ten_steps(model, tmp_path, checkpointing)).double()

    with eager(method, torch.float64) as model:
        want = train(model)
    with eager(method, torch.float32) as model:
        expected = train(model)
    model = build("llama")
    with extend(model, method, **METHODS[method]):
        got = train(model, checkpointing)
    ulp = torch.finfo(torch.float32).eps * want.abs().max()
    assert len(want) == 10 and want[-1] < want[0]
    assert (got - want).abs().max() <= 2 * (expected - want).abs().max() + ulp
