"""Tools of other libraries give a model's plain numbers, or are refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import timm
import torch
import torchvision
from peft import LoraConfig, get_peft_model
from PIL import Image
from tiny import inputs_of
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torchvision.models.feature_extraction import create_feature_extractor
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)
from transformers.models.timm_wrapper import TimmWrapperConfig, TimmWrapperForImageClassification

from tokenlearner import (
    attention_maps,
    calibrate,
    create_model,
    insert,
    remove,
    save_model,
)
from tokenlearner.deploy.quantization import int8_products_are_exact
from tokenlearner.evaluation.flops import count_macs
from tokenlearner.layers import FusedBlock, PositionFreeBlock, ReducedBlock
from tokenlearner.layers.token_learner import LEARNERS
from tokenlearner.models.hosts import find_host

SIZE = {"img_size": 32, "patch_size": 8, "depth": 3}
TINY = {"image_size": 32, "patch_size": 8, "hidden_size": 24, "intermediate_size": 48}
TINY |= {"num_hidden_layers": 2, "num_attention_heads": 2}
TIMM = {"architecture": "vit_tiny_patch16_224", "model_args": SIZE}
LEAVES = {"tracer_kwargs": {"leaf_modules": [ReducedBlock, FusedBlock, PositionFreeBlock]}}


def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def reduced(learner: str = "v11", fuse: bool = True, embed_dim: int = 264) -> nn.Module:
    torch.manual_seed(0)
    sizes = {**SIZE, "embed_dim": embed_dim}
    vit = timm.create_model("vit_tiny_patch16_224", **sizes, num_classes=5)
    insert(vit, 4, at=1, learner=learner, fuse=fuse)
    for name, parameter in vit.named_parameters():
        if "fuser.mix.weight" in name:
            nn.init.normal_(parameter)
    return vit.eval()


def assert_same(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def offload(model: nn.Module, folder: Path) -> None:
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def dispatch(model: nn.Module, folder: Path) -> None:
    places = {name: "cpu" for name, _ in model.named_children() if name != "blocks"}
    parts = {"blocks.0": "cpu", "blocks.1.learner": "disk", "blocks.1.fuser": "disk"}
    blocks = {"blocks.1.block": "cpu", "blocks.2": "disk"}
    places = {"cls_token": "cpu", "pos_embed": "cpu", **places, **parts, **blocks}
    accelerate.dispatch_model(
        model, places, main_device="cpu", offload_dir=folder, force_hooks=True
    )


@pytest.mark.filterwarnings("ignore:The following device_map keys")
@pytest.mark.parametrize("place", [offload, dispatch])
@pytest.mark.parametrize("learner", ["v11", "v1", "grouped", "grouped-linear"])
@torch.no_grad()
def test_accelerate_keeps_weights_elsewhere(
    place: Callable[..., None], learner: str, tmp_path: Path
) -> None:
    model = reduced(learner)
    expected = model(images())
    place(model, tmp_path)
    assert next(model.get_submodule("blocks.2").parameters()).is_meta
    assert_same(model(images()), expected)


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def learner_layers(model: nn.Module) -> list[nn.Module]:
    named = ((n, m) for n, m in model.named_modules() if "learner" in n or "fuser" in n)
    return [module for _, module in named if isinstance(module, nn.Linear | nn.Conv2d)]


@pytest.mark.parametrize("learner", LEARNERS)
def test_pruned_layers_count_as_pruned_while_they_learn(learner: str) -> None:
    model = reduced(learner)
    layers = learner_layers(model)
    for layer in layers:
        prune.random_unstructured(layer, "weight", amount=0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model(images()).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        got = model(images())
        for layer in layers:
            prune.remove(layer, "weight")
        assert_same(got, model(images()))


@pytest.mark.parametrize("learner", LEARNERS)
@torch.no_grad()
def test_parametrizations_count(learner: str) -> None:
    model = reduced(learner)
    expected = copy.deepcopy(model)
    for layer in learner_layers(expected):
        layer.get_parameter("weight").div_(2)
    for layer in learner_layers(model):
        parametrize.register_parametrization(layer, "weight", Half())
    assert_same(model(images()), expected(images()))


@pytest.mark.parametrize("fuse", [False, True])
@torch.no_grad()
def test_fx_takes_wrappers_as_leaves(fuse: bool) -> None:
    torch.manual_seed(0)
    sizes = {"num_layers": 3, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}
    vit = torchvision.models.VisionTransformer(image_size=32, patch_size=8, **sizes).eval()
    nn.init.normal_(vit.heads[-1].weight)
    insert(vit, 4, at=1, fuse=fuse)
    nodes = {"heads": "logits", "encoder.layers": "tokens"}
    with pytest.raises(ValueError, match="leaf_modules"):
        create_feature_extractor(vit, nodes)
    found = create_feature_extractor(vit, nodes, **LEAVES)(images())
    assert_same(found["logits"], vit(images()))
    assert found["tokens"].shape == (2, 17 if fuse else 5, 32)


@torch.no_grad()
def test_a_pipeline_of_transformers() -> None:
    model = insert(ViTForImageClassification(ViTConfig(**TINY, num_labels=5)).eval(), 4, at=1)
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    pixels = np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    classify: Any = pipeline("image-classification", model=model, image_processor=processor)
    scores = {row["label"]: row["score"] for row in classify(image, top_k=5)}
    logits = model(**processor(image, return_tensors="pt")).logits
    expected = logits.softmax(-1)[0].tolist()
    assert [scores[f"LABEL_{i}"] for i in range(5)] == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
def test_timm_in_transformers() -> None:
    torch.manual_seed(0)
    config = TimmWrapperConfig(**TIMM, num_labels=5)
    model = insert(TimmWrapperForImageClassification(config).eval(), 4, at=1)
    assert_same(model(images()).logits, model.timm_model(images()))
    with pytest.raises(ValueError, match="no grid"):
        model(images(), output_hidden_states=True)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
@pytest.mark.parametrize("width", [48, 264])
@pytest.mark.parametrize("learner", LEARNERS)
def test_adapters_of_peft_on_a_learners_layers_count_in_training_too(
    learner: str, width: int
) -> None:
    model = reduced(learner, fuse=False, embed_dim=width)
    layers = {n: m for n, m in model.named_modules() if m in learner_layers(model)}
    rank = max(getattr(layer, "groups", 1) for layer in layers.values())  # as PEFT asks for
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=rank, target_modules=[*layers]))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    expected = reduced(learner, fuse=False, embed_dim=width)
    for name, layer in adapted.base_model.model.named_modules():
        if name in layers and rank == 1:  # there is no such weight of a layer with groups
            effect = layer.get_delta_weight("default")
            with torch.no_grad():
                expected.get_submodule(name).get_parameter("weight").add_(effect)
    outputs = adapted.eval()(images())
    with torch.no_grad():
        assert_same(adapted(images()), outputs)
        if rank == 1:
            assert_same(expected(images()), outputs)
        assert not torch.allclose(model(images()), outputs, atol=1e-3)
    outputs.square().mean().backward()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.any() for p in trained)


QUANTIZED = ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", QUANTIZED)
def test_a_model_that_torchao_quantized_runs_and_is_neither_calibrated_nor_saved(
    name: str, tmp_path: Path
) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    model = create_model("vit_tiny_patch16_224", **SIZE, num_classes=5)
    plain = insert(copy.deepcopy(model), 4, at=1).eval()
    quantized = copy.deepcopy(plain)
    torchao.quantize_(quantized, getattr(torchao, name)())
    maps, expected = (attention_maps(each, images())[1] for each in (quantized, plain))
    with torch.no_grad():
        outputs, logits = quantized(images()), plain(images())
    assert (outputs.shape, maps.shape) == (logits.shape, expected.shape)
    if "WeightOnly" in name or int8_products_are_exact():  # else torch's own products overflow
        assert (outputs - logits).norm() < 0.1 * logits.norm()
        torch.testing.assert_close(maps, expected, rtol=0.1, atol=0.01)
    assert count_macs(quantized, images()) == count_macs(plain, images())
    with pytest.raises(ValueError, match="no plain tensor; save the model before"):
        save_model(quantized, tmp_path)
    with pytest.raises(ValueError, match="no plain tensor; calibrate the model before"):
        calibrate(quantized, images(), steps=1)
    assert remove(quantized)(images()).shape == (2, 5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_learners_in_front_of_blocks_without_gradients_are_not_calibrated() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    vit = timm.create_model("vit_tiny_patch16_224", **SIZE, num_classes=5).eval()
    torchao.quantize_(vit, torchao.Int8DynamicActivationInt8WeightConfig())
    with pytest.raises(ValueError, match="no gradient comes back"):
        calibrate(insert(vit, 4, at=1), images(), steps=1)


CLIP_SIZE = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "head_width": 16}
TEXT = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
TOWERS: dict[str, dict[str, Any]] = {
    "class token": CLIP_SIZE,
    "average": CLIP_SIZE | {"pool_type": "avg"},
    "attention pool": CLIP_SIZE
    | {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2},
    "timm": {"timm_model_name": "test_vit", "image_size": 160, "timm_pool": "token"},
}


def clip(name: str) -> Any:
    """A CLIP of open_clip, of random weights."""
    torch.manual_seed(0)
    model = pytest.importorskip("open_clip.model")
    return model.CLIP(embed_dim=16, vision_cfg=TOWERS[name], text_cfg=TEXT).eval()


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_towers_of_open_clip_run_on_tokens(name: str, whole: bool) -> None:
    model = clip(name)
    x, text = torch.randn(2, 3, *[model.visual.image_size[0]] * 2), torch.randint(1, 50, (2, 8))
    expected, given = model.encode_image(x), model if whole else model.visual
    insert(given, 4, at=1)
    block = find_host(given).blocks[1]
    tokens = inputs_of(block, lambda: model(x, text))
    kept = inputs_of(block.block, lambda: model(x, text))
    assert torch.equal(kept[:, 0], tokens[:, 0])
    assert_same(kept[:, 1:], block.learner(tokens[:, 1:]))
    grid = find_host(given).grid.grid_size
    assert attention_maps(given, x)[1].shape == (2, 4, *grid)
    with pytest.raises(ValueError, match="no grid"):
        model.visual.forward_intermediates(x)
    with pytest.raises(ValueError, match=r"save model\.state_dict"):
        save_model(given, "x")
    assert not torch.allclose(model.encode_image(x), expected, atol=1e-3)
    assert_same(remove(given) and model.encode_image(x), expected)
    insert(given, 4, at=1, overlap=1, elastic=True, active_tokens=3)
    block, last = find_host(given).blocks[:2]
    both = inputs_of(block.block, lambda: model(x, text))
    assert both.shape[1] == tokens.shape[1] + 3
    assert_same(inputs_of(last, lambda: model(x, text)), block.block(both)[:, :4])


def test_towers_of_open_clip_that_do_not_fit_are_refused() -> None:
    model = clip("class token")
    model.visual.patch_dropout = nn.Dropout()
    with pytest.raises(ValueError, match="V1's convolutions need all positions"):
        insert(model, 4, at=1, learner="v1")
    model.visual.transformer.resblocks[0].attn.batch_first = False
    with pytest.raises(ValueError, match="update open_clip_torch"):
        insert(model, 4, at=1)


SAVED = {
    "vit": (ViTForImageClassification, ViTConfig(**TINY)),
    "siglip": (SiglipVisionModel, SiglipVisionConfig(**TINY)),
    "clip": (CLIPModel, CLIPConfig(vision_config=TINY, text_config=TINY)),
    "timm": (TimmWrapperForImageClassification, TimmWrapperConfig(**TIMM, num_labels=5)),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n != "vit" else ()) for n in SAVED],
)
def test_a_plain_class_refuses_a_folder_with_learned_tokens(name: str, tmp_path: Path) -> None:
    plain, config = SAVED[name]

    class Reduced(plain):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            insert(self, 4, at=1)

    model = insert(plain(config), 4, at=1)
    for saved in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        saved.save_pretrained(tmp_path)
        for cls in (plain, AutoModel) if saved is model else (plain,):
            with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
                cls.from_pretrained(tmp_path)
    again, info = Reduced.from_pretrained(tmp_path, output_loading_info=True)
    assert [*info["missing_keys"], *info["unexpected_keys"]] == []
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)

    remove(model).save_pretrained(tmp_path)
    _, info = plain.from_pretrained(tmp_path, output_loading_info=True)
    assert [*info["missing_keys"], *info["unexpected_keys"]] == []


def test_a_classifier_whose_inside_got_tokens_is_refused_by_its_plain_class(tmp_path: Path) -> None:
    plain, config = SAVED["vit"]
    model: Any = plain(config)
    insert(model.vit, 4, at=1)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        plain.from_pretrained(tmp_path)
    remove(model.vit)
    model.save_pretrained(tmp_path)
    _, info = plain.from_pretrained(tmp_path, output_loading_info=True)
    assert [*info["missing_keys"], *info["unexpected_keys"]] == []
