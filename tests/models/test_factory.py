"""Names become models, models become files, and files the same models again."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from safetensors import safe_open
from timm.models import save_for_hf
from tiny import images_for, randomized
from torch import Tensor, nn

from tokenlearner import (
    TokenLearnerV11,
    create_model,
    list_models,
    load_model,
    remove,
    save_model,
)
from tokenlearner.layers import ReducedBlock
from tokenlearner.models.insertion import InsertionConfig, get_insertion, insert
from tokenlearner.models.preprocessing import get_classes

PLAIN, LEARNED = "vit_mini_patch4_28", "vit_mini_patch4_tl8at3_28"
MIXER, CLIPS = "mixer_mini_patch4_tl8at3_28", "vivit_mini_patch8x2_tl4at3_32"
FRAMES, FUSED = "framevit_mini_patch8_f6_tl4at3_32", "vit_base_patch16_tl8at6_fuser_384"
SHAPE: dict[str, Any] = {"embed_dim": 24, "depth": 3, "num_heads": 3}
FOREIGN: dict[str, Any] = SHAPE | {"img_size": 32, "patch_size": 8, "num_classes": 5}
TIMM, MIXER_FUSED = "vit_tiny_patch16_224", "mixer_s16_tl8at4_fuser_224"
FUSER = "fuser_bottleneck_dim"


def small(**kwargs: Any) -> nn.Module:
    return create_model(PLAIN, **(SHAPE | kwargs)).eval()


def write(path: Path, state: dict[str, Tensor], config: Any) -> Path:
    """A file such as save_model's, with any config."""
    header = {"tokenlearner": config if isinstance(config, str) else json.dumps(config)}
    safetensors.torch.save_file(state, str(path), metadata=header)
    return path


# --- names -------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_name_of_timm_becomes_a_model() -> None:
    model = create_model(TIMM, **FOREIGN)
    assert isinstance(model, timm.models.VisionTransformer)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    assert get_insertion(model) is None


HALF_WAY = {"num_tokens": 8, "at": 3, "learner": "v11", "fuse": False}
TOKENS: dict[str, Any] = {"num_tokens": 3, "at": 1, "learner": "v1", "fuse": True}
WIDE = {"embed_dim": 24}
ASKED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (PLAIN, TOKENS, TOKENS),
    (TIMM, TOKENS | SHAPE, TOKENS),
    (PLAIN, {"num_tokens": 4}, HALF_WAY | {"num_tokens": 4}),
    (LEARNED, {"num_tokens": 4}, HALF_WAY | {"num_tokens": 4}),
    (LEARNED, {"at": 2}, HALF_WAY | {"at": 2}),
    (LEARNED, {"learner": "v1"}, HALF_WAY | {"learner": "v1"}),
    (LEARNED, {"fuse": True}, HALF_WAY | {"fuse": True}),
    (MIXER, {"num_tokens": 5, "learner": "v1"}, HALF_WAY | {"num_tokens": 5, "learner": "v1"}),
    (MIXER, {"at": 0.9}, HALF_WAY | {"at": 5}),
    (MIXER, TOKENS | WIDE, TOKENS),
    (MIXER_FUSED, {"num_tokens": 4}, HALF_WAY | {"num_tokens": 4, "at": 4, "fuse": True}),
    (FRAMES, {"num_tokens": 3}, HALF_WAY | {"num_tokens": 3}),
    *(
        (name, TOKENS | shape | {FUSER: width}, TOKENS | {FUSER: width or 0})
        for name, shape in ((PLAIN, SHAPE), (TIMM, SHAPE), (MIXER, WIDE))
        for width in (None, 8)
    ),
]


