"""What a host with learned tokens says of its inside is right, or refused by the block."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from tiny import HF, TIMM
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    VideoMAEConfig,
    VideoMAEModel,
    ViTConfig,
    ViTModel,
    VivitConfig,
    VivitModel,
)

from tokenlearner import attention_maps, calibrate, insert, remove
from tokenlearner.models.hosts import find_host

IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
CLIPS = torch.rand(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TRANSFORMERS: dict[str, tuple[Callable[[], Any], torch.Tensor]] = {
    "vit": (lambda: ViTModel(ViTConfig(**HF)), IMAGES),
    "dinov2": (lambda: Dinov2Model(Dinov2Config(**HF)), IMAGES),
    "clip": (lambda: CLIPVisionModel(CLIPVisionConfig(**HF)), IMAGES),
    "videomae": (
        lambda: VideoMAEModel(VideoMAEConfig(**HF, num_frames=4, tubelet_size=2)),
        CLIPS,
    ),
    "vivit": (
        lambda: VivitModel(VivitConfig(**HF, num_frames=4, tubelet_size=[2, 4, 4])),
        CLIPS,
    ),
}


def timms(**options: Any) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(**TIMM, **options).eval()


# --- feature maps and hidden states ------------------------------------------------------------


@pytest.mark.parametrize("k", [4, 5, 8])  # a square, what no grid fits, and another grid
@pytest.mark.parametrize(
    "ask",
    [
        lambda m: m.forward_intermediates(IMAGES, indices=[0, 2], intermediates_only=True),
        lambda m: m.forward_intermediates(IMAGES),
        lambda m: m.get_intermediate_layers(IMAGES, n=[1], reshape=True),
    ],
)
def test_maps_of_blocks_without_a_grid_are_refused(ask: Callable[[Any], Any], k: int) -> None:
    vit = insert(timms(), k, at=1)
    with pytest.raises(ValueError, match="from block 1 on"):
        ask(vit)
    tokens = vit.forward_intermediates(IMAGES, output_fmt="NLC", intermediates_only=True)
    assert [y.shape[1] for y in tokens] == [16, k, k]
    [grid] = vit.forward_intermediates(IMAGES, indices=[0], intermediates_only=True)
    remove(vit)
    assert torch.equal(ask_plain(vit), grid)


def ask_plain(vit: Any) -> torch.Tensor:
    assert len(vit.forward_intermediates(IMAGES, intermediates_only=True)) == 3  # not refused
    return vit.forward_intermediates(IMAGES, indices=[0], intermediates_only=True)[0]


@pytest.mark.parametrize(
    "how",
    [
        *({"at": 0}, {"at": 1}),
        *({"at": 1, "fuse": True}, {"at": 2, "overlap": 2}),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_hidden_states_are_what_runs_between_blocks(name: str, how: dict[str, Any]) -> None:
    make, images = TRANSFORMERS[name]
    model = make().eval()
    plain = [h.shape[1] for h in model(images, output_hidden_states=True).hidden_states]
    insert(model, 4, **how)
    stream: list[Any] = []
    for block in find_host(model).blocks:
        block.register_forward_pre_hook(lambda _, args: stream.append(args[0]))
    states = model(images, output_hidden_states=True).hidden_states
    assert all(torch.equal(*pair) for pair in zip(states, stream, strict=False))
    assert not how.get("fuse") or [h.shape[1] for h in states] == plain


# --- attributes, copies of tools ----------------------------------------------------------------


def test_attributes_of_a_wrapped_block_are_the_blocks() -> None:
    vit: Any = insert(timms(), 4, at=1)
    inner = vit.blocks[1].block
    assert vit.blocks[1].norm1 is inner.norm1
    vit.blocks[1].ls1 = nn.Identity()
    assert isinstance(inner.ls1, nn.Identity)
    assert "ls1" not in dict(vit.blocks[1].named_children())
    vit.blocks[1].note = 1  # neither has it
    assert not hasattr(inner, "note")
    with pytest.raises(AttributeError, match="nothing"):
        vit.blocks[1].nothing  # noqa: B018


@pytest.mark.parametrize(
    ("num_tokens", "at"),
    [(np.int64(8), np.int64(1)), (8, np.float32(0.5)), (np.array([8, 4]), np.array([1, 2]))],
)
def test_numbers_of_numpy_are_numbers(num_tokens: Any, at: Any) -> None:
    assert insert(timms(), num_tokens, at=at)(IMAGES).shape == (2, 5)


# --- dtypes and devices --------------------------------------------------------------------------


class WideNorm(nn.LayerNorm):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.float()).to(input.dtype)


def test_learners_have_the_dtype_of_the_stream() -> None:
    vit = timms(norm_layer=WideNorm).bfloat16()
    for module in vit.modules():
        if isinstance(module, nn.LayerNorm):
            module.float()
    assert insert(vit, 4, at=1)(IMAGES.bfloat16()).dtype == torch.bfloat16


def test_a_host_of_integer_weights_gets_learners_of_floats() -> None:
    model = ViTModel(ViTConfig(**HF)).eval()
    attention: Any = find_host(model).blocks[1].attention
    layer = next(m for m in attention.modules() if isinstance(m, nn.Linear))
    layer.weight = nn.Parameter(torch.zeros(16, 16, dtype=torch.int8), requires_grad=False)
    insert(model, 4, at=1)
    block: Any = find_host(model).blocks[1]
    assert {p.dtype for p in block.learner.parameters()} == {torch.float32}


def test_learners_of_an_offloaded_host_are_where_it_runs() -> None:
    vit = timms()
    expected = vit(IMAGES)
    cpu_offload(vit, execution_device=torch.device("cpu"))
    assert {p.device.type for p in vit.blocks[1].parameters()} == {"meta"}
    insert(vit, 4, at=1)
    assert {p.device.type for p in vit.blocks[1].learner.parameters()} == {"cpu"}
    assert attention_maps(vit, IMAGES)[1].isfinite().all()
    torch.testing.assert_close(remove(vit)(IMAGES), expected)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inserting_and_calibrating_do_not_need_gradients_around_them(context: Any) -> None:
    vit = timms()
    with context():
        insert(vit, 4, at=1)
        done = calibrate(vit, torch.rand(8, 3, 16, 16), steps=5)
    assert done.error_after < done.error_before
    vit(IMAGES).sum().backward()  # its parameters can still be trained


def test_half_precision_is_calibrated_by_float32_copies() -> None:
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        vit = insert(timms(), 4, at=1).to(dtype)
        images = torch.rand(48, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        errors[dtype] = calibrate(vit, images.to(dtype), steps=40).error_after
    assert errors[torch.bfloat16] == pytest.approx(errors[torch.float32], rel=0.15)


def test_what_is_set_aside_is_not_trained_until_the_learners_are_removed() -> None:
    """Processes that train together wait for the gradient of every parameter that is trained."""
    beit: Any = Beit(**TIMM, use_rel_pos_bias=True)
    insert(beit, 4, at=1)
    beit(IMAGES).sum().backward()
    assert [n for n, p in beit.named_parameters() if p.requires_grad and p.grad is None] == []
    assert all(p.requires_grad for p in remove(beit).parameters())


# --- threads and compilers -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("way", ["compile", "torch.compile"])
def test_a_compiled_model_that_has_run_has_maps_and_can_be_calibrated(way: str) -> None:
    torch._dynamo.reset()
    vit: Any = insert(timms(), 4, at=1)
    expected = attention_maps(vit, IMAGES)[1]
    if way == "compile":
        vit.compile(backend="eager")
    else:
        vit = torch.compile(vit, backend="eager")
    with torch.no_grad():
        vit(IMAGES)
    torch.testing.assert_close(attention_maps(vit, IMAGES)[1], expected)
    assert calibrate(vit, torch.rand(8, 3, 16, 16), steps=2).steps == 2


def test_two_threads_have_each_the_maps_of_their_own_images() -> None:
    vit = insert(timms(), 4, at=1)
    images = [IMAGES, IMAGES + 1]
    expected = [attention_maps(vit, x)[1] for x in images]
    start, wrong = threading.Barrier(2), list[int]()

    def ask(number: int) -> None:
        start.wait()
        for _ in range(40):
            maps = attention_maps(vit, images[number])[1]
            wrong.extend([number] * (not torch.allclose(maps, expected[number], atol=1e-6)))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert torch._dynamo.eval_frame._stance.stance == "default"  # one for all threads
