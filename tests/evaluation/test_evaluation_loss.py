"""The loss of a text by position, end to end on a tiny random model."""

import io
import json
import math
import os
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_model import CONFIG, TRAINED, check_image, results, save_tokenizer
from torch.nn.functional import cross_entropy
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LongcatFlashConfig,
    LongcatFlashForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from extrope_kernels.evaluation import UsageError, evaluate, loss, plots, report, texts
from extrope_kernels.evaluation.digests import tokens_digest
from extrope_kernels.evaluation.models import after_each_layer, decoder_layers
from extrope_kernels.evaluation.options import method_params
from extrope_kernels.integrations.transformers import extend, extend_from_saved
from extrope_kernels.scores import SCORES


def expected_losses(folder, ids, bucket, **rope_parameters):
    """The mean loss of each bucket by transformers' own rotary embedding and its own loss."""
    model = LlamaForCausalLM.from_pretrained(folder)
    if rope_parameters:
        config = LlamaConfig(**CONFIG, rope_parameters={"rope_theta": 1e4, **rope_parameters})
        scaled = LlamaForCausalLM(config)
        scaled.load_state_dict(model.state_dict())
        model = scaled
    means = []
    for start in range(0, len(ids), bucket):
        labels = torch.full_like(ids, -100)
        labels[start + 1 : start + bucket + 1] = ids[start + 1 : start + bucket + 1]
        with torch.no_grad():
            means.append(model(ids[None], labels=labels[None]).loss.item())
    return means


def test_loss_agrees_with_transformers(run, folder, text, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loss, "_LOGITS_AT_ONCE", 7 * CONFIG["vocab_size"])
    # 70 leaves a partial bucket of 6 at the end.
    assert run(plot=True, methods="rope,pi,yarn", lengths="70,32", param="yarn.beta_fast=16") == 0
    found = results(tmp_path)
    ids = torch.tensor(tokenizer(text.read_text()).input_ids)
    yarn = {"rope_type": "yarn", "original_max_position_embeddings": TRAINED, "beta_fast": 16.0}
    rope_parameters = {
        ("rope", 32): {},
        ("rope", 70): {},
        ("pi", 32): {},
        ("pi", 70): {"rope_type": "linear", "factor": 70 / 32},
        ("yarn", 32): {},
        ("yarn", 70): yarn | {"factor": 70 / 32},
    }
    assert [(row["method"], row["length"]) for row in found["rows"]] == list(rope_parameters)
    for row in found["rows"]:
        parameters = rope_parameters[row["method"], row["length"]]
        wanted = expected_losses(folder, ids[: row["length"]], 16, **parameters)
        assert [b["loss"] for b in row["buckets"]] == pytest.approx(wanted, rel=1e-5)
        total = sum(b["loss"] * b["tokens"] for b in row["buckets"])
        assert row["loss"] == pytest.approx(total / (row["length"] - 1))
        assert row["pieces"] == [row["loss"]] and row["error"] is None
        assert row["tokens"] == row["length"] and row["seconds"] >= 0
    last = found["rows"][-1]
    assert last["params"] == {"factor": 70 / 32, "beta_fast": 16}
    assert [(b["start"], b["stop"], b["tokens"]) for b in last["buckets"][-2:]] == [
        (48, 64, 16),
        (64, 70, 5),
    ]
    assert found["rows"][1]["buckets"] != last["buckets"]
    assert found["training_length"] == TRAINED and found["bucket"] == 16
    digest = tokens_digest(ids)
    assert found["texts"] == [{"name": "story.txt", "tokens": 240, "digest": digest}]
    assert len(found["model_digest"]) == len(digest) == 12
    assert set(found["versions"]) == {"python", "torch", "transformers", "extrope_kernels"}
    check_image(tmp_path / "out" / "loss.png")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["method", "tokens", "0-16", "16-32", "32-48", "48-64", "64-70"]
    assert [line.split()[:2] for line in lines[1:]] == [
        [row["method"], str(row["length"])] for row in found["rows"]
    ]
    assert lines[-1].split()[2:] == [f"{b['loss']:.3f}" for b in last["buckets"]]


