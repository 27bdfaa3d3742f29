"""Packed rows under score methods: each sequence as if it came alone, forward and backward."""

from __future__ import annotations

import pytest
import torch
from support import tiny_models
from support.hf_models import SCORE_PARAMETERS, build, error, logits, tokens, transformers

from extrope_kernels.integrations.transformers import extend

LENGTHS = (1, 7, 13, 31)
SEQUENCES = [tokens(1, length, seed=length) for length in LENGTHS]
ROW = torch.cat(SEQUENCES, 1)
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]
BOUNDARIES = torch.tensor([0, *LENGTHS]).cumsum(0).int()
FLASH = {name: BOUNDARIES for name in ("cu_seq_lens_q", "cu_seq_lens_k")}
FLASH |= {name: max(LENGTHS) for name in ("max_length_q", "max_length_k")}
SLIDING = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 9}
SLIDING |= {"use_sliding_window": True}
MODELS = [
    *(("llama", method, {}) for method in SCORE_PARAMETERS),
    ("gpt_neox", "string", {}),  # rotates some dims alone
    ("qwen3", "rerope", SLIDING),  # a layer that is not extended
]


def alone(model, ids=SEQUENCES):
    return torch.cat([model(each, use_cache=False).logits for each in ids], 1)


def trained(model, out):
    """What a loss of these logits does to the weights."""
    model.zero_grad()
    weights = torch.linspace(-1, 1, out.shape[-1], dtype=out.dtype)
    (out.log_softmax(-1) * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("family", "method", "settings"), MODELS)
def test_sequences_of_a_row_are_their_own_forwards(family, method, settings):
    are_their_own_forwards(build(family, **settings).double(), method)


def are_their_own_forwards(model, method, **tolerance):
    with extend(model, method, **SCORE_PARAMETERS[method]):
        want = alone(model)
        gradients = trained(model, want)
        for inputs in ({"position_ids": POSITIONS}, FLASH):
            got = model(ROW, **inputs).logits
            torch.testing.assert_close(got, want, **tolerance)
            for name, gradient in trained(model, got).items():
                torch.testing.assert_close(gradient, gradients[name], **tolerance)
        assert error(logits(model, ROW), want) > 0.01


@pytest.mark.parametrize("method", ["rerope", "dual_chunk"])
def test_layers_whose_masks_are_made_without_positions(method):
    """transformers' own masks of this model let packed sequences see one another."""
    sizes = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 9}
    model = tiny_models.build("GptOssForCausalLM", num_hidden_layers=2, **sizes).double()
    model.set_experts_implementation("eager")  # others have no float64
    are_their_own_forwards(model, method, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["rerope", "dual_chunk"])
def test_a_batch_of_packed_rows_with_padding(method):
    """On either side, said by a mask or by positions alone."""
    model, other = build("qwen3", **SLIDING).double(), tokens(1, 40, seed=5)
    lengths = (9, 23, 20)  # the last of the second row's are padding
    ids = torch.cat((ROW, torch.cat((other, torch.zeros_like(other[:, :12])), 1)))
    positions = torch.cat([torch.arange(length) for length in lengths])
    positions[40:] = 0
    positions, mask = torch.cat((POSITIONS, positions[None])), torch.ones_like(ids)
    mask[1, 40:] = 0
    with extend(model, method, **SCORE_PARAMETERS[method]):
        want = torch.cat((alone(model), alone(model, other.split((9, 23, 8), 1))), 1)[0]
        for given in (
            {"position_ids": positions},
            {"position_ids": positions, "attention_mask": mask},
        ):
            got = logits(model, ids, **given).flatten(0, 1)[: want.shape[0]]
            torch.testing.assert_close(got, want)
        given = {"position_ids": positions.roll(12, 1), "attention_mask": mask.roll(12, 1)}
        got = logits(model, ids[1:].roll(12, 1), **{name: x[1:] for name, x in given.items()})
        torch.testing.assert_close(got[0, 12:], want[-40:])


def test_boundaries_before_padding():
    model = build("llama").double()
    ids = torch.cat((ROW, torch.zeros_like(ROW[:, :5])), 1)
    with extend(model, "rerope", window=7):
        want = alone(model)
        of_padding = torch.cat((POSITIONS, torch.full((1, 5), 7)), 1)  # which count nothing
        for given in ({}, {"position_ids": of_padding}):
            got = logits(model, ids, **FLASH, **given)
            torch.testing.assert_close(got[:, :-5], want)


@pytest.mark.thorough
def test_the_same_in_a_graph():
    """Boundaries are a tensor of it, so nothing is looked at."""
    model = build("llama", num_hidden_layers=1)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with extend(model, "rerope", window=7):
        got = compiled(ROW, use_cache=False, position_ids=POSITIONS, **FLASH).logits
        torch.testing.assert_close(got, alone(model))


def test_frequency_methods_leave_packed_rows_to_transformers():
    model = build("llama").double()
    with extend(model, "yarn", factor=4.0):
        torch.testing.assert_close(logits(model, ROW, position_ids=POSITIONS), alone(model))


