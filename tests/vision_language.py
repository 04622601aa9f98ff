"""Vision-language models of transformers at toy size, with processors made here.

Images have 16 x 16 pixels and towers 4 x 4 positions; Idefics3 and InternVL make 2 x 2 of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import transformers
from PIL import Image
from tiny import HF, drawn
from tokenizers import Tokenizer, models, pre_tokenizers

WORDS = ["<pad>", "<unk>", "<bos>", "<eos>", *"abcdefghijklmnop"]
SPECIAL = [
    *("<image>", "<video>", "<img>", "</img>", "<IMG_CONTEXT>"),  # of LLaVA and InternVL
    *("<start_of_image>", "<end_of_image>", "<image_soft_token>"),  # of Gemma 3
    *("<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),  # of Idefics3
    *(f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)),
]
IDS = {word: i for i, word in enumerate([*WORDS, *SPECIAL])}
SIZE = {"height": 16, "width": 16}
PINPOINTS = [[16, 16], [16, 32], [32, 16], [32, 32]]

TEXT: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "vocab_size": len(IDS) + 1100,  # PaliGemma adds a thousand tokens
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
VISION = HF | {"hidden_size": 24, "intermediate_size": 48}
CLIP = VISION | {"model_type": "clip_vision_model", "projection_dim": 8}
SIGLIP = VISION | {
    "model_type": "siglip_vision_model",
    "projection_dim": 24,
    "vision_use_head": False,
}
GEMMA = TEXT | {"model_type": "gemma", "head_dim": 12}
GEMMA3 = GEMMA | {"model_type": "gemma3_text"}


def tokenizer(**named: str) -> Any:
    plain = Tokenizer(models.WordLevel(IDS, "<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain.add_special_tokens(SPECIAL)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        extra_special_tokens=named,
    )


def _model(name: str, vision: dict[str, Any], text: dict[str, Any], **options: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(
        vision_config=vision, text_config=text, **options
    )
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    model.generation_config.update(pad_token_id=0, eos_token_id=3, max_new_tokens=6)
    return drawn(model, 0.2).eval()


def _llava(vision: dict[str, Any] = CLIP, strategy: str = "default") -> tuple[Any, Any]:
    model = _model(
        "Llava",
        vision,
        TEXT,
        image_token_index=IDS["<image>"],
        vision_feature_layer=-1,
        vision_feature_select_strategy=strategy,
    )
    has_class = vision["model_type"].startswith("clip")
    images = transformers.SiglipImageProcessor(size=SIZE)
    return model, transformers.LlavaProcessor(
        images, tokenizer(), 4, strategy, num_additional_image_tokens=int(has_class)
    )


def _llava_next() -> tuple[Any, Any]:
    options = {"image_grid_pinpoints": PINPOINTS, "image_token_index": IDS["<image>"]}
    model = _model("LlavaNext", CLIP, TEXT, vision_feature_layer=-1, **options)
    images = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": 16}, crop_size=SIZE, image_grid_pinpoints=PINPOINTS
    )
    return model, transformers.LlavaNextProcessor(
        images, tokenizer(), 4, "default", num_additional_image_tokens=1
    )


def _llava_onevision() -> tuple[Any, Any]:
    options = {"image_grid_pinpoints": PINPOINTS, "image_token_index": IDS["<image>"]}
    options |= {"video_token_index": IDS["<video>"], "vision_feature_select_strategy": "full"}
    model = _model("LlavaOnevision", SIGLIP, TEXT, vision_feature_layer=-1, **options)
    images = transformers.LlavaOnevisionImageProcessor(size=SIZE, image_grid_pinpoints=PINPOINTS)
    videos = transformers.LlavaOnevisionVideoProcessor(size=SIZE)
    processor = transformers.LlavaOnevisionProcessor(
        images, tokenizer(), videos, num_image_tokens=16, vision_feature_select_strategy="full"
    )
    return model, processor


def _paligemma() -> tuple[Any, Any]:
    options = {"image_token_index": IDS["<image>"], "projection_dim": 24}
    model = _model("PaliGemma", SIGLIP, GEMMA, **options)
    images = transformers.SiglipImageProcessor(size=SIZE)
    images.image_seq_length = 16
    named = tokenizer(image_token="<image>")
    return model, transformers.PaliGemmaProcessor(images, named)


def _gemma3() -> tuple[Any, Any]:
    options = {"image_token_index": IDS["<image_soft_token>"], "mm_tokens_per_image": 16}
    options |= {
        "boi_token_index": IDS["<start_of_image>"],
        "eoi_token_index": IDS["<end_of_image>"],
    }
    model = _model("Gemma3", SIGLIP, GEMMA3, **options)
    named = tokenizer(
        image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>"
    )
    images = transformers.Gemma3ImageProcessor(size=SIZE)
    return model, transformers.Gemma3Processor(images, named, image_seq_length=16)


def _idefics3() -> tuple[Any, Any]:
    model = _model(
        "Idefics3", VISION, TEXT, image_token_id=IDS["<image>"], scale_factor=2, pad_token_id=0
    )
    images = transformers.Idefics3ImageProcessor(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 16}
    )
    return model, transformers.Idefics3Processor(images, tokenizer(), image_seq_len=4)


def _smolvlm() -> tuple[Any, Any]:
    from transformers.models.smolvlm import processing_smolvlm

    processing_smolvlm.num2words = processing_smolvlm.num2words or str  # an optional package
    model = _model(
        "SmolVLM", VISION, TEXT, image_token_id=IDS["<image>"], scale_factor=2, pad_token_id=0
    )
    size = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
    return model, transformers.SmolVLMProcessor(
        transformers.SmolVLMImageProcessor(**size),
        tokenizer(),
        transformers.SmolVLMVideoProcessor(**size),
        image_seq_len=4,
    )


def _internvl() -> tuple[Any, Any]:
    vision = VISION | {"image_size": [16, 16], "patch_size": [4, 4]}
    model = _model("InternVL", vision, TEXT, image_token_id=IDS["<IMG_CONTEXT>"])
    named = tokenizer(
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    images = transformers.GotOcr2ImageProcessor(size=SIZE, max_patches=4)
    videos = transformers.InternVLVideoProcessor(size=SIZE)
    return model, transformers.InternVLProcessor(images, named, videos, image_seq_length=4)


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "Llava": _llava,
    "Llava class token": lambda: _llava(strategy="full"),
    "Llava SigLIP": lambda: _llava(SIGLIP, "full"),
    "LlavaNext": _llava_next,
    "LlavaOnevision": _llava_onevision,
    "PaliGemma": _paligemma,
    "Gemma3": _gemma3,
    "Idefics3": _idefics3,
    "SmolVLM": _smolvlm,
    "InternVL": _internvl,
}
MARKS = {"Gemma3": "<start_of_image>", "InternVL": "<IMG_CONTEXT>"}
K = {"Idefics3": 2, "SmolVLM": 2, "InternVL": 2}  # of 4 positions; of 16 there are 4


def picture(seed: int = 0, size: tuple[int, int] = (16, 16)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encode(name: str, processor: Any, texts: Sequence[str], images: Any, **options: Any) -> Any:
    """The inputs of texts in which `*` stands for an image; `images` has a list for each."""
    texts = [text.replace("*", MARKS.get(name, "<image>")) for text in texts]
    images = [each for each in images if each] or None
    return processor(text=texts, images=images, padding=True, return_tensors="pt", **options)