def test_evaluate_as_a_function(run, folder, text, tokenizer, tmp_path, monkeypatch):
    assert run(methods="rope,yarn", lengths="70", param="yarn.beta_fast=16") == 0
    wanted = results(tmp_path)["rows"]
    monkeypatch.delenv("HF_HUB_OFFLINE")  # which the command set
    evaluate(folder, "rope", 32, text=str(text), trials=1)
    assert "HF_HUB_OFFLINE" not in os.environ
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    given = {"text": str(text), "bucket": 16, "trials": 1}
    methods = {"rope": {}, "yarn": {"beta_fast": 16}}
    table = io.StringIO()
    found = evaluate(model, methods, 70, tokenizer=tokenizer, table=table, **given)
    assert [row["params"] for row in found["rows"]] == [row["params"] for row in wanted]
    for row, other in zip(found["rows"], wanted, strict=True):
        assert row["pieces"] == pytest.approx(other["pieces"], rel=1e-5)
    assert len(table.getvalue().splitlines()) == 3 and found["dtype"] == "float32"
    with pytest.raises(UsageError, match="dtype must be one of float32, bfloat16, got 'int8'"):
        evaluate(folder, "rope", 70, dtype="int8")
    with pytest.raises(UsageError, match=r"trials must be >= 1, got 1\.5"):
        evaluate(folder, "rope", 70, trials=1.5)
    head = "LlamaModel has no body apart from its head"
    with pytest.raises(UsageError, match=head):
        evaluate(model.model, "rope", 70, tokenizer=tokenizer)
    for mistake, message in (
        (([], 70), "methods must list at least one"),
        (("rope", [70, 1.5]), "lengths must be whole numbers of tokens >= 2, got 1.5"),
        (({"rope": {"beta_fast": 16}}, 70), "rope has no beta_fast; it has base"),
        (("rope", 70), "a loaded model needs its tokenizer"),
    ):
        with pytest.raises(UsageError, match=message):
            evaluate(model, *mistake, **given)


def test_a_model_in_training_is_measured_without_dropout(text, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "available", lambda: False)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG, attention_dropout=0.5)).eval()
    methods = {"rope": {}, "rerope": {"window": np.int64(8)}, "leaky_rerope": {"factor": math.inf}}
    given = {"tokenizer": tokenizer, "text": str(text), "bucket": 16, "trials": 1}
    wanted = [row["loss"] for row in evaluate(model, methods, 70, **given)["rows"]]
    model.model.train()
    wrapper = torch.nn.Sequential(model)  # as PEFT wraps one
    for _ in range(2):  # an infinite factor is read back, too
        found = evaluate(wrapper, methods, 70, out=tmp_path, **given)
        assert [row["loss"] for row in found["rows"]] == wanted
    assert model.model.training and not model.training


def test_a_folder_is_read_as_it_was_saved(run, folder, text, tokenizer, tmp_path, capsys):
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    leaky = {"window": 8, "factor": 4.0}
    plain = pytest.warns(UserWarning, match="is the plain model's")
    with extend(model, "pi", factor=2.0), extend(model, "leaky_rerope", **leaky), plain:
        model.save_pretrained(tmp_path / "longer")
    save_tokenizer(tmp_path / "longer")
    longer = LlamaForCausalLM.from_pretrained(tmp_path / "longer")
    ids = torch.tensor(tokenizer(text.read_text()).input_ids)[None, :70]
    with extend_from_saved(longer, tmp_path / "longer"), torch.no_grad():
        wanted = longer(ids, labels=ids).loss.item()
    by = "leaky_rerope window=8 factor=4.0 over pi factor=2.0"
    said = f"was saved as extended by {by}: read"
    for methods in ({}, {"methods": "saved"}):  # the second reads what the first has written
        given = {"model": tmp_path / "longer", "lengths": "70", "methods": None} | methods
        assert run(**given) == 0
        assert f"{said} as it was saved" in capsys.readouterr().err
        (row,) = results(tmp_path)["rows"]
        assert row["method"] == "saved" and row["loss"] == pytest.approx(wanted, rel=1e-5)
    assert run(model=tmp_path / "longer", lengths="70", methods="yarn") == 0
    assert f"{said} by the methods named alone" in capsys.readouterr().err
    with extend(model, "yarn", factor=70 / TRAINED), torch.no_grad():
        wanted = model(ids, labels=ids).loss.item()
    assert results(tmp_path)["rows"][1]["loss"] == pytest.approx(wanted, rel=1e-5)