@pytest.mark.parametrize(("name", "kwargs", "expected"), ASKED)
def test_tokens_are_those_that_are_asked_for_or_else_those_of_the_name(
    name: str, kwargs: dict[str, Any], expected: dict[str, Any]
) -> None:
    with torch.device("meta"):
        assert get_insertion(create_model(name, **kwargs)) == expected


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("vit_mini_patch4_29", {}, f"vit_mini_patch4_29.*{PLAIN}"),  # a close one
        ("vit_mini_patch4_tl8at2_28", {}, LEARNED),
        ("vit_tiny_patch16_225", {}, TIMM),
        ("!!", {}, "!!"),
        ("resnet10t", {"num_tokens": 8}, "ResNet"),
        (PLAIN, {"at": 2}, "at .*num_tokens"),  # how to learn no tokens
        (PLAIN, {"learner": "v1"}, "learner .*num_tokens"),
        (TIMM, {"fuse": True}, "fuse .*num_tokens"),
    ],
)
def test_a_name_that_is_unknown_or_takes_no_such_tokens_is_refused(
    name: str, kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(name, **kwargs)


def test_names_are_listed_by_pattern_and_timm_knows_them() -> None:
    assert list_models("*mini*_28") == [MIXER, PLAIN, LEARNED]
    assert list_models("vivit_mini*tl*") == [CLIPS]
    assert list_models("resnet*") == []
    assert all(timm.is_model(name) for name in list_models())


# --- there and back ----------------------------------------------------------------------------


def reset(model: Any, classes: int, *pooling: str) -> nn.Module:
    model.reset_classifier(classes, *pooling)
    return model


def resize(model: Any, *sizes: Any) -> nn.Module:
    model.set_input_size(*sizes)
    return model


TINY_TIMM: dict[str, Any] = {
    "in_chans": 1,
    "img_size": 28,
    "patch_size": 7,
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 2,
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": small,
    "tokens": lambda: small(num_tokens=3),
    "v1": lambda: small(num_tokens=3, learner="v1", at=1),
    "v1-mean": lambda: small(num_tokens=3, learner="v1-mean", at=0.9),
    "grouped": lambda: small(num_tokens=3, learner="grouped", at=0),
    "fused": lambda: small(num_tokens=3, fuse=True),
    "named": lambda: create_model(LEARNED),
    "named_without_tokens": lambda: remove(create_model(LEARNED)),
    "named_with_others": lambda: insert(remove(create_model(LEARNED)), 5, at=1, learner="v1"),
    "tokens_inserted_later": lambda: insert(small(), 3, fuse=True),
    "not_square": lambda: small(img_size=(20, 28), num_tokens=3, learner="v1"),
    "timm": lambda: create_model(TIMM, num_tokens=3, in_chans=1, **FOREIGN | {"img_size": 28}),
    "timm_beit": lambda: create_model("beit_base_patch16_224", num_tokens=3, **TINY_TIMM),
    "timm_dinov3": lambda: create_model("vit_small_patch16_dinov3", num_tokens=3, **TINY_TIMM),
    "two_places": lambda: insert(remove(create_model(LEARNED)), (5, 3), at=(1, 2)),
    "two_places_fused": lambda: insert(small(), (5, 3), at=(1, 2), fuse=True),
    "named_by_timm": lambda: timm.create_model(FUSED, **FOREIGN, at=1),
    "linear_fusers": lambda: small(num_tokens=3, fuse=True, fuser_bottleneck_dim=None),
    "pre_logits": lambda: small(num_tokens=3, representation_size=16),
    "mixer": lambda: create_model(MIXER, embed_dim=24),
    "mixer_with_others": lambda: create_model(
        MIXER, num_tokens=4, fuse=True, fuser_bottleneck_dim=None, learner="v1", embed_dim=24
    ),
    "clips": lambda: create_model(CLIPS),
    "frames": lambda: create_model(FRAMES, num_tokens=3, img_size=48),
    # changed after they were made
    "classes": lambda: reset(small(num_tokens=3), 3),
    "no_classes": lambda: reset(small(num_tokens=3, representation_size=16), 0),
    "pooling": lambda: reset(small(num_tokens=3), 3, "max"),
    "size": lambda: resize(small(num_tokens=3, learner="v1"), (20, 28)),
    "more_tokens_than_before": lambda: insert(resize(small(), 56), 100),
    "patches": lambda: resize(small(num_tokens=3), None, 7),
    "clips_size": lambda: reset(resize(create_model(CLIPS), 48), 3),
    "timm_without_tokens": lambda: create_model(TIMM, **FOREIGN),
    "timm_pooling": lambda: reset(create_model(TIMM, num_tokens=3, **FOREIGN), 7, "avg"),
    "timm_size": lambda: resize(create_model(TIMM, num_tokens=3, **FOREIGN), (48, 40)),
    "grid": lambda: insert(small(img_size=32, patch_size=8), 3, learner="v1", grid=(2, 8)),
    "resnet": lambda: reset(create_model("resnet10t", num_classes=3), 4, "max"),
}
# Models of timm with tokens of ours, of which timm would load the half, and tokens of no name.
NOT_FOR_TIMM = {"timm", "timm_beit", "timm_dinov3", "timm_pooling", "timm_size", "grid"}
NOT_FOR_TIMM |= {"two_places", "two_places_fused"}


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_a_loaded_model_gives_the_same_numbers_and_is_saved_to_the_same_bytes(
    kind: str, tmp_path: Path, device: torch.device
) -> None:
    model = randomized(MODELS[kind]())
    x = torch.randn(2, 3, 64, 64) if kind == "resnet" else images_for(model)
    expected = model(x)
    first = save_model(model.to(device), tmp_path / "first")
    source = f"local-dir:{tmp_path / 'first'}"
    loaded = load_model(first)
    second = save_model(loaded, tmp_path / "second")
    for file in ("model.safetensors", "config.json", "README.md"):
        assert (first.parent / file).read_bytes() == (second.parent / file).read_bytes()
    found = [loaded]
    if kind in NOT_FOR_TIMM:
        for kwargs in ({}, {"pretrained": True}, {"pretrained": True, "num_classes": 3}):
            with pytest.raises(RuntimeError, match=r"Unknown model \(.* for tokenlearner.load_mod"):
                timm.create_model(source, **kwargs)
    else:
        found.append(timm.create_model(source, pretrained=True).eval())
    for other in found:
        assert torch.equal(other(x), expected)
        assert get_insertion(other) == get_insertion(model)
        assert not other.training


@pytest.mark.parametrize(
    ("path", "file"),
    [
        ("run", "run/model.safetensors"),
        ("runs/one.v2", "runs/one.v2/model.safetensors"),
        ("best.safetensors", "best.safetensors"),
    ],
)
def test_a_path_is_a_folder_or_a_file(path: str, file: str, tmp_path: Path) -> None:
    assert save_model(small(), tmp_path / path) == tmp_path / file
    assert load_model(str(tmp_path / path)).num_classes == 10


def test_the_file_tells_how_the_model_was_built(tmp_path: Path) -> None:
    with safe_open(str(save_model(small(num_tokens=3), tmp_path)), framework="pt") as file:
        config = json.loads(file.metadata()["tokenlearner"])
    tokens = {"num_tokens": 3, "at": 1, "learner": "v11", "fuse": False}
    assert config.pop("pretrained_cfg")["num_classes"] == 10
    assert config == {"name": PLAIN, "kwargs": SHAPE | {"num_tokens": 3}, "insert": tokens}


def test_loading_does_not_ask_for_pretrained_weights(tmp_path: Path) -> None:
    model = small(num_tokens=3)
    model.tokenlearner_config["kwargs"]["pretrained"] = True  # ours would refuse it
    assert load_model(save_model(model, tmp_path)).num_classes == 10


@torch.no_grad()
def test_loading_does_not_need_the_checkpoint_that_the_model_started_from(tmp_path: Path) -> None:
    start = tmp_path / "start.pth"
    torch.save(create_model(TIMM, **FOREIGN).state_dict(), start)
    model = create_model(TIMM, checkpoint_path=str(start), num_tokens=3, **FOREIGN).eval()
    file, x = save_model(model, tmp_path), torch.randn(2, 3, 32, 32)
    start.unlink()
    assert torch.equal(load_model(file)(x), model(x))


# --- what cannot be saved ----------------------------------------------------------------------


def test_blocks_wrapped_by_hand_are_saved_once_a_config_describes_them(tmp_path: Path) -> None:
    model: Any = small()
    model.blocks[1] = ReducedBlock(model.blocks[1], TokenLearnerV11(24, 3), grid=model.patch_embed)
    model, x = randomized(model), images_for(model)
    with pytest.raises(ValueError, match="InsertionConfig"):
        save_model(model, tmp_path)
    model.tokenlearner_insertion = InsertionConfig(num_tokens=3, at=1)
    torch.testing.assert_close(load_model(save_model(model, tmp_path))(x), model(x))


def changed(model: Any, module: str = "", **attributes: Any) -> nn.Module:
    """The model after an assignment to it, or to a module in it."""
    for name, value in attributes.items():
        setattr(model.get_submodule(module), name, value)
    return model


UNSAVABLE: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "made elsewhere": (lambda: timm.create_model(TIMM, **FOREIGN), "timm made this model with"),
    "arguments without JSON": (lambda: small(norm_layer=nn.LayerNorm), r"norm_layer.* JSON"),
    "unknown pooling": (
        lambda: changed(small(), global_pool="median"),
        r"global_pool .*'avg' to 'median'",
    ),
    "pooling of no argument": (
        lambda: changed(create_model(FRAMES), global_pool="max"),
        r"global_pool .*None to 'max'",
    ),
    "mixer without tokens": (
        lambda: changed(create_model(MIXER), "blocks", **{"3": nn.Identity()}),
        r"blocks\.3\.",
    ),
    "new head": (  # not by reset_classifier, so num_classes does not tell
        lambda: changed(small(num_tokens=3), head=nn.Linear(24, 3)),
        "head.weight",
    ),
    "new layer": (lambda: changed(small(num_tokens=3), extra=nn.Linear(2, 2)), "extra.weight"),
    "no norm": (lambda: changed(small(num_tokens=3), norm=nn.Identity()), "norm.weight"),
}


