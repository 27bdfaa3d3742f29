"""The model that lm-evaluation-harness calls `extrope`, on a tiny Llama and a task of our own."""

import gc
import re
import shutil
import sys
import warnings
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import ruler
import torch
from tiny_model import TRAINED
from transformers import AutoTokenizer, LlamaForCausalLM

from extrope_kernels.evaluation import UsageError
from extrope_kernels.integrations.transformers import extend

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402 - where there is lm-eval
from lm_eval.tasks import TaskManager  # noqa: E402

from extrope_kernels.evaluation.lm_eval import model as ours  # noqa: E402
from extrope_kernels.evaluation.lm_eval.__main__ import main  # noqa: E402

NEW = 6
TEXTS = ("The quick brown fox. " * 5, "Jumps over 13 lazy dogs, " * 3)  # 105 and 75 tokens
METHODS = {"yarn": {"factor": 4.0}, "rerope": {"window": 8}}
TASK = """
task: tiny
dataset_path: ""
custom_dataset: !function tiny_task.texts
output_type: generate_until
test_split: test
doc_to_text: "{{text}}"
doc_to_target: "nothing"
generation_kwargs: {do_sample: false, max_gen_toks: 6, until: []}
process_results: !function tiny_task.longer
metric_list: [{metric: "64", aggregation: mean, higher_is_better: true}]
"""
FUNCTION = """
import datasets

def texts(**metadata):
    return {{"test": datasets.Dataset.from_list([{{"text": text}} for text in {texts!r}])}}

def longer(doc, results):
    return {{"64": len(doc["text"]) > 80}}
"""


