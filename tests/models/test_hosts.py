"""Learned tokens in every family of models that `hosts.py` knows, and a reason for the others.

A family is a row in `FAMILIES`; all tests marked `each_family` then run on it. In this table every
plain host compiles as one graph and exports; `test_the_plain_host_...` holds that.
"""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.mlp_mixer import MlpMixer
from timm.models.vision_transformer import VisionTransformer
from tiny import HF, TIMM, check_compiled, drawn, inputs_of, torchvision_vit
from torch import Tensor, nn

from tokenlearner import attention_maps, create_model, insert, remove
from tokenlearner.layers.blocks import PositionFreeBlock, ReducedBlock
from tokenlearner.models.framevit import FrameViT
from tokenlearner.models.hosts import HOSTS, find_host
from tokenlearner.models.insertion import get_insertion, wrapped_blocks
from tokenlearner.models.mixer import TokenLearnerMixer
from tokenlearner.models.vivit import ViViT

K, AT, C = 3, 1, 16
TEXT = {
    "hidden_size": C,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": C,
    "vocab_size": 20,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "projection_dim": 8,
}


class Net(nn.Module):
    """Somebody's own model around a host."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = VisionTransformer(**TIMM | {"num_classes": 0})
        self.head = nn.Linear(C, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def images(h: int = 16, w: int = 16) -> Tensor:
    return torch.randn(2, 3, h, w)


@dataclass(frozen=True)
class Family:
    """A small host, and what is known of it.

    `sizes` is what a call needs for images of other sizes, None where the host takes none.
    `is_bare` means that the output is the tokens themselves.
    """

    build: Callable[[], nn.Module]
    prefix: int
    host: str = ""
    frames: int = 1
    sizes: dict[str, Any] | None = None
    is_bare: bool = False

    def model(self) -> nn.Module:
        """In evaluation mode, every parameter drawn at random, so that nothing is hidden by a 0."""
        return randomized(self.build().eval())

    def inputs(self, model: nn.Module) -> dict[str, Any]:
        if self.frames > 1 and isinstance(model, ViViT):
            return {"x": torch.randn(2, 3, 4, 16, 16)}
        if self.frames > 1:
            return {"pixel_values": torch.randn(2, 4, 3, 16, 16)}
        if isinstance(model, transformers.CLIPModel | transformers.SiglipModel):
            return {"pixel_values": images(), "input_ids": torch.tensor([[0, 5, 1], [0, 7, 1]])}
        is_hf = isinstance(model, transformers.PreTrainedModel)
        return {"pixel_values" if is_hf else "x": images()}


def hf(model: str, values: dict[str, Any] = HF, **more: Any) -> Any:
    """Builds a model of transformers; the part of its name in front says its config."""

    def build() -> nn.Module:
        config = getattr(transformers, re.split("Model|For|Backbone", model)[0] + "Config")
        return getattr(transformers, model)(config(**values, **more))

    return build


vit, eva, beit = partial(VisionTransformer, **TIMM), partial(Eva, **TIMM), partial(Beit, **TIMM)
rotary = partial(eva, use_rot_pos_emb=True)
dinov3 = partial(
    rotary, attn_type="rope", rope_type="dinov3", num_reg_tokens=4, use_abs_pos_emb=False
)
SCALED = {"init_values": 1e-5}  # LayerScale
WITHOUT_CLASS = {"class_token": False}
SHARED = {"use_shared_rel_pos_bias": True}
ANY: dict[str, Any] = {}
INTERPOLATE = {"interpolate_pos_encoding": True}
MLP = HF | {"mlp_ratio": 2}
FIVE = {"num_labels": 5}
TWO: dict[str, Any] = {"vision_config": HF | {"projection_dim": 8}, "text_config": TEXT}
FAMILIES: dict[str, Family] = {
    "timm_vit": Family(partial(vit, **SCALED), 1),
    "timm_vit_any_size": Family(partial(vit, dynamic_img_size=True), 1, sizes=ANY),
    "timm_deit": Family(partial(VisionTransformerDistilled, **TIMM), 2),
    "timm_deit3": Family(partial(vit, no_embed_class=True, **SCALED), 1),
    "timm_dinov2": Family(partial(vit, reg_tokens=4, no_embed_class=True, **SCALED), 5),
    "timm_siglip": Family(partial(vit, **WITHOUT_CLASS, global_pool="map"), 0),
    "timm_average": Family(partial(vit, **WITHOUT_CLASS, global_pool="avg"), 0),
    "eva": Family(partial(eva, qkv_fused=False), 1),
    "eva02": Family(partial(rotary, swiglu_mlp=True, scale_mlp=True), 1),
    "eva_any_size": Family(partial(rotary, dynamic_img_size=True), 1, sizes=ANY),
    "dinov3": Family(partial(dinov3, **SCALED), 5),
    "dinov3_any_size": Family(partial(dinov3, dynamic_img_size=True), 5, sizes=ANY),
    "rope_mixed": Family(partial(rotary, attn_type="rope", rope_type="mixed"), 1),
    "beit": Family(partial(beit, use_rel_pos_bias=True, use_abs_pos_emb=False, init_values=0.1), 1),
    "beit_shared": Family(partial(beit, **SHARED), 1),
    "beit_both": Family(partial(beit, **SHARED, use_rel_pos_bias=True), 1),
    "torchvision": Family(torchvision_vit, 1),
    "hf_vit": Family(hf("ViTModel"), 1, sizes=INTERPOLATE),
    "hf_vit_eager": Family(hf("ViTModel", attn_implementation="eager"), 1, sizes=INTERPOLATE),
    "hf_vit_classes": Family(hf("ViTForImageClassification", **FIVE), 1, "vit", sizes=INTERPOLATE),
    "hf_deit": Family(hf("DeiTModel"), 2, sizes=INTERPOLATE),
    "hf_deit_classes": Family(
        hf("DeiTForImageClassification", **FIVE), 2, "deit", sizes=INTERPOLATE
    ),
    "hf_deit_teacher": Family(hf("DeiTForImageClassificationWithTeacher", **FIVE), 2, "deit"),
    "hf_dinov2": Family(hf("Dinov2Model", MLP), 1, sizes=ANY),
    "hf_dinov2_classes": Family(
        hf("Dinov2ForImageClassification", MLP, **FIVE), 1, "dinov2", sizes=ANY
    ),
    "hf_dinov2_registers": Family(
        hf("Dinov2WithRegistersModel", MLP, num_register_tokens=3), 4, sizes=ANY
    ),
    "hf_dinov2_registers_classes": Family(
        hf("Dinov2WithRegistersForImageClassification", MLP), 5, "dinov2_with_registers", sizes=ANY
    ),
    "hf_siglip": Family(hf("SiglipVisionModel"), 0, sizes=INTERPOLATE),
    "hf_siglip_classes": Family(
        hf("SiglipForImageClassification", TWO, **FIVE), 0, "vision_model", sizes=INTERPOLATE
    ),
    "hf_siglip_text": Family(hf("SiglipModel", TWO), 0, "vision_model", sizes=INTERPOLATE),
    "hf_clip": Family(hf("CLIPVisionModel"), 1, sizes=INTERPOLATE),
    "hf_clip_projection": Family(
        hf("CLIPVisionModelWithProjection", projection_dim=8), 1, "vision_model", sizes=INTERPOLATE
    ),
    "hf_clip_classes": Family(hf("CLIPForImageClassification", TWO, **FIVE), 1, "vision_model"),
    "hf_clip_text": Family(
        hf("CLIPModel", TWO, projection_dim=8), 1, "vision_model", sizes=INTERPOLATE
    ),
    "hf_videomae": Family(hf("VideoMAEModel", num_frames=4), 0, frames=2, is_bare=True),
    "hf_videomae_classes": Family(
        hf("VideoMAEForVideoClassification", num_frames=4, **FIVE), 0, "videomae", frames=2
    ),
    "hf_vivit": Family(hf("VivitModel", num_frames=4, tubelet_size=[2, 4, 4]), 1, frames=2),
    "hf_vivit_classes": Family(
        hf("VivitForVideoClassification", num_frames=4, tubelet_size=[2, 4, 4], **FIVE),
        *(1, "vivit"),
        frames=2,
    ),
    "our_video": Family(lambda: ViViT(**TIMM, num_frames=4, tubelet_size=2), 0, frames=2),
    "nested": Family(Net, 1, "backbone"),
}
KINDS = (
    *("timm_vit", "timm_dinov2", "dinov3", "beit", "torchvision", "our_video"),
    *("hf_vit", "hf_dinov2_registers", "hf_siglip", "hf_clip", "hf_videomae", "hf_vivit"),
)
each_family = pytest.mark.parametrize("name", FAMILIES)
BARE = [name for name, family in FAMILIES.items() if not family.host]  # others hold one of them
each_bare = pytest.mark.parametrize("name", BARE)
one_of_each_kind = pytest.mark.parametrize("name", KINDS)
both_ways = pytest.mark.parametrize("fuse", [False, True], ids=["reduce", "fuse"])


each_family_both_ways = pytest.mark.parametrize(
    ("name", "fuse"), [*((n, False) for n in FAMILIES), *((n, True) for n in KINDS)]
)
each_bare_both_ways = pytest.mark.parametrize(
    ("name", "fuse"), [*((n, False) for n in BARE), *((n, True) for n in KINDS)]
)


def graphs(*quick: str) -> pytest.MarkDecorator:
    """One of each kind, those named in the default run too."""
    return pytest.mark.parametrize(
        "name", [pytest.param(n, marks=[] if n in quick else pytest.mark.slow) for n in KINDS]
    )


randomized = partial(drawn, std=0.2)


def inserted(name: str, fuse: bool = False, **more: Any) -> nn.Module:
    """A family's model with learned tokens; learners and fusers are drawn at random too."""
    return randomized(insert(FAMILIES[name].model(), K, AT, fuse=fuse, **more))