@pytest.mark.parametrize(("make", "message"), UNSAVABLE.values(), ids=UNSAVABLE)
def test_a_model_that_could_not_be_loaded_is_refused_before_anything_is_written(
    make: Callable[[], nn.Module], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        save_model(make(), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


# --- what cannot be loaded ---------------------------------------------------------------------


@pytest.mark.parametrize("path", ["nowhere", "nowhere.safetensors"])
def test_a_file_that_is_not_there_is_named(path: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no file or folder .*nowhere"):
        load_model(tmp_path / path)


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"not a model", None], ids=str)
def test_a_file_that_is_no_safetensors_file_is_refused(
    content: bytes | None, tmp_path: Path
) -> None:
    file = save_model(small(), tmp_path)
    file.write_bytes(file.read_bytes()[:-100] if content is None else content)  # or cut short
    with pytest.raises(ValueError, match=r"model\.safetensors is not"):
        load_model(tmp_path)


def test_weights_without_a_config_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file(small().state_dict(), str(file))
    with pytest.raises(ValueError, match="no config"):
        load_model(file)


DIFFER, CONFIG = r"a\.safetensors .*differ", r"config in .*a\.safetensors"
BROKEN: dict[str, tuple[Any, str]] = {
    "another_width": ({"name": PLAIN, "kwargs": SHAPE | {"embed_dim": 48}}, DIFFER),
    "another_depth": ({"name": PLAIN, "kwargs": SHAPE | {"depth": 2}}, DIFFER),
    "too_many": ({"name": PLAIN, "kwargs": SHAPE, "insert": {"num_tokens": 3}}, DIFFER),
    "no_json": ("{", CONFIG),
    "no_mapping": ("[]", CONFIG),
    "empty": ({}, CONFIG),
    "no_name": ({"kwargs": SHAPE}, CONFIG),
    "unknown_name": ({"name": "vit_mini", "kwargs": {}}, CONFIG),
    "elsewhere": ({"name": "local-dir:/a", "kwargs": {}}, "there is no model 'local-dir:"),
    "unknown_argument": ({"name": PLAIN, "kwargs": {"wdith": 24}}, CONFIG),
    "unknown_insertion": ({"name": PLAIN, "kwargs": SHAPE, "insert": {"tokens": 3}}, CONFIG),
}


@pytest.mark.parametrize(("config", "message"), BROKEN.values(), ids=BROKEN)
def test_a_config_that_makes_no_model_or_another_than_the_weights_is_refused(
    config: Any, message: str, tmp_path: Path
) -> None:
    config = {"insert": None} | config if isinstance(config, dict) and config else config
    file = write(tmp_path / "a.safetensors", small().state_dict(), config)
    with pytest.raises(ValueError, match=message):
        load_model(file)


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("in_folder", [False, True], ids=["file", "folder"])
@pytest.mark.parametrize("dump", [pickle.dump, torch.save], ids=["pickle", "torch.save"])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "pytorch_model.bin", "a.pth", "a.pt", "a.CKPT"]
)
def test_a_pickle_is_refused_and_what_it_carries_does_not_run(
    name: str, dump: Callable[..., None], in_folder: bool, tmp_path: Path
) -> None:
    mark, file = tmp_path / "mark", tmp_path / "model" / name
    file.parent.mkdir()
    with file.open("wb") as opened:
        dump(Payload(mark), opened)
    message = (
        "model.safetensors is not" if name == "model.safetensors" else f"{name} .*read_weights"
    )
    with pytest.raises(ValueError, match=message):
        load_model(str(file.parent if in_folder else file))
    assert not mark.exists()
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists()  # so the payload would have shown


