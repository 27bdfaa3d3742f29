"""Read two documents into separate caches, then attend to both, in either order.

Under `extend(model, ..., cache="raw")` a cache has unrotated keys: one that was filled at positions
0, 1, 2, ... can be read after another. Positions are exact. But the documents have not seen each
other: above the first layer keys and values are made of states of one document.

    python examples/reuse_cached_chunks.py [FOLDER | smollm2]

Without an argument the model is a tiny Llama with random weights.
"""

import copy
import sys

import torch
from extend_and_generate import tiny_llama
from transformers import DynamicCache, PreTrainedModel

from extrope_kernels.evaluation import models
from extrope_kernels.integrations.transformers import extend

DOCUMENTS = (
    "Anna keeps the key of the boat house in the blue jar. ",
    "Boris has painted the boat house green, and its door red. ",
)
QUESTION = "Question: Where is the key? Answer: The key is in the"


def read(model: PreTrainedModel, ids: torch.Tensor) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    model(ids, None, None, cache)  # whose name is not the same in all of transformers 5
    return cache


def joined(first: DynamicCache, second: DynamicCache) -> DynamicCache:
    both = copy.deepcopy(first)  # the first stays unchanged, for other orders
    for number, layer in enumerate(second.layers):
        both.update(layer.keys, layer.values, number)
    return both


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    models.quiet()
    tokenizer = None
    if len(sys.argv) > 1:
        files = models.find_model(sys.argv[1])
        tokenizer, model = models.load_tokenizer(files), models.load_model(files, "float32", "cpu")
        texts = (*DOCUMENTS, QUESTION)
        a, b, question = (tokenizer(text, return_tensors="pt").input_ids for text in texts)
    else:
        model = tiny_llama()
        a, b, question = (torch.randint(1, 128, (1, n)) for n in (20, 13, 7))
    with extend(model, "dynamic_yarn", cache="raw"):
        caches = {"first": read(model, a), "second": read(model, b)}
        for order, ids in ((("first", "second"), (a, b)), (("second", "first"), (b, a))):
            apart = joined(*(caches[name] for name in order))
            at_once = read(model, torch.cat(ids, 1))
            same = torch.equal(apart.layers[0].keys, at_once.layers[0].keys)
            far = (apart.layers[-1].keys - at_once.layers[-1].keys).norm()
            far /= at_once.layers[-1].keys.norm()
            guess, wanted = (
                model(question, None, None, cache).logits[0, -1].softmax(0)
                for cache in (apart, at_once)
            )
            print(f"{' then '.join(order)}: keys of the first layer", "equal" if same else "differ")
            print(f"    of the last layer {far:.1%} apart from those of a text read at once")
            moved = (guess - wanted).abs().sum() / 2
            print(f"    of the next token's probability {moved:.1%} is elsewhere", flush=True)
            if tokenizer is not None:
                words = (repr(tokenizer.decode(x.argmax().item())) for x in (guess, wanted))
                print("    the next token {}, read at once {}".format(*words), flush=True)


if __name__ == "__main__":
    main()