def test_gradients_of_layers_computed_anew():
    model = build("llama").double().train()
    with extend(model, "string", **SCORE_PARAMETERS["string"]):
        want = trained(model, alone(model))
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for name, got in trained(model, model(ROW, position_ids=POSITIONS).logits).items():
            torch.testing.assert_close(got, want[name])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            {"position_ids": POSITIONS + (POSITIONS > 8)},
            "position_ids must count 0, 1, 2, ... from",
        ),
        (
            {"position_ids": POSITIONS + 2},
            "position_ids must count 0, 1, 2, ... from the first token of each row or",
        ),
        (
            FLASH | {"position_ids": torch.arange(52)[None]},
            "first token of each sequence in cu_seq_lens_q",
        ),
        ({"cu_seq_lens_q": BOUNDARIES + 1}, r"cu_seq_lens_q must rise from 0 to the row's 52 tok"),
        ({"cu_seq_lens_q": BOUNDARIES.flip(0)}, "cu_seq_lens_q must rise from 0"),
        (
            {"cu_seq_lens_q": BOUNDARIES[None]},
            r"must be a tensor \(sequences \+ 1,\) for tokens in",
        ),
        (
            FLASH | {"cu_seq_lens_k": BOUNDARIES[1:]},
            "cu_seq_lens_k must be cu_seq_lens_q in packed",
        ),
        (
            {
                "position_ids": POSITIONS,
                "attention_mask": torch.ones(52, 52).tril().bool()[None, None],
            },
            "pack without a cache or a mask of pairs",
        ),
        (
            {"position_ids": POSITIONS, "past_key_values": transformers.DynamicCache()},
            "packed rows must come without a cache",
        ),
    ],
)
def test_refuses_what_makes_no_packed_rows(inputs, message):
    model = build("llama")
    with (
        extend(model, "rerope", window=7),
        pytest.raises(ValueError, match="^extend: .*" + message),
    ):
        model(ROW, **inputs)


def test_refuses_packed_rows_where_layers_have_states():
    """They would go from one sequence on into the next."""
    model = tiny_models.build("Lfm2ForCausalLM", layer_types=["conv", "full_attention"])
    with extend(model, "rerope", window=7):
        logits(model, ROW)
        with pytest.raises(
            ValueError, match="no convolutions or states for packed rows, got Lfm2Model"
        ):
            logits(model, ROW, position_ids=POSITIONS)


def losses_of_sequences(model, ids, labels):
    """The sum of the tokens' losses, each sequence in its own forward, and how many they are."""
    found = [
        torch.nn.functional.cross_entropy(
            model(each[None]).logits[0, :-1], label[1:], reduction="sum"
        )
        for each, label in zip(ids, labels)
    ]
    return torch.stack(found).sum(), sum((label[1:] != -100).sum() for label in labels)


class Trainer:
    """Mixed into a trainer: compares what it computes of packed rows with forwards of their own."""

    packed = 0

    def compute_loss(self, model, inputs, *args, **options):
        lengths = (inputs["cu_seq_lens_q"] if "cu_seq_lens_q" in inputs else starts(inputs)).diff()
        ids, labels = (inputs[name][0].split(lengths.tolist()) for name in ("input_ids", "labels"))
        with torch.no_grad():
            total, count = losses_of_sequences(model, ids, labels)
        loss = super().compute_loss(model, inputs, *args, **options)
        got = loss[0] if isinstance(loss, tuple) else loss
        torch.testing.assert_close(got.detach(), total / count)
        self.packed = max(self.packed, len(lengths))
        return loss


def starts(inputs):
    begins = (inputs["position_ids"][0] == 0).nonzero()[:, 0]
    return torch.cat((begins, torch.tensor([inputs["position_ids"].shape[1]])))


def arguments(folder):
    return {
        **{"output_dir": str(folder), "max_steps": 3, "use_cpu": True, "report_to": []},
        **{"per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_strategy": "no"},
        **{"logging_strategy": "no", "disable_tqdm": True, "seed": 0},
    }


ROWS = [{"input_ids": tokens(1, n, seed=n)[0].tolist()} for n in (9, 31, 5, 17, 44, 13, 2, 23)]


@pytest.mark.thorough
@pytest.mark.parametrize(
    "settings", [{"packing": True, "max_length": 48}, {"padding_free": True, "max_length": None}]
)
def test_trl_packs(settings, tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "<eos>": 1}, "<pad>"))
    special = {"pad_token": "<pad>", "eos_token": "<eos>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)
    cls = type("Checked", (Trainer, trl.SFTTrainer), {})
    config = trl.SFTConfig(**arguments(tmp_path), bf16=False, **settings)
    model = build("llama")
    with extend(model, "rerope", window=7):
        data = datasets.Dataset.from_list(ROWS)
        trainer = cls(model, config, train_dataset=data, processing_class=tokenizer)
        trainer.train()
    assert trainer.packed >= 2


@pytest.mark.thorough
@pytest.mark.parametrize("flash", [False, True])
def test_transformers_flattens(flash, tmp_path):
    pytest.importorskip("accelerate")
    cls = type("Checked", (Trainer, transformers.Trainer), {})
    collator = transformers.DataCollatorWithFlattening(
        return_flash_attn_kwargs=flash, return_position_ids=not flash
    )
    model = build("llama")
    with extend(model, "dual_chunk", **SCORE_PARAMETERS["dual_chunk"]):
        config = transformers.TrainingArguments(**arguments(tmp_path))
        trainer = cls(model, config, train_dataset=ROWS, data_collator=collator)
        trainer.train()
    assert trainer.packed == 2