def test_a_folder_that_was_not_saved_as_extended_needs_a_method(run, folder, capsys, tmp_path):
    assert run(methods="saved") == 2
    assert "saved needs a model's folder that was saved as extended" in capsys.readouterr().err
    with pytest.raises(UsageError, match="methods must be named for a model that was not saved"):
        evaluate(folder, None, 70)
    (tmp_path / "config.json").touch()
    (tmp_path / "extrope.json").write_text("{}")
    assert run(model=tmp_path) == 2
    assert "must hold what an extension has saved" in capsys.readouterr().err


def test_soft_capped_logits():
    torch.manual_seed(0)
    config = Gemma2Config(
        **CONFIG, head_dim=8, final_logit_softcapping=2.0, sliding_window=64, pad_token_id=0
    )
    model = Gemma2ForCausalLM(config).eval()
    ids = torch.randint(0, 100, (40,))
    with torch.no_grad():
        wanted = model(ids[None], labels=ids[None]).loss
    assert loss.token_losses(model, ids[None]).mean().item() == pytest.approx(
        wanted.item(), rel=1e-5
    )


def test_last_bucket_of_one_position_is_left_out():
    assert loss.bucket_edges(9, 4) == [(0, 4), (4, 8), (8, 9)]
    means = loss.bucket_means(torch.arange(8.0)[None], 4)
    assert [(b["stop"], b["loss"], b["error"]) for b in means] == [(4, 1.5, None), (8, 5.5, None)]
    # Of two pieces, whose losses differ by 2 and 6: half the difference is the standard error.
    means = loss.bucket_means(torch.tensor([[1.0, 1, 1, 1, 2], [3.0, 3, 3, 3, 8]]), 4)
    assert [b["loss"] for b in means] == [2.0, 5.0]
    assert [b["error"] for b in means] == pytest.approx([1.0, 3.0])


def test_a_call_after_each_layer(folder):
    layers = {"num_layers": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8}
    layers |= {"qk_rope_head_dim": 8, "head_dim": 8, "v_head_dim": 8, "n_routed_experts": 2}
    layers |= {"vocab_size": 50, "hidden_size": 32, "num_attention_heads": 2, "moe_topk": 1}
    layers |= {"ffn_hidden_size": 32, "expert_ffn_hidden_size": 8, "zero_expert_num": 1}
    double = LongcatFlashForCausalLM(LongcatFlashConfig(**layers))
    assert double.config.num_hidden_layers == 4 and len(decoder_layers(double)) == 2
    with report.Display(io.StringIO(), 1) as display:
        display.begin("a model whose layers are not found", 0)
    model = LlamaForCausalLM.from_pretrained(folder)
    calls = []
    with after_each_layer(model, lambda: calls.append(1)):
        loss.token_losses(model, torch.arange(20).repeat(2, 1))
    assert len(calls) == len(decoder_layers(model)) == 2
    assert not any(layer._forward_hooks for layer in decoder_layers(model))
    assert "forward" not in vars(model.base_model)


def test_factor_only_where_a_method_needs_one():
    assert method_params("rope", 128, 32) == {}
    assert method_params("pi", 128, 32) == {"factor": 4.0}
    assert method_params("pi", 16, 32) == {"factor": 1.0}
    assert method_params("giraffe_power", 128, 32) == {}
    assert method_params("pi", 128, 32, given={"factor": 3}) == {"factor": 3}


