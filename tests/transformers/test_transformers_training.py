"""Extended models in training: gradients, checkpoints, `torch.compile`, and losses of a `Trainer`.

Compared with the eager formula, which is transformers' own for a frequency method and dense
attention by definition for a score method, in float32 and, for what is exact, in float64.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from support import attention_oracle as oracle
from support.hf_models import (
    ATTENDING,
    FAMILIES,
    LAYERS,
    SCORE_PARAMETERS,
    TRAINED,
    CountOps,
    build,
    error,
    exact,
    freqs_of,
    gradients,
    logits,
    pairs,
    tokens,
    transformers,
)
from test_transformers_scores import dense, rms
from torch import nn

from extrope_kernels.integrations.transformers import extend

IDS = tokens(4, 44, seed=3)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED}
METHODS = {"yarn": {"factor": 4.0}, "rerope": SCORE_PARAMETERS["rerope"]}
LEAKY = {"window": 7, "factor": 3.5}
STEPS = 4


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_agree_with_transformers(family):
    theirs, model = build(family, {"rope_type": "linear", "factor": 4.0}), build(family)
    expected = gradients(theirs, IDS, use_cache=False)
    want = gradients(exact(model, freqs_of(theirs)), IDS, use_cache=False)
    with extend(model, "pi", factor=4.0):
        got = gradients(model, IDS, use_cache=False)
    assert got.keys() == want.keys()
    largest = max(error(expected[name], want[name]) for name in want)
    for name in want:
        ulp = torch.finfo(torch.float32).eps * want[name].abs().max().item()
        assert error(got[name], want[name]) <= 2 * largest + ulp, name


@pytest.mark.parametrize(
    ("family", "method"), pairs(["llama", "gemma2", "phi", "gpt_neox"], SCORE_PARAMETERS)
)
def test_gradients_are_those_of_dense_attention(family, method):
    model, log_n, ids = build(family, **ATTENDING[family]), {"log_n": 16}, IDS[:2]
    with dense(copy.deepcopy(model).double(), method, oracle.closed_form, **log_n) as patched:
        want = gradients(patched, ids)
    with dense(copy.deepcopy(model), method, oracle.plain_formula, **log_n) as patched:
        expected = gradients(patched, ids)
    with extend(model.train(), method, **SCORE_PARAMETERS[method], **log_n):
        assert_as_exact(gradients(model, ids), expected, want)


def assert_as_exact(got, expected, want):
    assert got.keys() == want.keys()
    for name, exact_one in want.items():
        ulp = torch.finfo(torch.float32).eps * exact_one.abs().max().item()
        assert rms(got[name] - exact_one) <= 2 * rms(expected[name] - exact_one) + ulp, name


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize(
    ("family", "method", "parameters"),
    [
        ("llama", "dynamic_ntk", {"factor": 4.0}),
        ("qwen3", "yarn", {"factor": 4.0}),
        ("qwen3", "rerope", {"window": 6}),
        ("gemma2", "leaky_rerope", LEAKY),
    ],
)
def test_gradient_checkpointing(family, method, parameters, use_reentrant):
    """Two forwards before the backward: layers are recomputed by their own forward's positions."""
    model, short = build(family, **ATTENDING[family]).train(), IDS[:2, :30]
    mask = torch.ones_like(short)
    mask[1, :11] = 0

    def both():
        model.zero_grad()
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        if method == "leaky_rerope":
            loss = loss + model(input_ids=short, attention_mask=mask, labels=short).loss
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    with extend(model, method, **parameters):
        want = both()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        with CountOps() as count:
            got = both()
    if family == "llama":
        assert count.rotations == 2 * LAYERS  # forward and recomputed
    for name in want:
        assert torch.equal(got[name], want[name]), name


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 24,
    "short_factor": [1.0] * 8,
    "long_factor": [3.0] * 8,
}


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("rope", [LONGROPE, None], ids=["longrope", "dynamic_ntk"])
def test_checkpointing_under_a_score_method_needs_a_length(rope, use_reentrant):
    """A layer that is computed anew would have the frequencies of the last forward, not its own."""
    model = build("llama", rope).train() if rope else build("llama").train()
    method, parameters = ("longrope", {}) if rope else ("dynamic_ntk", {"factor": 4.0})

    def gradients(checkpointing):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        model.gradient_checkpointing_disable()
        return [each.grad.clone() for each in model.parameters()]

    with extend(model, method, **parameters), extend(model, "rerope", window=8):
        with pytest.raises(ValueError, match="extend with a seq_len first"):
            gradients(True)
        model.gradient_checkpointing_disable()
    longest = {"seq_len": IDS.shape[1]}
    with extend(model, method, **parameters, **longest), extend(model, "rerope", window=8):
        assert all(map(torch.equal, gradients(True), gradients(False)))


@pytest.mark.parametrize(
    ("family", "method", "parameters", "compiler"),
    [
        *(
            pytest.param(family, "yarn", {"factor": 4.0}, "aot_eager", marks=pytest.mark.thorough)
            for family in ("llama", "gpt_neox")
        ),
        *(
            pytest.param("llama", "leaky_rerope", LEAKY, compiler, marks=marks)
            for compiler, marks in (("eager", ()), ("aot_eager", pytest.mark.thorough))
        ),
    ],
)
def test_compiles_without_a_graph_break(family, method, parameters, compiler):
    torch._dynamo.reset()  # other tests' models count as recompilations of what wraps a forward
    model, ids = build(family, num_hidden_layers=1), IDS[:2]
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    plain = compiled(ids, use_cache=False).logits.detach()
    with extend(model, method, **parameters):
        want = gradients(model, ids, use_cache=False)
        model.zero_grad()
        out = compiled(input_ids=ids, labels=ids, use_cache=False)
        out.loss.backward()
        torch.testing.assert_close(out.logits.detach(), logits(model, ids))
        for name, p in model.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(p.grad, want[name])
        assert error(out.logits, plain) > 0.01
    torch.testing.assert_close(compiled(ids, use_cache=False).logits.detach(), plain)


