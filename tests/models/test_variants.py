"""Every named ViT and ViViT: its name tells the truth, it costs what it should, and it trains."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import timm
import torch
from tiny import check_compiled, randomized
from torch import Tensor, nn

from tokenlearner.evaluation.flops import count_macs
from tokenlearner.layers.blocks import FusedBlock, ReducedBlock
from tokenlearner.models import vit as vit
from tokenlearner.models import vivit as video
from tokenlearner.models.insertion import get_insertion, wrapped_blocks
from tokenlearner.models.registry import SIZES
from tokenlearner.models.vit import VARIANTS
from tokenlearner.models.vivit import VIDEOS

CATALOG = VARIANTS | VIDEOS
WIDTHS = {size: shape[0] for size, shape in SIZES.items()} | {"mini": 64}
HEADS = {size: shape[1] for size, shape in SIZES.items()} | {"mini": 2}
DEPTHS = {size: shape[2] for size, shape in SIZES.items()} | {"mini": 6}
SHALLOW = {"depth": 3, "at": 1}
each_name = pytest.mark.parametrize("name", CATALOG)


@cache
def on_meta(name: str) -> Any:
    """The whole model without numbers, to be looked at and counted."""
    with torch.device("meta"):
        return timm.create_model(name)


@cache
def macs(name: str) -> int:
    model = on_meta(name)
    chans, height, width = model.default_cfg["input_size"]
    frames = [model.num_frames] if name in VIDEOS else []
    return count_macs(model, torch.empty(1, chans, *frames, height, width, device="meta"))


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# --- names -------------------------------------------------------------------------------------

NAME = re.compile(
    r"(?P<kind>vit|vivit)_(?P<size>[a-z]+)_patch(?P<patch>\d+)(x(?P<tubelet>\d+))?"
    r"(_d(?P<depth>\d+))?(?P<gap>_gap)?(_tl(?P<tokens>\d+)at(?P<at>\d+))?(?P<fuser>_fuser)?"
    r"_(?P<resolution>\d+)"
)


def parts(name: str) -> dict[str, str | None]:
    match = NAME.fullmatch(name)
    assert match is not None
    return match.groupdict()


@each_name
def test_the_name_tells_size_and_depth(name: str) -> None:
    said, model = parts(name), on_meta(name)
    size = str(said["size"])
    assert model.embed_dim == WIDTHS[size]
    assert {b.num_heads for b in model.modules() if hasattr(b, "num_heads")} == {HEADS[size]}
    assert len(model.blocks) == int(said["depth"] or DEPTHS[size])
    assert said["depth"] is None or int(said["depth"]) != DEPTHS[size]


@each_name
def test_the_name_tells_patch_and_image(name: str) -> None:
    said, embed = parts(name), on_meta(name).patch_embed
    patch, resolution = int(str(said["patch"])), int(str(said["resolution"]))
    assert tuple(embed.patch_size) == (patch, patch)
    assert tuple(embed.img_size) == (resolution, resolution)
    assert tuple(embed.grid_size) == (resolution // patch, resolution // patch)
    assert embed.proj.weight.shape[-2:] == (patch, patch)


@each_name
def test_the_name_tells_a_video_models_tubelet(name: str) -> None:
    said, model = parts(name), on_meta(name)
    is_video = said["kind"] == "vivit"
    assert is_video == (said["tubelet"] is not None) == (type(model) is video.ViViT)
    if is_video:
        assert model.patch_embed.tubelet_size == int(str(said["tubelet"]))
        assert model.patch_embed.proj.kernel_size[0] == int(str(said["tubelet"]))


@each_name
def test_the_name_tells_tokens_place_and_fuser(name: str) -> None:
    said, found = parts(name), get_insertion(on_meta(name))
    if said["tokens"] is None:
        assert found is None
        assert said["fuser"] is None
    else:
        assert found is not None
        assert (found["num_tokens"], found["at"]) == (int(said["tokens"]), int(str(said["at"])))
        assert found["fuse"] == (said["fuser"] is not None)
        assert said["gap"] is None


@each_name
def test_the_wrapped_blocks_are_one_or_all_from_there_on(name: str) -> None:
    said, model = parts(name), on_meta(name)
    if said["tokens"] is None:
        assert not wrapped_blocks(model)
        return
    at, frames = int(str(said["at"])), 1 if said["kind"] == "vit" else model.patch_embed.frames
    expected = list(range(at, len(model.blocks))) if said["fuser"] else [at]
    assert list(wrapped_blocks(model)) == expected
    kind = FusedBlock if said["fuser"] else ReducedBlock
    assert {type(block) for block in wrapped_blocks(model).values()} == {kind}
    assert {block.frames for block in wrapped_blocks(model).values()} == {frames}


NOT_IN_THE_PAPER = re.compile(r"viv?i?t_(mini|tiny)_.*|vit_small_patch16_.*|vivit_(small|base)_.*")


@each_name
def test_v1_and_linear_gates_for_the_papers_rows_and_v11_for_ours(name: str) -> None:
    found = get_insertion(on_meta(name))
    if found is None:
        return
    shipped = name == "vit_base_patch16_tl16at9_224"
    assert found["learner"] == ("v11" if shipped or NOT_IN_THE_PAPER.fullmatch(name) else "v1")
    if found["fuse"]:
        assert found["fuser_bottleneck_dim"] == 0  # linear


@each_name
def test_importing_the_file_registers_the_name_with_timm(name: str) -> None:
    assert timm.is_model(name)
    assert timm.model_entrypoint(name) is getattr(video if name in VIDEOS else vit, name)
    assert not timm.models.is_model_pretrained(name)


@each_name
def test_timms_config_names_the_input_and_the_layers_of_the_model(name: str) -> None:
    model = on_meta(name)
    config = model.default_cfg
    assert config["input_size"] == (model.in_chans, *model.patch_embed.img_size)
    assert config["num_classes"] == model.num_classes == model.head.out_features
    assert model.get_submodule(config["first_conv"]) is model.patch_embed.proj
    assert model.get_submodule(config["classifier"]) is model.get_classifier()
    assert config["mean"] == config["std"] == (0.5,) * model.in_chans
    assert model.tokenlearner_config == {"name": name, "kwargs": {}}


@each_name
def test_there_are_no_prefix_tokens_and_the_positions_are_those_of_the_grid(name: str) -> None:
    model = on_meta(name)
    h, w = model.patch_embed.grid_size
    frames = model.patch_embed.frames if name in VIDEOS else 1
    assert model.num_prefix_tokens == 0
    assert model.pos_embed.shape == (1, frames * h * w, model.embed_dim)


@each_name
def test_layer_norms_and_gelus_have_the_official_numbers(name: str) -> None:
    modules = list(on_meta(name).modules())
    assert {m.eps for m in modules if isinstance(m, nn.LayerNorm)} == {1e-6}
    gelus = [m for m in modules if "gelu" in type(m).__name__.lower()]
    x = torch.linspace(-3, 3, 50)
    assert len(gelus) >= len(on_meta(name).blocks)
    assert all(torch.equal(m(x), nn.functional.gelu(x, approximate="tanh")) for m in gelus)


@each_name
def test_pretrained_weights_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"no pretrained weights for {name}; pass pretrained=Fal"):
        timm.create_model(name, pretrained=True)


# --- the paper's rows --------------------------------------------------------------------------

ROWS = {
    "table 1": [
        "vit_small_patch32_tl8at6_384",
        "vit_base_patch16_tl8at6_384",
        "vit_small_patch32_d22_tl8at11_384",
        "vit_base_patch32_d20_tl8at10_384",
        "vit_base_patch16_d21_tl8at10_384",
        "vit_base_patch16_d21_tl16at10_384",
    ],
    "table 2": [
        "vit_large_patch16_tl16at12_512",
        "vit_large_patch16_d35_tl16at12_512",
        "vit_large_patch16_d30_tl8at18_512",
        "vit_large_patch14_d35_tl16at18_512",
    ],
    "table 3": ["vit_large_patch10_d35_tl16at18_512", "vit_large_patch8_d35_tl16at18_512"],
    "table 4": [
        "vit_base_patch16_tl8at6_384",
        "vit_base_patch16_tl8at6_fuser_384",
        "vit_base_patch16_tl16at6_384",
        "vit_base_patch16_tl16at6_fuser_384",
        "vit_large_patch16_tl16at12_512",
        "vit_large_patch16_tl16at12_fuser_512",
        "vit_large_patch16_tl8at18_512",
        "vit_large_patch16_tl8at18_fuser_512",
        "vit_large_patch10_d35_tl16at18_512",
        "vit_large_patch10_d35_tl16at18_fuser_512",
    ],
    "tables 6 and 7": [
        "vivit_large_patch16x2_tl16at12_224",
        "vivit_large_patch16x2_d30_tl8at18_224",
        "vivit_large_patch14x2_d35_tl16at18_224",
        "vivit_large_patch10x2_d35_tl16at18_224",
    ],
    "table 8": [
        "vivit_large_patch16x2_tl16at12_224",
        "vivit_large_patch16x2_d30_tl8at18_224",
        "vivit_large_patch10x2_d35_tl16at18_224",
        "vivit_large_patch10x2_d35_tl16at18_fuser_224",
    ],
}


@pytest.mark.parametrize("table", ROWS)
def test_every_tokenlearner_row_of_the_papers_tables_has_a_name(table: str) -> None:
    assert set(ROWS[table]) <= set(CATALOG)


GMACS = {  # of matrix products, convolutions and attention alone, so a little below the printed
    "vit_small_patch32_gap_384": 3.419,
    "vit_base_patch16_gap_384": 55.378,
    "vit_large_patch16_gap_512": 361.584,
    "vit_small_patch32_tl8at6_384": 1.885,
    "vit_small_patch32_d22_tl8at11_384": 3.309,
    "vit_base_patch32_d20_tl8at10_384": 11.427,
    "vit_base_patch16_d21_tl8at10_384": 46.866,
    "vit_base_patch16_d21_tl16at10_384": 47.530,
    "vit_large_patch16_d35_tl16at12_512": 186.012,
    "vit_large_patch16_d30_tl8at18_512": 272.684,
    "vit_large_patch14_d35_tl16at18_512": 359.886,
    "vit_base_patch16_tl8at6_384": 28.236,
    "vit_base_patch16_tl8at6_fuser_384": 28.461,
    "vit_base_patch16_tl16at6_384": 28.616,
    "vit_base_patch16_tl16at6_fuser_384": 29.076,
    "vit_large_patch16_tl16at12_512": 183.792,
    "vit_large_patch16_tl16at12_fuser_512": 186.121,
    "vit_large_patch16_tl8at18_512": 272.080,
    "vit_large_patch16_tl8at18_fuser_512": 272.609,
    "vit_large_patch10_d35_tl16at18_512": 843.175,
    "vit_large_patch10_d35_tl16at18_fuser_512": 851.734,
    "vit_base_patch16_tl8at3_224": 4.978,
    "vit_base_patch16_tl8at6_224": 9.147,
    "vit_base_patch16_tl8at9_224": 13.315,
    "vit_base_patch16_tl16at3_224": 5.503,
    "vit_base_patch16_tl16at6_224": 9.501,
    "vivit_large_patch16x2_224": 1435.4,
    "vivit_large_patch16x2_320": 3956.1,
    "vivit_large_patch16x2_tl16at12_224": 760.9,
    "vivit_large_patch16x2_d30_tl8at18_224": 1097.7,
    "vivit_large_patch14x2_d35_tl16at18_224": 1608.9,
    "vivit_large_patch10x2_d35_tl16at18_224": 4027.8,
    "vivit_large_patch10x2_d35_tl16at18_fuser_224": 4053.3,
}


@pytest.mark.parametrize(
    ("name", "gmacs"),
    [
        pytest.param(*row, marks=[] if i % 9 == 0 else [pytest.mark.slow], id=row[0])
        for i, row in enumerate(GMACS.items())
    ],
)
def test_multiply_adds_are_those_of_the_papers_row(name: str, gmacs: float) -> None:
    assert macs(name) / 1e9 == pytest.approx(gmacs, rel=1e-3)


PRINTED = {  # gigaflops of the tables, which count element-wise work as well
    "vit_base_patch16_gap_384": 55.6,
    "vit_large_patch16_gap_512": 363.1,
    "vit_base_patch16_d21_tl16at10_384": 47.7,
    "vit_base_patch16_tl8at6_384": 28.3,
    "vit_base_patch16_tl8at6_fuser_384": 28.5,
    "vit_large_patch14_d35_tl16at18_512": 361.6,
    "vit_large_patch10_d35_tl16at18_512": 849.0,
    "vit_large_patch10_d35_tl16at18_fuser_512": 856.9,
    "vivit_large_patch16x2_224": 1446,
    "vivit_large_patch16x2_tl16at12_224": 766,
    "vivit_large_patch16x2_d30_tl8at18_224": 1105,
    "vivit_large_patch14x2_d35_tl16at18_224": 1621,
    "vivit_large_patch10x2_d35_tl16at18_224": 4076,
    "vivit_large_patch10x2_d35_tl16at18_fuser_224": 4100,
    "vit_base_patch16_tl16at9_224": 13.5,
}


@pytest.mark.parametrize(("name", "gflops"), PRINTED.items())
def test_multiply_adds_are_at_most_one_and_a_half_percent_below_what_is_printed(
    name: str, gflops: float
) -> None:
    assert 0.985 < macs(name) / 1e9 / gflops < 1


MILLIONS = {
    "vit_small_patch32_gap_384": 22.9,
    "vit_base_patch16_gap_384": 86.9,
    "vit_small_patch32_tl8at6_384": 22.9,
    "vit_base_patch16_tl8at6_384": 86.9,
    "vit_small_patch32_d22_tl8at11_384": 40.7,
    "vit_base_patch32_d20_tl8at10_384": 145.1,
    "vit_base_patch16_d21_tl8at10_384": 150.7,
    "vit_base_patch16_d21_tl16at10_384": 150.8,
}


@pytest.mark.parametrize(("name", "millions"), MILLIONS.items())
def test_there_are_as_many_parameters_as_in_table_1(name: str, millions: float) -> None:
    assert round(parameters(on_meta(name)) / 1e6, 1) == millions


JFT = {
    "vit_large_patch10_d35_tl16at18_224": 460.6,
    "vit_large_patch8_d35_tl16at18_512": 460.8,
}


@pytest.mark.parametrize(("name", "millions"), JFT.items())
def test_the_models_of_table_3_have_460_million_parameters_when_pretrained(
    name: str, millions: float
) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, img_size=224, num_classes=18_291)
    assert round(parameters(model) / 1e6, 1) == millions


# --- cost in closed form -----------------------------------------------------------------------


def block_macs(n: int, c: int) -> int:
    return 12 * n * c * c + 2 * n * n * c


def learner_macs(learner: str, n: int, c: int, k: int) -> int:
    convolutions = 9 * n * c * k + 27 * n * k * k
    return (convolutions if learner == "v1" else 64 * n * c + 64 * n * k) + n * k * c


def fuser_macs(hidden: int | None, n: int, c: int, k: int) -> int:
    gates = n * c * k if hidden is None else hidden * n * c + hidden * n * k
    return k * k * c + gates + n * k * c


def model_macs(config: dict[str, Any]) -> int:
    c, patch, depth = config["embed_dim"], config["patch_size"], config["depth"]
    tubelet = config.get("tubelet_size", 1)
    t = config.get("num_frames", 1) // tubelet
    n = (config["img_size"] // patch) ** 2  # of a frame
    pixels = patch * patch * tubelet * config.get("in_chans", 3)
    ends = t * n * pixels * c + c * config.get("num_classes", 1000)
    k = config.get("num_tokens", 0)
    if not k:
        return ends + depth * block_macs(t * n, c)
    at, after = config["at"], depth - config["at"]
    blocks = at * block_macs(t * n, c) + after * block_macs(t * k, c)
    learner = t * learner_macs(config.get("learner", "v11"), n, c, k)
    if not config.get("fuse"):
        return ends + blocks + learner
    fuser = t * fuser_macs(config.get("fuser_bottleneck_dim", 64) or None, n, c, k)
    return ends + blocks + after * (learner + fuser)


@each_name
def test_counted_multiply_adds_are_those_of_the_closed_form(name: str) -> None:
    assert macs(name) == model_macs(CATALOG[name])


@pytest.mark.parametrize("name", ["vit_mini_patch4_tl8at3_28", "vivit_mini_patch8x2_tl4at3_32"])
@pytest.mark.parametrize("learner", ["v1", "v11"])
@pytest.mark.parametrize("hidden", [None, 64, 24])
def test_the_closed_form_holds_for_every_fuser(hidden: int | None, learner: str, name: str) -> None:
    kwargs: dict[str, Any] = {"fuse": True, "learner": learner, "fuser_bottleneck_dim": hidden}
    kwargs |= SHALLOW
    with torch.device("meta"):
        build = video.build_vivit if name in VIDEOS else vit.build_vit  # timm's would drop a None
        model = build(name, **kwargs)
        clip = (8,) if name in VIDEOS else ()
        images = torch.empty(1, model.in_chans, *clip, *model.patch_embed.img_size)
    assert count_macs(model, images) == model_macs(CATALOG[name] | kwargs)


# --- every variant, narrow ---------------------------------------------------------------------

# A softmax over positions takes no notice of the first, a LayerNorm over channels of the second.
WITHOUT_EFFECT = ("learner.attention_maps.3.bias", "fuser.mix.bias")


def _shape(name: str) -> tuple[Any, ...]:
    """What is left of a variant when it is narrow and shallow."""
    overridden = ("embed_dim", "num_heads", "depth", "at", "img_size", "num_frames", "num_classes")
    kept = {key: value for key, value in CATALOG[name].items() if key not in overridden}
    return (name in VIDEOS, *sorted(kept.items()))


# Of variants that differ in what `narrow` overrides, one stands for all.
each_shape = pytest.mark.parametrize("name", {_shape(name): name for name in CATALOG}.values())


def narrow(name: str, **kwargs: Any) -> Any:
    """A named model of little width for images of 5 x 4 patches and clips of 4 frames."""
    config = CATALOG[name]
    size = (5 * config["patch_size"], 4 * config["patch_size"])
    kwargs |= {"num_frames": 4} if name in VIDEOS else {}
    if not config.get("num_tokens"):
        kwargs.pop("at", None)
    return timm.create_model(
        name, embed_dim=16, num_heads=2, num_classes=7, img_size=size, **kwargs
    )


def make_images(model: Any, batch: int = 2) -> Tensor:
    clip = [model.num_frames] if isinstance(model, video.ViViT) else []
    return torch.randn(batch, model.in_chans, *clip, *model.patch_embed.img_size)


def check_every_parameter_is_trained(name: str, **kwargs: Any) -> None:
    model = randomized(narrow(name, **kwargs)).double().train()
    model(make_images(model).double()).square().sum().backward()
    largest = {n: p.grad.abs().max().item() for n, p in model.named_parameters()}
    without = {n for n in largest if n.endswith(WITHOUT_EFFECT)}
    assert max([largest[n] for n in without], default=0) < 1e-9
    assert min(value for n, value in largest.items() if n not in without) > 1e-9


@each_shape
def test_every_parameter_is_trained(name: str) -> None:
    check_every_parameter_is_trained(name, **SHALLOW)


@pytest.mark.slow
@each_name
def test_every_parameter_is_trained_at_full_depth(name: str) -> None:
    check_every_parameter_is_trained(name)


@each_shape
def test_gradient_checkpointing_changes_no_number(name: str) -> None:
    model = randomized(narrow(name, **SHALLOW)).train()
    images = make_images(model)
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        assert model.grad_checkpointing is enable
        model.zero_grad()
        out = model(images)
        out.square().sum().backward()
        results.append([out, *(p.grad for p in model.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@each_shape
@torch.no_grad()
def test_copies_and_a_strict_round_trip_give_the_same_numbers(name: str) -> None:
    model = randomized(narrow(name, **SHALLOW))
    images = make_images(model)
    expected = model(images)
    rebuilt = narrow(name, **SHALLOW).eval()
    assert not torch.equal(rebuilt(images), expected)
    rebuilt.load_state_dict(model.state_dict(), strict=True)
    for other in [rebuilt, *(copied(model) for copied in COPIES.values())]:
        assert torch.equal(other(images), expected)
        for block in wrapped_blocks(other).values():
            assert block._grid[0] is other.patch_embed


@each_shape
@torch.no_grad()
def test_bfloat16_is_close_to_float32(name: str) -> None:
    model = narrow(name, **SHALLOW).eval()
    nn.init.normal_(model.head.weight)
    for block in wrapped_blocks(model).values():
        if isinstance(block, FusedBlock):
            nn.init.uniform_(block.fuser.mix.weight)  # not near a sum of 0, which a norm inflates
    images = make_images(model)
    expected = model(images)
    assert expected.dtype == torch.float32
    out = model.bfloat16()(images.bfloat16())
    assert out.dtype == torch.bfloat16
    assert (out - expected).abs().max() < 0.05 * expected.abs().max()


COMPILED = [
    "vit_base_patch16_tl8at6_384",
    "vit_base_patch16_tl16at6_fuser_384",
    "vivit_large_patch10x2_d35_tl16at18_fuser_224",
]


@pytest.mark.parametrize("name", COMPILED)
def test_torch_compile_takes_the_whole_graph_for_any_batch(name: str) -> None:
    model = randomized(narrow(name, depth=2, at=1))
    check_compiled(model, {"x": make_images(model)})


@pytest.mark.slow
@each_name
def test_torch_compile_takes_the_whole_graph_of_every_variant(name: str) -> None:
    model = randomized(narrow(name))
    check_compiled(model, {"x": make_images(model)})


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED[1:])
def test_gradients_of_a_compiled_model_are_those_of_the_plain_one(name: str) -> None:
    model = randomized(narrow(name, **SHALLOW)).train()
    images, parameters = make_images(model), list(model.parameters())
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    found = torch.autograd.grad(compiled(images).square().sum(), parameters)
    expected = torch.autograd.grad(model(images).square().sum(), parameters)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
