"""TRL's GRPO with rollouts in vLLM: actor, reference and engine read a folder alike."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

pytest.importorskip("vllm.version")  # this folder is a "vllm", too
pytest.importorskip("trl")
pytest.importorskip("peft")

import peft
import trl
from datasets import Dataset
from support.vllm_engines import LENGTH, PROMPTS, build, save_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.generation import vllm_generation

from extrope_kernels.integrations.transformers import extend, extend_from_saved

LONG = PROMPTS[0]  # past the trained length
STEPS = {"max_steps": 1, "per_device_train_batch_size": 2, "num_generations": 2}
QUIET = {"report_to": [], "save_strategy": "no", "disable_tqdm": True}
ROLLOUTS = {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": LENGTH}
LORA = {"task_type": "CAUSAL_LM", "target_modules": "all-linear", "init_lora_weights": False}


def reload(self):
    """A CPU's engine keeps weights in its own form, into which TRL's way does not write."""
    weights = {"weights_iterator": self._iter_named_params()}
    self.llm.collective_rpc("reload_weights", kwargs=weights)
    self.llm.reset_prefix_cache()


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Returns a trainer over a folder that was saved under ReRoPE, before its first step.

    Its engine has the options given, beside those that TRL gives.
    """
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # to be as before: TRL sets them
        monkeypatch.delenv(name)
    monkeypatch.setattr(vllm_generation.VLLMGeneration, "sync_weights", reload)
    folder, made = tmp_path / "saved", []
    extend(build("Llama", tmp_path / "plain"), "rerope", window=64).save_pretrained(folder)
    save_tokenizer(folder)

    def trainer(lora=None, **options):
        LLM = functools.partial(vllm_generation.LLM, dtype="float32", enforce_eager=True, **options)
        monkeypatch.setattr(vllm_generation, "LLM", LLM)
        actor = AutoModelForCausalLM.from_pretrained(folder)
        handle = extend_from_saved(actor, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, pad_token="w0", eos_token="w1")
        kl = {"beta": 0.1, "learning_rate": 1e-2, "max_completion_length": 16}
        made.append(
            trl.GRPOTrainer(
                actor,
                lambda completions, **_: [float(len(set(each.split()))) for each in completions],
                trl.GRPOConfig(
                    str(tmp_path), bf16=False, use_cpu=True, **kl, **STEPS, **QUIET, **ROLLOUTS
                ),
                Dataset.from_dict({"prompt": [tokenizer.decode(LONG)] * 4}),
                processing_class=tokenizer,
                peft_config=lora and peft.LoraConfig(**lora),
            )
        )
        return made[-1], handle

    yield trainer
    for each in made:
        each.vllm_generation.llm.llm_engine.engine_core.shutdown()


@torch.no_grad()
def logprobs(model, completion):
    ids = torch.tensor([LONG + completion])
    logits = model(ids).logits[0, len(LONG) - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, ids[0, len(LONG) :, None])[:, 0]


def rollout(trainer):
    """A completion of the trainer's engine, and the engine's log-probabilities of it."""
    _, (completion,), (found,), _ = trainer.vllm_generation.generate([LONG], None, 1)
    return list(completion), torch.tensor(found)[:, 0]


def difference(trainer):
    completion, found = rollout(trainer)
    return (found - logprobs(trainer.model.eval(), completion)).abs().max()


@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "lora"])
def test_an_engine_gives_the_log_probabilities_of_its_trainer(train, lora):
    trainer, handle = train(lora)
    trainer.vllm_generation.sync_weights()  # adapters are not in the folder
    assert difference(trainer) < 1e-5
    if lora is None:  # else it is the actor without its adapters
        completion, _ = rollout(trainer)
        actor = logprobs(trainer.model, completion)
        assert (logprobs(trainer.ref_model, completion) - actor).abs().max() > 0.1
        handle.extend(trainer.ref_model)
        torch.testing.assert_close(logprobs(trainer.ref_model, completion), actor, rtol=0, atol=0)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-6) or lora
    assert any((before[name] != value).any() for name, value in trainer.model.state_dict().items())
    assert difference(trainer) > 1e-3  # the engine has the weights of before
    trainer.vllm_generation.sync_weights()
    assert difference(trainer) < 1e-5


def test_an_engine_without_the_method_reads_otherwise(train):
    longer = {"max_position_embeddings": LENGTH}
    trainer, _ = train(additional_config={"extrope": None}, hf_overrides=longer)
    assert difference(trainer) > 0.1