def run(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    out = model(**inputs)
    if isinstance(out, Tensor):
        return out
    parts = ("logits", "logits_per_image", "image_embeds", "pooler_output", "last_hidden_state")
    return next(out[part] for part in parts if out.get(part) is not None)


def bare(block: nn.Module) -> nn.Module:
    return block.block if isinstance(block, PositionFreeBlock) else block


# --- every family ------------------------------------------------------------------------------


@each_family
def test_a_host_is_found_with_what_insertion_needs(name: str) -> None:
    family, model = FAMILIES[name], FAMILIES[name].model()
    for with_tokens in (False, True):
        if with_tokens:
            insert(model, K, AT)
            with pytest.raises(ValueError, match=r"remove\(model\)"):
                insert(model, K)
        place = find_host(model)
        names = (family.host, f"{family.host}.vision_model".strip("."))  # transformers 4
        assert place.name in names
        found = (place.width, place.num_prefix_tokens, place.frames, len(place.blocks))
        assert found == (C, family.prefix, family.frames, 3)
        assert tuple(place.grid.grid_size) == (4, 4)


def test_every_row_has_a_family() -> None:
    hosts = {cls for f in FAMILIES.values() for cls in type(find_host(f.model()).host).__mro__}
    names = {f"{cls.__module__}.{cls.__qualname__}" for cls in hosts}
    other_version = {name for name in HOSTS if name.endswith(("VisionModel", "VisionTransformer"))}
    tested_as_tools = {name for name in HOSTS if name.startswith("open_clip.")}
    of_transformers = {name for name in other_version if "transformers." in name}
    assert set(HOSTS) - names <= of_transformers | tested_as_tools


@each_family_both_ways
@torch.no_grad()
def test_the_output_has_the_hosts_shape_but_other_numbers(fuse: bool, name: str) -> None:
    family, model = FAMILIES[name], FAMILIES[name].model()
    inputs = family.inputs(model)
    before = run(model, inputs)
    after = run(randomized_parts(insert(model, K, AT, fuse=fuse)), inputs)
    n = 2 * K if family.is_bare and not fuse else before.shape[1]
    assert after.shape == (before.shape[0], n, *before.shape[2:])
    assert after.isfinite().all()
    assert after.shape != before.shape or not torch.allclose(after, before, rtol=1e-5, atol=1e-5)


def randomized_parts(model: nn.Module) -> nn.Module:
    """The model with learners and fusers drawn at random, the host's parameters as they were."""
    for block in wrapped_blocks(model).values():
        for key, parameter in block.named_parameters():
            if key.startswith(("learner.", "fuser.")):
                nn.init.normal_(parameter, std=0.2)
    return model


@each_bare
@torch.no_grad()
def test_later_blocks_see_the_prefix_and_the_learned_tokens(name: str) -> None:
    family, model = FAMILIES[name], FAMILIES[name].model()
    inputs, tokens = family.inputs(model), {"num_tokens": [5, 2], "at": [1, 2]}
    insert(model, **tokens)
    blocks = [bare(block) for block in find_host(model).blocks]
    seen = [inputs_of(block, lambda: run(model, inputs)).shape[1] for block in blocks]
    assert seen == [family.prefix + family.frames * k for k in (16, 5, 2)]
    assert get_insertion(model) == tokens | {"learner": "v11", "fuse": False}


@each_bare_both_ways
@torch.no_grad()
def test_the_host_stays_its_own_and_remove_gives_it_back_bit_for_bit(fuse: bool, name: str) -> None:
    model = FAMILIES[name].model()
    inputs = FAMILIES[name].inputs(model)
    before, out = copy.deepcopy(model.state_dict()), run(model, inputs)
    parameters, names = dict(model.named_parameters()), [n for n, _ in model.named_modules()]
    in_front = inputs_of(find_host(model).blocks[AT], lambda: run(model, inputs))
    insert(model, K, AT, fuse=fuse)
    assert torch.equal(inputs_of(find_host(model).blocks[AT], lambda: run(model, inputs)), in_front)
    assert {id(p) for p in parameters.values()} <= {id(p) for p in model.parameters()}
    saved = {value.data_ptr() for value in model.state_dict().values()}
    assert {p.data_ptr() for p in model.parameters()} <= saved
    remove(model)
    after = model.state_dict()
    assert [n for n, _ in model.named_modules()] == names
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(parameters[key] is value for key, value in model.named_parameters())
    assert torch.equal(run(model, inputs), out)


def through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@one_of_each_kind
@both_ways
@torch.no_grad()
def test_a_copy_and_a_model_built_alike_give_the_same_and_share_nothing(
    fuse: bool, name: str
) -> None:
    model = inserted(name, fuse)
    inputs = FAMILIES[name].inputs(model)
    built = insert(FAMILIES[name].model(), **(get_insertion(model) or {}))
    built.load_state_dict(model.state_dict(), strict=True)
    copied = through_torch_save(model) if fuse else copy.deepcopy(model)
    expected, own = run(model, inputs), {p.data_ptr() for p in model.parameters()}
    for other in (built, copied):
        assert torch.equal(run(other, inputs), expected)
        assert not own & {p.data_ptr() for p in other.parameters()}
        assert get_insertion(remove(other)) is None


def switch_checkpointing_on(model: nn.Module) -> bool:
    """As each family does it; False for a family that cannot."""
    if isinstance(model, transformers.PreTrainedModel):
        enable = getattr(
            model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})
        return True
    switch = getattr(model, "set_grad_checkpointing", None)
    if switch is not None:
        switch()
    return switch is not None