# --- models of timm's own -----------------------------------------------------------------------


@torch.no_grad()
def test_what_timm_wrote_is_loaded_and_saved_again(tmp_path: Path) -> None:
    model = randomized(timm.create_model(TIMM, num_classes=3, **SHAPE)).eval()
    said = {"model_config": {"label_names": ["a", "b", "c"]}, "model_args": SHAPE}
    save_for_hf(model, tmp_path / "timm", safe_serialization=True, **said)
    loaded, x = load_model(tmp_path / "timm"), images_for(model)
    assert torch.equal(loaded(x), model(x))
    assert get_classes(loaded) == ("a", "b", "c")
    again = load_model(save_model(insert(loaded, 2, 1), tmp_path / "ours"))
    assert torch.equal(again(x), loaded(x))
    with pytest.raises(ValueError, match="has weights but no config; give them to a model of"):
        load_model(tmp_path / "timm" / "model.safetensors")
    (tmp_path / "timm" / "config.json").write_text('{"architectures": ["ViTModel"]}')
    with pytest.raises(ValueError, match=r"no config; \S+config.json names no model of timm"):
        load_model(tmp_path / "timm")


@torch.no_grad()
@pytest.mark.parametrize("tokens", [0, 2])
def test_a_model_that_timm_made_is_saved_if_its_name_says_what_it_is(
    tokens: int, tmp_path: Path
) -> None:
    """Unlike weights, a number of heads leaves no trace but in the outputs."""
    for heads in (None, 6):
        given = {} if heads is None else {"num_heads": heads}
        model: Any = timm.create_model(TIMM, num_classes=3, img_size=32, **given).eval()
        if tokens:
            insert(model, tokens, 1)
        x = images_for(model)
        if heads is None:
            assert torch.equal(load_model(save_model(model, tmp_path / "a"))(x), model(x))
            continue
        with pytest.raises(ValueError, match="with arguments that it does not say"):
            save_model(model, tmp_path / "b")
        assert not (tmp_path / "b").exists()


