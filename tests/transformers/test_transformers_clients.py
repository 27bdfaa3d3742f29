"""Libraries around a model that is extended; docs/guide/works-with.md lists them by these tests."""

from __future__ import annotations

import copy

import pytest
import torch
from support.hf_models import VOCAB, build, error, generate, gradients, logits, tokens, transformers
from torch import nn

from extrope_kernels.integrations.transformers import extend

pytestmark = pytest.mark.thorough
IDS = tokens(1, 60, seed=4)
NEW = 12
METHODS = [("yarn", {"factor": 4.0}), ("rerope", {"window": 7})]
over_methods = pytest.mark.parametrize(("method", "parameters"), METHODS)


def greedy(model, ids=IDS, **settings):
    return model.generate(ids, max_new_tokens=NEW, do_sample=False, **settings)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w3")
    words = tokenizers.Tokenizer(model)
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0")


def text_of(ids):
    return " ".join(f"w{i}" for i in ids.tolist())


@over_methods
def test_drafts_of_a_model_or_of_the_prompt(method, parameters):
    model, draft = build("llama"), build("llama", num_hidden_layers=1)
    with extend(model, method, **parameters), extend(draft, method, **parameters):
        want = greedy(model)
        assert torch.equal(greedy(model, assistant_model=draft), want)
        assert torch.equal(greedy(model, prompt_lookup_num_tokens=3), want)


@over_methods
def test_a_pipeline(method, parameters, tokenizer):
    model = build("llama")
    with extend(model, method, **parameters):
        pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
        settings = {"max_new_tokens": NEW, "do_sample": False, "return_full_text": False}
        (out,) = pipe(text_of(IDS[0]), **settings)
        assert out["generated_text"].split() == text_of(greedy(model)[0, -NEW:]).split()


@over_methods
def test_a_quantised_cache(method, parameters):
    """All keys but the last 16 have 4 bits; the first use compiles for two minutes."""
    pytest.importorskip("optimum.quanto")
    model = build("llama")
    plain = generate(model, IDS, max_new_tokens=1)
    settings = {"backend": "quanto", "nbits": 4, "residual_length": 16, "q_group_size": 16}
    with extend(model, method, **parameters):
        want = generate(model, IDS, max_new_tokens=2)
        quantised = {"cache_implementation": "quantized", "cache_config": settings}
        got = generate(model, IDS, max_new_tokens=2, **quantised)
    assert torch.equal(got[:, :1], want[:, :1])  # before anything is read back
    assert 0 < error(got[:, 1:], want[:, 1:]) < error(want[:, :1], plain)


@over_methods
def test_weights_of_torchao(method, parameters):
    quantization = pytest.importorskip("torchao.quantization")
    model = build("llama")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    twin = build("llama")
    with torch.no_grad():
        for (_, ours), (_, theirs) in zip(twin.named_parameters(), model.named_parameters()):
            ours.copy_(theirs.dequantize() if hasattr(theirs, "dequantize") else theirs)
    with extend(model, method, **parameters), extend(twin, method, **parameters):
        torch.testing.assert_close(logits(model, IDS), logits(twin, IDS), rtol=1e-4, atol=1e-4)


@over_methods
def test_sentence_transformers(method, parameters, tokenizer, tmp_path):
    sentences = pytest.importorskip("sentence_transformers.sentence_transformer")
    build("llama").model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    words = sentences.modules.Transformer(str(tmp_path), max_seq_length=100)
    pooling = sentences.modules.Pooling(words.get_word_embedding_dimension(), "lasttoken")
    encoder = sentences.SentenceTransformer(modules=[words, pooling], device="cpu")
    model, rows = build("llama").model, [IDS[0], IDS[0, 5:30]]
    with extend(model, method, **parameters), torch.no_grad():
        want = torch.cat([model(row[None]).last_hidden_state[:, -1] for row in rows])
    with extend(encoder, method, **parameters):
        got = encoder.encode([text_of(row) for row in rows], convert_to_tensor=True)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@over_methods
def test_accelerate_and_ddp(method, parameters, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = build("llama")
    twin = copy.deepcopy(model)
    with extend(model, method, **parameters), extend(twin, method, **parameters):
        want = gradients(twin, IDS, use_cache=False)
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
        )
        try:
            parallel = nn.parallel.DistributedDataParallel(model)
            parallel(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        finally:
            torch.distributed.destroy_process_group()
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.grad, want[name])
        prepared = accelerate.Accelerator(cpu=True).prepare(twin)
        assert torch.equal(logits(prepared, IDS), logits(model, IDS))
