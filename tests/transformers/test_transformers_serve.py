"""An extended model behind `transformers serve`. Needs transformers[serving]."""

from __future__ import annotations

import json
import socket
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.hf_models import VOCAB, build, tokens, transformers

from extrope_kernels.integrations.transformers import extend

for package in ("fastapi", "openai", "uvicorn", "typer"):
    pytest.importorskip(package)
NEW = 6
PROMPTS = [tokens(1, seqlen, seed=seqlen) for seqlen in (40, 23)]


@pytest.fixture(params=[True, False], ids=["batches", "one by one"])
def server(request, tmp_path):
    """A server, its address, and the folder of the tiny Llama that it has loaded."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers.cli.serve import Serve

    build("llama").save_pretrained(tmp_path)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0")
    fast.save_pretrained(tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Serve(
        str(tmp_path),
        continuous_batching=request.param,
        cb_num_blocks=64,
        cb_max_batch_tokens=16,
        device="cpu",
        dtype="float32",
        host="127.0.0.1",
        port=port,
        non_blocking=True,
    )
    yield server, f"http://127.0.0.1:{port}/v1/completions", str(tmp_path)
    server.kill_server()


def ask(address, model, ids):
    """The ids that the server adds."""
    prompt = " ".join(f"w{token}" for token in ids[0].tolist())
    body = {"model": model, "prompt": prompt, "max_tokens": NEW, "temperature": 0.0}
    headers = {"Content-Type": "application/json"}
    post = urllib.request.Request(address, json.dumps(body).encode(), headers)
    for _ in range(100):
        try:
            with urllib.request.urlopen(post, timeout=60) as response:
                text = json.load(response)["choices"][0]["text"]
        except urllib.error.HTTPError:
            raise
        except urllib.error.URLError:  # it has not begun to listen
            time.sleep(0.1)
        else:
            return [int(word[1:]) for word in text.split()]
    raise TimeoutError(address)


def test_an_extended_model_answers(server):
    server, address, folder = server
    model, _ = server._model_manager.load_model_and_processor(folder)
    twin = build("llama")
    with extend(twin, "rerope", window=16):
        made = [twin.generate(ids, max_new_tokens=NEW, do_sample=False) for ids in PROMPTS]
    want = [out[0, ids.shape[1] :].tolist() for out, ids in zip(made, PROMPTS)]
    plain = [twin.generate(ids, max_new_tokens=NEW, do_sample=False) for ids in PROMPTS]
    assert not torch.equal(plain[0], made[0])
    extend(model, "rerope", window=16)
    with ThreadPoolExecutor() as pool:
        got = list(pool.map(lambda ids: ask(address, folder, ids), PROMPTS))
    assert got == want
