"""The tiny model's configuration and tokenizer, and checks of what the command leaves behind."""

import json
import resource
import shutil
import string
from contextlib import contextmanager

import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

TRAINED = 32
CONFIG = {
    "vocab_size": len(string.printable) + 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": TRAINED,
    "initializer_range": 0.3,  # far enough from zero that the methods' losses differ
    "bos_token_id": None,
    "eos_token_id": None,
}


def save_tokenizer(folder):
    """Save a tokenizer whose tokens are characters."""
    vocab = {char: index for index, char in enumerate(string.printable)}
    characters = Tokenizer(WordLevel(vocab | {"<unk>": len(vocab)}, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=characters).save_pretrained(folder)


def retrained(folder, tmp_path):
    """A folder of the same name, with a model of the same shape and other weights."""
    other = tmp_path / "other" / folder.name
    shutil.copytree(folder, other)
    model = LlamaForCausalLM.from_pretrained(other)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] += 1
    model.save_pretrained(other)
    return other


@contextmanager
def files_of_at_most(size):
    """Let writes past so many bytes of a file fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def results(tmp_path, task="loss"):
    return json.loads((tmp_path / "out" / f"{task}.json").read_text())


def check_image(path):
    image = Image.open(path).convert("L")
    assert min(image.size) > 300
    low, high = image.getextrema()
    assert low < 80 and high > 240