@both_ways
@one_of_each_kind
def test_a_training_step_reaches_the_learners_and_checkpointing_changes_no_number(
    fuse: bool, name: str
) -> None:
    model = inserted(name, fuse).train()
    inputs, switched = FAMILIES[name].inputs(model), copy.deepcopy(model)
    out = run(model, inputs)
    out.square().sum().backward()
    for key, parameter in model.named_parameters():
        if ".learner." in key or ".fuser." in key:
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key
    first = wrapped_blocks(model)[AT].learner
    assert max(p.grad.abs().max() for p in first.parameters() if p.grad is not None) > 1e-8
    if not switch_checkpointing_on(switched):
        assert name == "torchvision"
        return
    again = run(switched, inputs)
    again.square().sum().backward()
    torch.testing.assert_close(again, out)
    for one, other in zip(switched.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize(
    ("name", "fuse"),
    [
        (n, fuse)
        for n in BARE
        for fuse in (False, True)
        if FAMILIES[n].sizes is not None and (n in KINDS or not fuse)
    ],
)
@torch.no_grad()
def test_images_of_any_size_run_where_the_host_takes_them(name: str, fuse: bool) -> None:
    model = inserted(name, fuse)
    inputs = FAMILIES[name].inputs(model)
    key = "x" if "x" in inputs else "pixel_values"
    shape = run(model, inputs).shape
    for h, w in [(24, 12), (8, 32)]:
        asked = inputs | {key: images(h, w)} | (FAMILIES[name].sizes or {})
        assert run(model, asked).shape == shape


@pytest.mark.parametrize(
    ("name", "image"),
    [
        *((n, None) for n in ("dinov3", "beit_both", "torchvision", "hf_vit", "hf_videomae")),
        *((n, (24, 12)) for n in ("eva_any_size", "hf_dinov2")),
    ],
)
def test_maps_have_the_grid_of_the_image(name: str, image: tuple[int, int] | None) -> None:
    family, model = FAMILIES[name], inserted(name)
    (x,) = family.inputs(model).values() if image is None else [images(*image)]
    frames, grid = (2,) if family.frames > 1 else (), (4, 4) if image is None else (6, 3)
    assert attention_maps(model, x)[AT].shape == (2, *frames, K, *grid)


# --- graphs ------------------------------------------------------------------------------------


def compiled(model: nn.Module, backend: str = "eager") -> Any:
    torch.compiler.reset()
    return torch.compile(model, fullgraph=True, backend=backend)


def exported(model: nn.Module, inputs: dict[str, Any], strict: bool) -> Any:
    return torch.export.export(model, (), inputs, strict=strict).module()


# transformers sets a variable of its own while dynamo traces it, and dynamo says so.
of_transformers = pytest.mark.filterwarnings(
    "ignore:While compiling, we found certain side effects"
)


@pytest.mark.slow
@graphs("dinov3")
def test_torch_compile_takes_the_whole_graph_for_any_batch(name: str) -> None:
    model = inserted(name)
    backend = "eager" if name == "dinov3" else "aot_eager"
    check_compiled(model, FAMILIES[name].inputs(model), backend)


@pytest.mark.slow
@one_of_each_kind
@torch.no_grad()
def test_torch_compile_takes_the_whole_graph_of_a_fused_model_and_lowers_it(name: str) -> None:
    model = inserted(name, fuse=True)
    inputs = FAMILIES[name].inputs(model)
    out = run(compiled(model, "aot_eager"), inputs)
    torch.testing.assert_close(out, run(model, inputs), rtol=1e-4, atol=1e-4)


@graphs("dinov3", "beit", "hf_vit")
@torch.no_grad()
def test_torch_export_gives_the_same(name: str) -> None:
    model = inserted(name)
    inputs = FAMILIES[name].inputs(model)
    program = exported(model, inputs, strict=False)
    torch.testing.assert_close(run(program, inputs), run(model, inputs), rtol=1e-4, atol=1e-4)


@of_transformers
@pytest.mark.slow
@one_of_each_kind
@torch.no_grad()
def test_strict_torch_export_of_a_fused_model_gives_the_same(name: str) -> None:
    model = inserted(name, fuse=True)
    inputs = FAMILIES[name].inputs(model)
    program = exported(model, inputs, strict=True)
    torch.testing.assert_close(run(program, inputs), run(model, inputs), rtol=1e-4, atol=1e-4)


@of_transformers
@pytest.mark.slow
@one_of_each_kind
@torch.no_grad()
def test_the_plain_host_compiles_and_exports(name: str) -> None:
    model = FAMILIES[name].model()
    inputs = FAMILIES[name].inputs(model)
    assert run(exported(model, inputs, strict=True), inputs).isfinite().all()
    assert run(compiled(model), inputs).isfinite().all()


# --- positions of later blocks -----------------------------------------------------------------


@pytest.mark.parametrize("fuse", [False, True], ids=["reduce", "fuse"])
@pytest.mark.parametrize("name", ["eva02", "dinov3", "rope_mixed"])
@torch.no_grad()
def test_blocks_on_tokens_are_not_rotated_and_those_before_are(name: str, fuse: bool) -> None:
    model = inserted(name, fuse)
    given: list[bool] = []
    for block in model.blocks:
        bare(block).attn.register_forward_pre_hook(
            lambda _, args, kwargs: given.append(kwargs.get("rope") is not None), with_kwargs=True
        )
    model(images())
    assert given == [True, False, False]


@pytest.mark.parametrize("name", ["beit", "beit_shared", "beit_both"])
@torch.no_grad()
def test_beits_blocks_on_tokens_have_no_bias(name: str) -> None:
    model = inserted(name)
    x, bias = torch.randn(2, 1 + K, C), torch.randn(1, 2, 17, 17)
    later = model.blocks[2]
    attention = later.block.attn
    assert attention.relative_position_bias_table is None
    plain = Beit(**TIMM, init_values=0.1 if name == "beit" else None).eval().blocks[2]
    plain.load_state_dict(later.block.state_dict())
    assert torch.equal(later(x, shared_rel_pos_bias=bias), plain(x))
    assert torch.equal(later(x, bias), plain(x))


def test_beits_table_has_a_name_of_its_own_while_tokens_are_learned() -> None:
    model = FAMILIES["beit"].model()
    tables = [block.attn.relative_position_bias_table for block in model.blocks]
    insert(model, K, AT)
    state = model.state_dict()
    for name, table in zip(["blocks.0.attn", "blocks.1", "blocks.2"], tables, strict=True):
        key = f"{name}.relative_position_bias_table"
        assert state[key].data_ptr() == table.data_ptr()
    assert [n for n in model.no_weight_decay() if "table" in n] != []
    remove(model)
    assert all(
        block.attn.relative_position_bias_table is table
        for block, table in zip(model.blocks, tables, strict=True)
    )


def test_only_hosts_whose_blocks_are_told_positions_have_later_blocks_wrapped() -> None:
    for name in ("timm_vit", "torchvision", "beit", "eva"):
        later = find_host(inserted(name)).blocks[2]
        assert isinstance(later, PositionFreeBlock) == (name in ("beit", "eva"))


# --- larger models -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hf_clip_text", "hf_siglip_text"])
@torch.no_grad()
def test_a_text_tower_is_left_alone(name: str) -> None:
    model = FAMILIES[name].model()
    text = {"input_ids": torch.tensor([[0, 5, 1]])}
    before = model.text_model(**text).last_hidden_state
    keys = set(model.text_model.state_dict())
    insert(model, K, AT)
    assert torch.equal(model.text_model(**text).last_hidden_state, before)
    assert set(model.text_model.state_dict()) == keys


def two_towers() -> nn.ModuleDict:
    return nn.ModuleDict({"left": FAMILIES["timm_vit"].model(), "right": FAMILIES["beit"].model()})


CALLS: list[Callable[[nn.Module], Any]] = [
    *(find_host, insert, remove),
    lambda model: insert(model, fuse=True),
]


@pytest.mark.parametrize("call", CALLS)
def test_of_several_hosts_none_is_guessed(call: Callable[[nn.Module], Any]) -> None:
    with pytest.raises(ValueError, match=r"left \(VisionTransformer\), right \(Beit\)"):
        call(two_towers())


def test_one_of_several_hosts_can_be_passed_and_one_that_is_used_twice_is_one() -> None:
    towers = two_towers()
    insert(towers["right"], K, AT)
    assert wrapped_blocks(towers["left"]) == {}
    assert list(wrapped_blocks(towers["right"])) == [AT]
    host = FAMILIES["timm_vit"].model()
    assert find_host(nn.Sequential(nn.Sequential(host), nn.Sequential(host))).host is host


# --- masks -------------------------------------------------------------------------------------


@both_ways
@pytest.mark.parametrize("name", ["eva02", "rope_mixed"])
def test_a_mask_over_positions_is_refused_by_timms_hosts(name: str, fuse: bool) -> None:
    with pytest.raises(ValueError, match="attn_mask"):
        inserted(name, fuse).forward_features(images(), attn_mask=torch.zeros(17, 17))  # type: ignore[operator]


@both_ways
@pytest.mark.parametrize("name", ["hf_vit", "hf_clip", "hf_siglip", "hf_videomae", "hf_vivit"])
def test_a_mask_over_positions_is_refused_by_transformers_hosts(name: str, fuse: bool) -> None:
    block, mask = find_host(inserted(name, fuse)).blocks[AT], torch.zeros(2, 1, 33, 33)
    with pytest.raises(ValueError, match="attention_mask"):
        block(torch.randn(2, 33, C), attention_mask=mask)
    if name in ("hf_clip", "hf_siglip"):  # which take it in its place too
        with pytest.raises(ValueError, match="attention_mask"):
            block(torch.randn(2, 33, C), mask)


# --- what is refused ---------------------------------------------------------------------------


def hf_swin() -> nn.Module:
    shape = {"depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
    return hf("SwinModel", {"image_size": 32, "patch_size": 4, "embed_dim": 12}, **shape)()


def timm_named(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        with torch.device("meta"):
            return timm.create_model(name)

    return build


WINDOWS = "attends in windows of the grid"
MIXES = "mixes tokens with weights whose size depends on the count of tokens"
REASONS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "timm_swin": (timm_named("swin_tiny_patch4_window7_224"), rf"SwinTransformer is .*{WINDOWS}"),
    "timm_hiera": (timm_named("hiera_tiny_224"), rf"Hiera is .*{WINDOWS}"),
    "timm_sam": (timm_named("samvit_base_patch16"), rf"VisionTransformerSAM is .*{WINDOWS}"),
    "timm_pvt": (timm_named("pvt_v2_b0"), r"PyramidVisionTransformerV2 is .*pools or convolves"),
    "torchvision_swin": (
        lambda: torchvision.models.swin_transformer.SwinTransformer(
            [4, 4], 8, [1, 1], [2, 2], [4, 4]
        ),
        rf"torchvision.*SwinTransformer is .*{WINDOWS}",
    ),
    "transformers_swin": (hf_swin, rf"transformers.*SwinModel is .*{WINDOWS}"),
    "timm_mixer": (
        lambda: MlpMixer(img_size=32, patch_size=8, embed_dim=24, num_blocks=1),
        rf"MlpMixer is .*{MIXES}; .*TokenLearnerMixer",
    ),
    "our_mixer": (
        lambda: TokenLearnerMixer(num_tokens=2, img_size=32, embed_dim=24, num_blocks=2),
        rf"TokenLearnerMixer is .*{MIXES}",
    ),
    "our_frames": (
        lambda: FrameViT(img_size=32, embed_dim=24, num_heads=2, depth=2),
        "FrameViT is .*learns tokens already",
    ),
    "our_temporal": (
        lambda: create_model("temporal_mini"),
        "TemporalTransformer is .*runs on learned tokens already",
    ),
    "timesformer": (
        hf("TimesformerForVideoClassification", num_frames=4),
        "TimesformerForVideo.* is .*over time and over the grid of a frame in turn.*take .* ViViT",
    ),
    "backbone": (hf("Dinov2Backbone", MLP), "Dinov2Backbone .*feature maps"),
    "backbone_registers": (
        hf("Dinov2WithRegistersBackbone", MLP),
        "Dinov2WithRegistersBackbone is .*feature maps",
    ),
    "compiled": (lambda: torch.compile(Net()), "OptimizedModule is .*insert into that model first"),
    "parallel": (lambda: nn.DataParallel(Net()), "DataParallel is .*insert into that model first"),
    "within": (lambda: nn.Sequential(hf_swin(), nn.Linear(3, 3)), rf"SwinModel is .*{WINDOWS}"),
    "unknown": (
        lambda: nn.Linear(3, 3),
        r"Linear .*, Beit of timm; .* of torchvision; .* of open_clip; ViTModel",
    ),
}


@pytest.mark.parametrize(("make", "message"), REASONS.values(), ids=REASONS)
def test_a_model_whose_blocks_cannot_run_on_tokens_is_refused_with_the_reason(
    make: Callable[[], nn.Module], message: str
) -> None:
    model = make()
    for call in CALLS:
        with pytest.raises(ValueError, match=message):
            call(model)


NEEDING: dict[str, Callable[[], nn.Module]] = {
    "FeatureGetterNet": lambda: timm.create_model(
        "vit_tiny_patch16_224", features_only=True, img_size=32, embed_dim=24, depth=4, num_heads=2
    ),
    "ViTForMaskedImageModeling": hf("ViTForMaskedImageModeling", encoder_stride=8),
    "DeiTForMaskedImageModeling": hf("DeiTForMaskedImageModeling", encoder_stride=8),
    "VideoMAEForPreTraining": hf("VideoMAEForPreTraining", num_frames=4),
}


@pytest.mark.parametrize(("kind", "make"), NEEDING.items(), ids=NEEDING)
def test_a_model_that_reads_positions_takes_fused_tokens_only(
    make: Callable[[], nn.Module], kind: str
) -> None:
    model = make()
    with pytest.raises(ValueError, match=f"{kind} .*fuse=True"):
        insert(model, K)
    assert get_insertion(model) is None
    assert get_insertion(insert(model, K, fuse=True)) is not None


@pytest.mark.parametrize("name", ["hf_vit_classes", "hf_videomae_classes", "beit", "torchvision"])
def test_more_tokens_than_an_image_has_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="num_tokens is 17"):
        insert(FAMILIES[name].model(), 17)


@pytest.mark.parametrize("name", ["hf_vit", "hf_clip_text", "hf_dinov2", "eva_any_size"])
def test_v1_needs_a_grid_that_is_told_where_images_have_any_size(name: str) -> None:
    model = FAMILIES[name].model()
    with pytest.raises(ValueError, match=r"grid=\(height, width\)"):
        insert(model, K, learner="v1")
    insert(model, K, AT, learner="v1", grid=(4, 4))
    assert run(model, FAMILIES[name].inputs(model)).isfinite().all()


@pytest.mark.parametrize("name", ["torchvision", "beit", "hf_videomae", "hf_vivit", "dinov3"])
def test_v1_learns_on_the_grid_of_hosts_with_one_size(name: str) -> None:
    model = inserted(name, learner="v1")
    block = find_host(model).blocks[AT]
    assert isinstance(block, ReducedBlock)
    assert block.learner_grid == (4, 4)
    assert run(model, FAMILIES[name].inputs(model)).isfinite().all()


def test_v1_is_refused_where_positions_are_dropped_and_v11_learns_from_the_rest() -> None:
    with pytest.raises(ValueError, match="patch_drop_rate"):
        insert(rotary(patch_drop_rate=0.5), K, learner="v1")
    model = insert(rotary(patch_drop_rate=0.5), K, AT).train()
    assert model(images()).shape == (2, 5)