@torch.no_grad()
def test_a_pickle_next_to_a_model_changes_nothing(tmp_path: Path) -> None:
    model = randomized(small())
    x = images_for(model)
    save_model(model, tmp_path)
    with (tmp_path / "pytorch_model.bin").open("wb") as opened:
        pickle.dump(Payload(tmp_path / "mark"), opened)
    assert torch.equal(load_model(tmp_path)(x), model(x))
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("key", ["checkpoint_path", "pretrained_cfg_overlay"])
def test_a_config_cannot_name_other_files_to_read(key: str, tmp_path: Path) -> None:
    mark, other = tmp_path / "mark", tmp_path / "other.pth"
    with other.open("wb") as opened:
        torch.save(Payload(mark), opened)
    source = str(other) if key == "checkpoint_path" else {"file": str(other)}
    kwargs = SHAPE | {key: source, "pretrained": True}
    config = {"name": PLAIN, "kwargs": kwargs, "insert": None}
    file = write(tmp_path / "a.safetensors", small().state_dict(), config)
    other.unlink()  # so that reading it would fail
    assert load_model(file).num_classes == 10
    assert not mark.exists()


@pytest.mark.parametrize("name", [PLAIN, TIMM])
def test_a_dtype_that_was_asked_for_is_kept(name: str, tmp_path: Path) -> None:
    model = create_model(name, dtype=torch.float64, **SHAPE)
    loaded = load_model(save_model(model, tmp_path))
    assert {p.dtype for p in loaded.parameters()} == {torch.float64}