def test_auto_is_the_method_that_extend_chooses(run, tmp_path):
    assert run(methods="auto,rope", lengths="32,70") == 0
    rows = [(row["method"], row["params"]) for row in results(tmp_path)["rows"]]
    assert rows == [
        ("rope", {}),  # reaches 32 as it is
        ("rerope", {"window": TRAINED // 2}),
        ("rope", {}),
    ]


def test_defaults_of_score_methods_follow_the_training_length():
    assert method_params("rerope", 16384, 8192) == {"window": 4096}
    assert method_params("leaky_rerope", 16384, 8192) == {"window": 4096, "factor": 16.0}
    assert method_params("dual_chunk", 16384, 8192) == {"chunk_size": 6144, "local_window": 1024}
    assert method_params("string", 16384, 8192) == {"shift": 2730, "window": 128}
    assert method_params("blockwise_causal", 16384, 8192) == {"block_size": 8192}
    given = {"window": 64, "factor": 4.0, "log_n": 8192}
    assert method_params("leaky_rerope", 128, 8192, given=given) == given
    assert method_params("self_extend", 8192, 8192) == {"window": 2048, "factor": 1}
    for length in (8193, 16384, 100_000, 1_000_000):
        found = method_params("self_extend", length, 8192)
        window, group = found["window"], found["factor"]
        assert window % group == 0 and 2048 - group < window <= 2048
        reached = (length - 1) // group + window - window // group
        assert reached <= 8192 * 2 // 3
    found = method_params("self_extend", 16384, 8192, given={"factor": 10})
    assert found == {"window": 2040, "factor": 10}


def test_score_methods_in_the_table(run, folder, text, tokenizer, tmp_path, capsys):
    methods = ",".join(("rope", *SCORES))
    params = ["leaky_rerope.factor=4", "dpe.group_sizes=[1,2,2,4]"]  # a model's own: no default
    assert run(methods=methods, lengths="70", param=params) == 0
    rows = {row["method"]: row for row in results(tmp_path)["rows"]}
    assert list(rows) == methods.split(",")
    assert rows["leaky_rerope"]["params"] == {"window": 16, "factor": 4}
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor(tokenizer(text.read_text()).input_ids)[:70]
    with extend(model, "rerope", window=16), torch.no_grad():
        wanted = model(ids[None], labels=ids[None]).loss.item()
    assert rows["rerope"]["loss"] == pytest.approx(wanted, rel=1e-5)
    assert len({round(row["loss"], 6) for row in rows.values()}) == len(rows)
    other = tmp_path / "other"
    assert run(methods="rerope", lengths="70", param="rerope.window=64", out=other / "out") == 0
    plain = [bucket["loss"] for bucket in rows["rope"]["buckets"]]
    got = [bucket["loss"] for bucket in results(other)["rows"][0]["buckets"]]
    assert got[:4] == pytest.approx(plain[:4], rel=1e-4) and got[4] != pytest.approx(plain[4])


def test_interrupted_run_keeps_finished_rows(run, tmp_path, monkeypatch, capsys):
    measure, calls = loss.token_losses, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(loss, "token_losses", interrupted)
    assert run(plot=True, methods="rope,pi,yarn") == 130
    assert [row["method"] for row in results(tmp_path)["rows"]] == ["rope", "pi"]
    check_image(tmp_path / "out" / "loss.png")
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 3
    assert captured.err.splitlines()[-1].startswith("eval: interrupted; finished rows are in ")
    # The same command goes on where it was, and shows what it had.
    assert run(methods="rope,pi,yarn") == 0
    assert len(calls) == 4
    assert [row["method"] for row in results(tmp_path)["rows"]] == ["rope", "pi", "yarn"]
    assert capsys.readouterr().out.splitlines()[:3] == captured.out.splitlines()


def test_results_of_other_settings_are_not_lost(run, text, tmp_path, capsys):
    other = tmp_path / text.name  # as long, with the same tokens
    other.write_text(text.read_text()[::-1])
    assert run() == 0
    kept = results(tmp_path)
    capsys.readouterr()
    for given, setting in (({"seed": 1}, "seed"), ({"text": other}, "texts")):
        assert run(**given) == 2
        told = capsys.readouterr()
        wanted = f"loss.json is of other settings ({setting}); name another --out, or move it"
        assert told.err.splitlines()[-1].endswith(wanted) and told.out == ""
    assert results(tmp_path) == kept


def test_pieces_of_several_texts(run, folder, text, tokenizer, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text("".join(chr(33 + n % 90) for n in range(0, 4000, 7)))
    assert run(text=[text, other], trials=3, lengths="40,24") == 0
    found = results(tmp_path)
    assert [text["tokens"] for text in found["texts"]] == [240, 572]
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    read = texts.read_texts(tokenizer, [str(text), str(other)])
    for row in found["rows"]:
        pieces = [each.piece(row["length"], index, 0) for each in read for index in range(3)]
        assert len({tuple(piece.tolist()) for piece in pieces}) == 6
        with torch.no_grad():
            wanted = [model(x[None], labels=x[None]).loss.item() for x in pieces]
        assert row["pieces"] == pytest.approx(wanted, rel=1e-5)
        assert row["loss"] == pytest.approx(statistics.fmean(wanted), rel=1e-5)
        assert row["error"] == pytest.approx(statistics.stdev(wanted) / 6**0.5, rel=1e-3)
    cell = capsys.readouterr().out.splitlines()[1].split()[2]
    first = found["rows"][0]["buckets"][0]
    assert cell == f"{first['loss']:.3f}±{first['error']:.3f}".replace("±0", "±")


def test_another_process_may_write_meanwhile(tmp_path, monkeypatch):
    path, replace = tmp_path / "loss.json", report.Path.replace

    def theirs_first(part, target):
        monkeypatch.setattr(report.Path, "replace", replace)
        monkeypatch.setattr(report.os, "getpid", lambda: 0)
        report.write_atomic(target, b"theirs")
        assert path.read_bytes() == b"theirs"
        return replace(part, target)

    monkeypatch.setattr(report.Path, "replace", theirs_first)
    report.write_atomic(path, b"ours")
    assert path.read_bytes() == b"ours" and list(tmp_path.iterdir()) == [path]


def test_two_processes_may_measure_into_one_file(tmp_path):
    path = tmp_path / "loss.json"
    first, second = (report.Rows(path, {"bucket": 16}, ["method"]) for _ in range(2))
    first.add({"method": "rope"}, lambda: {"loss": 1.0})
    second.add({"method": "yarn"}, lambda: {"loss": 2.0})
    assert second.known({"method": "rope"})["loss"] == 1.0
    first.add({"method": "pi"}, lambda: {"loss": 3.0})
    kept = json.loads(path.read_text())["rows"]
    assert [row["method"] for row in kept] == ["rope", "yarn", "pi"]
    path.write_text(json.dumps({"bucket": 8, "rows": []}))
    with pytest.raises(UsageError, match=r"of other settings \(bucket\)"):
        first.add({"method": "abf"}, dict)
    assert json.loads(path.read_text())["bucket"] == 8


def test_pydocs_in_bfloat16_by_the_model_that_is_here(run, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    assert run(model=".", text="pydocs", lengths="48", dtype="bfloat16") == 0
    found = results(tmp_path)
    assert (found["texts"][0]["name"], found["model"]) == ("pydocs", folder.name)


def test_what_is_unlikely_counts_in_large_vocabularies(monkeypatch):
    """Of 2^17 tokens all but one are too unlikely to change a float32 sum one at a time."""
    vocab_size, rows, seqlen = 2**17, 2, 3
    config = SimpleNamespace(vocab_size=vocab_size)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config), device="cpu")
    model.base_model = lambda **_: None
    predicted = torch.full((rows, seqlen - 1, vocab_size), math.log(2**-25))
    predicted[..., 7] = 0.0
    monkeypatch.setattr(loss, "logits", lambda model, body, start, stop: predicted[:, start:stop])
    ids = torch.tensor([[7, 7, 7], [0, 7, 0]])

    def by_rows(logits):
        losses = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return losses.unflatten(0, (rows, seqlen - 1))

    wanted, theirs = by_rows(predicted.double()), by_rows(predicted)
    got = loss.token_losses(model, ids)
    assert (got - wanted).abs().max() <= 2 * (theirs - wanted).abs().max()


SCALED, LENGTH = 64, 128
OWN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": SCALED / TRAINED,
    "original_max_position_embeddings": TRAINED,
}


def test_methods_that_replace_the_scaling_extend_what_was_before(run, tmp_path):
    model = tmp_path / "model"
    config = Qwen2Config(**CONFIG | {"max_position_embeddings": SCALED, "rope_parameters": OWN})
    Qwen2ForCausalLM(config).save_pretrained(model)
    save_tokenizer(model)
    methods = "yarn,pi,dynamic_ntk,rerope"
    assert run(model=model, lengths=LENGTH, methods=methods, out=tmp_path / "out") == 0
    rows = results(tmp_path)["rows"]
    assert [row["params"] for row in rows] == [
        {"factor": LENGTH / TRAINED},
        {"factor": LENGTH / TRAINED},
        {"factor": LENGTH / TRAINED},
        {"window": SCALED // 2},  # on the model's own frequencies, trained to there
    ]
