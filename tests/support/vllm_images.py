"""Tiny random models that see images, in transformers and for vLLM's engines."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from support.vllm_engines import SIZES, VOCAB

from extrope_kernels.integrations.transformers import extend

IMAGE, VIDEO, START, END = range(4, 8)  # tokens
NAMES = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
BEFORE, BEHIND = [20 + i % 7 for i in range(150)], list(range(30, 60))
PATCH = 14
VISION = {"hidden_size": 64, "intermediate_size": 96, "patch_size": PATCH}
OF_QWEN = {
    "depth": 2,
    "num_heads": 2,
    "out_hidden_size": 128,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
# By name: the text's changes, the vision's sizes, and what the image becomes in tokens.
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "Qwen2_5_VL": (
        {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
        VISION | OF_QWEN | {"window_size": 56, "fullatt_block_indexes": [1]},
        2 * 3,
    ),
    "Qwen3VL": (
        {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [6, 5, 5],
            "mrope_interleaved": True,
        },
        VISION | OF_QWEN | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
        2 * 3,
    ),
    "Llava": (
        {"rope_type": "default", "rope_theta": 1e4},
        VISION | {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 4 * PATCH},
        4 * 4,
    ),
}


@dataclass
class Seeing:
    """A model and one prompt with an image in it.

    prompt: the tokens, one for the image; ids: with all of the image's tokens.
    """

    name: str
    model: Any
    image: Any
    prompt: list[int]
    ids: torch.Tensor
    inputs: dict[str, torch.Tensor]

    @torch.no_grad()
    def logprobs(self, model: Any, methods: list[dict[str, Any]]) -> torch.Tensor:
        """Of the prompt's tokens but its first, by transformers under `extend`."""
        pixels = self.inputs["pixel_values"].to(model.dtype)
        with ExitStack() as stack:
            for method in methods:
                stack.callback(extend(model, **method).restore)
            logits = model(self.ids, **self.inputs | {"pixel_values": pixels}).logits[0]
        chosen = self.ids[0, 1:, None]
        return logits.float().log_softmax(-1)[:-1].gather(1, chosen)[:, 0]


def build(name: str, folder: Any) -> Seeing:
    """A model of transformers' class of that name, saved with its processor for vLLM."""
    import numpy as np
    import transformers
    from PIL import Image

    rope, vision, tokens = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        # Longer than the prompt: plain engines end where their tables do.
        text_config=SIZES
        | {"hidden_size": 128, "rope_parameters": rope, "max_position_embeddings": 256},
        vision_config=vision,
        image_token_id=IMAGE,
        **_of_one_family(name),
        tie_word_embeddings=False,
    )
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    if name == "Llava":
        _name_weights_as_published(folder)
    processor = _processor(name)
    processor.save_pretrained(folder)
    rows, columns = (4, 4) if name == "Llava" else (4, 6)
    pixels = np.random.default_rng(0).integers(0, 256, (rows * PATCH, columns * PATCH, 3))
    image = Image.fromarray(pixels.astype(np.uint8))
    inputs = dict(processor.image_processor(images=[image], return_tensors="pt"))
    ids = torch.tensor([[*BEFORE, START, *[IMAGE] * tokens, END, *BEHIND]])
    if name != "Llava":
        inputs["mm_token_type_ids"] = (ids == IMAGE).int()
    return Seeing(name, model, image, [*BEFORE, START, IMAGE, END, *BEHIND], ids, inputs)


def _of_one_family(name: str) -> dict[str, Any]:
    if name == "Llava":
        return {"vision_feature_layer": -1, "projector_hidden_act": "gelu"}
    return {"video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}


def _name_weights_as_published(folder: Any) -> None:
    """transformers 5 leaves out a level that vLLM's names have."""
    from safetensors.torch import load_file, save_file

    path = f"{folder}/model.safetensors"
    short, long = "vision_tower.", "vision_tower.vision_model."
    named = {name.replace(short, long): x for name, x in load_file(path).items()}
    save_file(named, path, metadata={"format": "pt"})


def _processor(name: str) -> Any:
    import transformers

    images = {"image_processor": transformers.CLIPImageProcessor(
        size={"height": 4 * PATCH, "width": 4 * PATCH}, do_center_crop=False
    )}  # fmt: skip
    more: dict[str, Any] = {"patch_size": PATCH, "vision_feature_select_strategy": "default"}
    more |= {"image_token": NAMES[0], "num_additional_image_tokens": 1}
    if name != "Llava":
        size = {"shortest_edge": (2 * PATCH) ** 2, "longest_edge": (16 * PATCH) ** 2}
        images = {
            "image_processor": transformers.Qwen2VLImageProcessor(size=size, patch_size=PATCH),
            "video_processor": transformers.Qwen2VLVideoProcessor(size=size, patch_size=PATCH),
        }
        more = {}
    return getattr(transformers, f"{name}Processor")(tokenizer=_tokenizer(), **images, **more)


def _tokenizer() -> Any:
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [f"w{i}" for i in range(VOCAB)]
    words[IMAGE : END + 1] = NAMES
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_special_tokens({"additional_special_tokens": list(NAMES)})
    return fast


def prompt_logprobs(llm: Any, seen: Seeing) -> torch.Tensor:
    """Of the prompt's tokens but its first, by an engine."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    prompt = {"prompt_token_ids": seen.prompt, "multi_modal_data": {"image": seen.image}}
    given = llm.generate([prompt], params, use_tqdm=False)[0].prompt_logprobs[1:]
    pairs = zip(seen.ids[0, 1:].tolist(), given, strict=True)
    return torch.tensor([found[token].logprob for token, found in pairs])
