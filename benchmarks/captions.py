"""A small vision-language model of LLaVA's kind, and images with captions for it.

Garments of Fashion-MNIST, of six kinds, lie at random places of an image, on a gray ground. The
caption names each and its place on a grid of 3 x 3, line by line: "bag top left , dress middle
right .". So it takes what is where, and fine places decide at the borders.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
)

from tokenlearner import load_data

SIZE, PATCH, GARMENT, PLACES = 96, 8, 24, 3
GRID = SIZE // PATCH
NAMES = {0: "shirt", 1: "trouser", 3: "dress", 5: "sandal", 8: "bag", 9: "boot"}  # by the label
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
SPECIAL = ["<pad>", "<unk>", "<end>", "<image>"]
WORDS = [*SPECIAL, "what", "is", "where", "?", ",", ".", *ROWS, *COLUMNS, *NAMES.values()]
PROMPT = "<image> what is where ?"
WIDTH, LAYERS = 96, 3


@dataclass
class Scenes:
    """Images with their captions.

    Args:
        images: `b h w 3`, bytes.
        captions: One for each.
        patches: The kind of garment at each patch, counted from 1, `b h w`; 0 is none.
    """

    images: np.ndarray
    captions: list[str]
    patches: Tensor

    def examples(self, indices: Any, answered: bool = True) -> list[dict[str, Any]]:
        """What a processor takes, with the caption or only the question."""
        return [
            {
                "text": f"{PROMPT} {self.captions[i]} <end>" if answered else PROMPT,
                "images": [Image.fromarray(self.images[i])],
            }
            for i in indices
        ]


def draw_scenes(count: int, seed: int, split: str = "train") -> Scenes:
    """Draws images of 2 to 4 garments that do not overlap."""
    data: Any = load_data("fashion-mnist-small", split)
    known = torch.isin(data.labels, torch.tensor([*NAMES]))
    small = F.interpolate(data.images[known].float(), size=(GARMENT, GARMENT), mode="area")
    garments, labels = small[:, 0].numpy(), data.labels[known].tolist()
    random = np.random.default_rng(seed)
    images = np.zeros((count, SIZE, SIZE), np.float32)
    patches = torch.zeros(count, GRID, GRID, dtype=torch.long)
    captions = []
    for i in range(count):
        images[i] = random.uniform(0, 60) + random.normal(0, 8, (SIZE, SIZE))
        corners: list[tuple[int, int]] = []
        wanted = random.integers(2, 5)
        while len(corners) < wanted:
            y, x = PATCH * random.integers(0, (SIZE - GARMENT) // PATCH + 1, 2)
            if all(abs(y - b) >= GARMENT or abs(x - a) >= GARMENT for b, a in corners):
                corners.append((y, x))
        named = []
        for y, x in corners:
            which = random.integers(len(garments))
            images[i, y : y + GARMENT, x : x + GARMENT] += garments[which]
            row, column = ((z + GARMENT // 2) * PLACES // SIZE for z in (y, x))
            named.append((row, column, x, labels[which]))
            rows, columns = (slice(z // PATCH, (z + GARMENT) // PATCH) for z in (y, x))
            patches[i, rows, columns] = 1 + [*NAMES].index(labels[which])
        words = [f"{NAMES[n]} {ROWS[r]} {COLUMNS[c]}" for r, c, _, n in sorted(named)]
        captions.append(" , ".join(words) + " .")
    pixels = images.clip(0, 255).astype(np.uint8)
    return Scenes(np.repeat(pixels[..., None], 3, -1), captions, patches)


def make_processor() -> LlavaProcessor:
    """A tokenizer with a token a word, and images of the tower's size."""
    words = models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>")
    plain = Tokenizer(words)
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<end>",
        padding_side="left",
        additional_special_tokens=["<image>"],
    )
    size = {"height": SIZE, "width": SIZE}
    images = SiglipImageProcessor(size=size, do_resize=False)
    return LlavaProcessor(images, tokenizer, PATCH, "full", image_token="<image>")


def make_model() -> LlavaForConditionalGeneration:
    """A SigLIP tower, a projector and a Llama, with random weights."""
    shared: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH}
    shared |= {"num_hidden_layers": LAYERS, "num_attention_heads": 4}
    vision = shared | {"model_type": "siglip_vision_model", "image_size": SIZE, "patch_size": PATCH}
    vision |= {"vision_use_head": False}
    text = shared | {"model_type": "llama", "vocab_size": len(WORDS), "pad_token_id": 0}
    text |= {"max_position_embeddings": 512, "num_key_value_heads": 4, "eos_token_id": 2}
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=WORDS.index("<image>"),
        image_seq_length=GRID**2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 2
    return model


class Inputs:
    """What a processor makes of scenes, for a model that is trained on them; made once."""

    def __init__(self, scenes: Scenes, processor: LlavaProcessor, device: torch.device):
        examples = scenes.examples(range(len(scenes.captions)))
        texts, images = ([e[name] for e in examples] for name in ("text", "images"))
        made = processor(text=texts, images=images, padding=True, return_tensors="pt")
        self.fields = {name: value.to(device) for name, value in made.items()}
        self.patches = scenes.patches.to(device)

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        """The fields of some rows, with labels for the caption."""
        fields = {name: value[rows] for name, value in self.fields.items()}
        ids = fields["input_ids"]
        question = WORDS.index("?")
        is_answer = (ids == question).cumsum(1).bool() & (ids != question)
        return fields | {"labels": ids.masked_fill(~is_answer, -100)}


def train_model(model: Any, inputs: Inputs, tower_steps: int, steps: int, batch: int = 32) -> None:
    """Trains the tower to name the garment at each patch, and then all of it on captions."""
    tower, device = model.model.vision_tower, model.device
    head = nn.Linear(WIDTH, len(NAMES) + 1).to(device)
    count = len(inputs.patches)

    def of_patches(rows: Tensor) -> Tensor:
        states = tower(inputs.fields["pixel_values"][rows]).last_hidden_state
        weight = torch.tensor([0.3] + [1.0] * len(NAMES), device=device)
        logits = head(states).flatten(0, 1)
        return F.cross_entropy(logits, inputs.patches[rows].flatten(), weight)

    def of_captions(rows: Tensor) -> Tensor:
        return model(**inputs.batch(rows)).loss

    stages = [
        (of_patches, [*tower.parameters(), *head.parameters()], tower_steps),
        (of_captions, [*model.parameters()], steps),
    ]
    for loss_of, parameters, total in stages:
        optimizer = torch.optim.AdamW(parameters, 1e-3, weight_decay=0.01)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total, pct_start=0.1)
        model.train()
        for step in range(total):
            loss = loss_of(torch.randint(count, (batch,)))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            rate.step()
            if (step + 1) % 50 == 0:
                print(f"  {loss_of.__name__} {step + 1}: {loss.item():.3f}", flush=True)
    model.eval()