@pytest.mark.thorough
def test_compiles_a_method_that_depends_on_the_length():
    model = build("llama", num_hidden_layers=1)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad(), extend(model, "dynamic_ntk", factor=4.0):
        for ids in (IDS, IDS[:, :8]):
            torch.testing.assert_close(compiled(ids, use_cache=False).logits, logits(model, ids))


@pytest.mark.parametrize(
    ("method", "parameters"),
    [("yarn", {"factor": 4.0}), ("dynamic_ntk", {"factor": 4.0}), ("rerope", {"window": 6})],
)
def test_inference_mode_first_and_training_after(method, parameters):
    model = build("llama")
    twin = copy.deepcopy(model)
    with torch.inference_mode():
        handle = extend(model, method, **parameters)
        model(IDS)
    got = gradients(model, IDS, use_cache=False)
    handle.restore()
    with extend(twin, method, **parameters):
        want = gradients(twin, IDS, use_cache=False)
    for name in want:
        assert torch.equal(got[name], want[name]), name


def with_lora(model: nn.Module) -> nn.Module:
    """The model with adapters that change it from the start."""
    peft = pytest.importorskip("peft")
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


@pytest.mark.parametrize("first", ["extend", "peft"])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_adapters(method, first):
    ids, options, found = IDS[:2], {"use_cache": False}, []
    for dtype in (torch.float64, torch.float32):
        with eager(method, dtype) as model:
            found.append(gradients(with_lora(model).train(), ids, **options))
    want, expected = found
    model = build("llama")
    adapted = with_lora(model) if first == "peft" else None
    with extend(model, method, **METHODS[method]):
        got = gradients((adapted or with_lora(model)).train(), ids, **options)
    assert all("lora" in name for name in got)
    assert_as_exact(got, expected, want)


class Recorder(transformers.Trainer):
    """A trainer that keeps the loss of every step unrounded."""

    def compute_loss(self, *args, **options):
        result = super().compute_loss(*args, **options)
        loss = result[0] if isinstance(result, tuple) else result
        self.losses = [*getattr(self, "losses", []), loss.item()]
        return result


def losses_of_steps(model: nn.Module, folder, checkpointing: bool) -> list[float]:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
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


@pytest.mark.parametrize(("method", "lora"), [("yarn", True), ("rerope", False)])
def test_losses_of_a_trainer(method, lora, tmp_path):
    """Adapters with layers that are computed anew, or all weights."""
    pytest.importorskip("accelerate")

    def train(model, checkpointing=False):
        model = with_lora(model) if lora else model
        return torch.tensor(losses_of_steps(model, tmp_path, checkpointing)).double()

    with eager(method, torch.float64) as model:
        want = train(model)
    with eager(method, torch.float32) as model:
        expected = train(model)
    model = build("llama")
    with extend(model, method, **METHODS[method]):
        got = train(model, checkpointing=lora)
    ulp = torch.finfo(torch.float32).eps * want.abs().max()
    assert len(want) == STEPS and want[-1] < want[0]
    # All three come as float32: losses that look equal may be an ulp apart.
    assert (got - want).abs().max() <= 2 * ((expected - want).abs().max() + ulp) + ulp


class Trainer:
    """As TRL's: it loads its reference model from the folder of the model."""

    def __init__(self, model, folder):
        self.model = model
        self.ref_model = transformers.AutoModelForCausalLM.from_pretrained(folder)

    def difference(self):
        return error(self.model(IDS).logits.detach(), self.ref_model(IDS).logits.detach())


@pytest.mark.parametrize("method", METHODS)
def test_a_reference_model_that_is_plain_gets_a_warning(method, tmp_path):
    model = build("llama").train()
    model.save_pretrained(tmp_path)
    with extend(model, method, **METHODS[method]) as handle:
        trainer = Trainer(model, tmp_path)
        with torch.no_grad():
            trainer.difference()  # before the training
        message = "ref_model of Trainer is the plain model, this one is extended: call handle.ext"
        with pytest.warns(UserWarning, match=message):
            assert trainer.difference() > 0.1
    with extend(model, "yarn", factor=4.0), extend(model, method, **METHODS[method]) as handle:
        trainer = Trainer(model, tmp_path)
        other = handle.extend(trainer.ref_model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert trainer.difference() == 0
        assert repr(other) == repr(handle)
        other.restore()
        assert trainer.difference() > 0.1


def test_layers_computed_anew_take_no_frequencies_of_a_request():
    """A thread of the backward would have those of another one."""
    model, ids = build("llama").train(), IDS[:2]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with extend(model, "dynamic_ntk", factor=2.0), extend(model, "rerope", window=16):
        with pytest.raises(ValueError, match="gradient checkpointing under rerope must have freq"):
            model(ids, use_cache=False)
        logits(model.eval(), ids)
        model.train()
    with extend(model, "dynamic_ntk", factor=2.0, seq_len=44), extend(model, "rerope", window=16):
        got = gradients(model, ids, use_cache=False)
        model.gradient_checkpointing_disable()
        want = gradients(model, ids, use_cache=False)
    for name, each in want.items():
        torch.testing.assert_close(got[name], each)