@pytest.fixture(scope="module")
def model_path(folder, tmp_path_factory):
    """The tiny model with a token that ends a text, which the harness asks for; none is written."""
    path = tmp_path_factory.mktemp("ends") / "model"
    shutil.copytree(folder, path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_special_tokens({"eos_token": "<end>", "pad_token": "\x0c"})
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    path = tmp_path_factory.mktemp("task")
    (path / "tiny_task.py").write_text(FUNCTION.format(texts=TEXTS))
    (path / "tiny.yaml").write_text(TASK)
    return str(path / "tiny.yaml")


def generated(model_path, method):
    """What transformers alone continues each text by, as text."""
    model = LlamaForCausalLM.from_pretrained(model_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    with extend(model, method, **METHODS[method]):
        found = []
        for text in TEXTS:
            ids = tokenizer(text, return_tensors="pt").input_ids
            new = model.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
            found.append(tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True))
    return found


@pytest.mark.parametrize(
    ("method", "options"), [("yarn", {}), ("rerope", {"prefill_chunk_size": 32})]
)
def test_a_batch_of_long_prompts_is_answered_as_by_transformers(model_path, task, method, options):
    lm = ours.ExtropeLM(model_path, method=method, device="cpu", batch_size=2, **METHODS[method])
    manager = TaskManager(include_defaults=False)  # there are ten thousand files of others
    found = lm_eval.simple_evaluate(
        lm, tasks=[task], task_manager=manager, gen_kwargs=options, bootstrap_iters=0
    )
    answers = [sample["resps"][0][0] for sample in found["samples"]["tiny"]]
    assert all(len(text) > TRAINED for text in TEXTS)
    assert answers == generated(model_path, method)


def test_loss_of_a_long_text_is_that_of_the_whole(model_path):
    lm = ours.ExtropeLM(model_path, method="rerope", window=8, device="cpu", dtype="float32")
    ids = lm.tokenizer(TEXTS[0], return_tensors="pt").input_ids
    with torch.no_grad():
        losses = torch.log_softmax(lm.model(ids).logits[0].double(), -1)
    wanted = losses[49:-1].gather(1, ids[0, 50:, None]).sum().item()
    asked = Instance("loglikelihood", {}, (TEXTS[0][:50], TEXTS[0][50:]), 0)
    ((found, _),) = lm.loglikelihood([asked])
    assert found == pytest.approx(wanted, rel=1e-5)


def test_the_model_is_given_back(model_path):
    model = LlamaForCausalLM.from_pretrained(model_path).eval()
    ids = torch.arange(60)[None]
    plain = model(ids).logits
    lm = ours.ExtropeLM(model, method="rerope", window=8)
    assert not torch.equal(model(ids).logits, plain)
    lm.restore()
    assert torch.equal(model(ids).logits, plain)
    lm = ours.ExtropeLM(model, method="yarn", factor=4.0)
    assert not torch.equal(model(ids).logits, plain)
    del lm
    gc.collect()
    assert torch.equal(model(ids).logits, plain)
    lm = ours.ExtropeLM(model)  # as it is
    assert torch.equal(model(ids).logits, plain)
    lm.restore()


def test_ruler_asks_for_the_samples_that_a_cell_lacks(model_path, task):
    model = LlamaForCausalLM.from_pretrained(model_path).eval()
    ids = torch.arange(60)[None]
    plain = model(ids).logits
    loaded = TaskManager(include_defaults=False).load([task])
    cell = ruler.Cell("tiny", 64, "digest", "rerope", "window=8", (0.5,))
    found = ruler.asked(model, ("rerope", {"window": 8}), loaded, cell, 2)
    assert found == cell._replace(scores=(0.5, 0.0))  # the second text is shorter
    found = ruler.asked(model, (None, {}), loaded, cell._replace(scores=()), 2)
    assert found.scores == (1.0, 0.0)
    assert torch.equal(model(ids).logits, plain)


def test_length_alone_chooses_the_method(model_path):
    lm = ours.ExtropeLM(model_path, length=4 * TRAINED, device="cpu")
    (saved,) = vars(lm.model.model)["_extrope_extensions"].all()
    assert (saved.method, saved.parameters) == ("rerope", {"window": TRAINED // 2})


@pytest.mark.parametrize("adapters", [False, True])
def test_a_folder_is_read_as_it_was_saved(model_path, task, tmp_path, capsys, adapters):
    """Of the model, or of adapters that were tuned under the extension."""
    saved, options = tmp_path / "saved", {"device": "cpu", "batch_size": 2}
    model = LlamaForCausalLM.from_pretrained(model_path).eval()
    if adapters:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
        options |= {"peft": str(saved)}
    with extend(model, "rerope", **METHODS["rerope"]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # config.json is the plain model's
        model.save_pretrained(saved)
    AutoTokenizer.from_pretrained(model_path).save_pretrained(saved)
    lm = ours.ExtropeLM(model_path if adapters else str(saved), **options)
    said = f"{saved} was saved as extended by rerope window=8: read"
    assert f"{said} as it was saved" in capsys.readouterr().err
    manager = TaskManager(include_defaults=False)
    found = lm_eval.simple_evaluate(lm, tasks=[task], task_manager=manager, bootstrap_iters=0)
    answers = [sample["resps"][0][0] for sample in found["samples"]["tiny"]]
    assert answers == generated(model_path, "rerope")
    lm = ours.ExtropeLM(model_path if adapters else str(saved), "yarn", factor=4.0, **options)
    assert f"{said} by the method named alone" in capsys.readouterr().err
    (owner,) = (each for each in lm.model.modules() if "_extrope_extensions" in vars(each))
    assert str(vars(owner)["_extrope_extensions"]) == "yarn factor=4.0"


def test_lengths_that_rows_do_not_tell(model_path, tmp_path):
    model = LlamaForCausalLM.from_pretrained(model_path)
    with extend(model, "dynamic_yarn") as handle, pytest.warns(UserWarning, match="without it"):
        handle.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="batch_size must be 1 for dynamic_yarn"):
        ours.ExtropeLM(str(tmp_path), batch_size=2, device="cpu")


def test_options_of_extend(model_path):
    model = LlamaForCausalLM.from_pretrained(model_path).eval()
    lm = ours.ExtropeLM(model, method="yarn", factor=4.0, layers="all", cache="raw")
    (saved,) = vars(model.model)["_extrope_extensions"].all()
    assert (saved.layers, saved.cache) == ("all", "raw")
    lm.restore()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "yarm"}, "method must be one of rope, .* got 'yarm'"),
        ({"method": "yarn", "window": 8}, "yarn: no argument window; it has factor"),
        ({"factor": 2.0}, "factor needs a method, or length"),
        ({"pretrained": "/nope"}, "/nope"),
        ({"method": "rerope", "window": 8, "layers": "some"}, "layers must be full or all"),
        ({"method": "rerope"}, "rerope needs window=16, half of the 32 tokens"),
        ({"method": "rerope", "window": -1}, "rerope: window must be"),
        ({"method": "rerope", "windw": 8}, "neither extend nor transformers takes windw"),
        ({"method": "yarn", "factor": 2.0, "batch_size": "auto"}, "batch_size=auto needs max_l"),
        ({"method": "dynamic_yarn", "batch_size": 4}, "batch_size must be 1 for dynamic_yarn, wh"),
    ],
)
def test_mistakes(model_path, given, message):
    with pytest.raises(UsageError, match=message) as error:
        ours.ExtropeLM(**{"pretrained": model_path, "device": "cpu", **given})
    assert "\n" not in str(error.value)


@pytest.mark.thorough  # the harness reads the names of all its tasks, which takes ten seconds
def test_command_line(model_path, task, monkeypatch, capsys, tmp_path):
    def run(*arguments):
        given = ["lm_eval", "run", "--model", "extrope", "--device", "cpu", "--tasks", task]
        monkeypatch.setattr(sys, "argv", [*given, *arguments])
        return main()

    assert run("--model_args", f"pretrained={model_path},method=rerope") == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "lm_eval: extend: rerope needs window=16, half of the 32 tokens that the model reaches, "
        "or length="
    )
    out = str(tmp_path / "out")
    model = f"pretrained={model_path},method=rerope,window=8"
    assert run("--model_args", model, "--output_path", out, "--log_samples") == 0
    (samples,) = Path(out).rglob("samples_tiny_*.jsonl")
    assert len(samples.read_text().splitlines()) == len(TEXTS)


def test_entry_point():
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    group = 'project.entry-points."lm_eval.models"'
    name, value = re.search(rf'\[{re.escape(group)}\]\n(\w+) = "(.+)"', project).groups()
    assert name == ours.NAME and EntryPoint(name, value, "lm_eval.models").load() is ours.ExtropeLM
