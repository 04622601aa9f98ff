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
from tiny import randomized
from torch import Tensor, nn

from tokenlearner import (
    TokenLearnerV11,
    create_model,
    list_models,
    load_model,
    remove,
    save_model,
)
from tokenlearner.checkpoints.readers import read_weights
from tokenlearner.layers import ReducedBlock
from tokenlearner.models.insertion import InsertionConfig, get_insertion, insert

PLAIN, LEARNED = "vit_mini_patch4_28", "vit_mini_patch4_tl8at3_28"
MIXER, CLIPS = "mixer_mini_patch4_tl8at3_28", "vivit_mini_patch8x2_tl4at3_32"
FRAMES, FUSED = "framevit_mini_patch8_f6_tl4at3_32", "vit_base_patch16_tl8at6_fuser_384"
SHAPE: dict[str, Any] = {"embed_dim": 24, "depth": 3, "num_heads": 3}
FOREIGN: dict[str, Any] = SHAPE | {"img_size": 32, "patch_size": 8, "num_classes": 5}
TIMM = "vit_tiny_patch16_224"


def images(*shape: int) -> Tensor:
    return torch.randn(2, *(shape or (1, 28, 28)))


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
    assert model(images(3, 32, 32)).shape == (2, 5)
    assert get_insertion(model) is None


@pytest.mark.parametrize("name", [PLAIN, TIMM])
def test_tokens_are_inserted_when_asked_for(name: str) -> None:
    tokens = {"num_tokens": 3, "at": 1, "learner": "v1", "fuse": True}
    assert get_insertion(create_model(name, **tokens, **SHAPE)) == tokens


def test_tokens_stand_half_way_unless_told_otherwise() -> None:
    model = create_model(PLAIN, num_tokens=4)
    assert get_insertion(model) == {"num_tokens": 4, "at": 3, "learner": "v11", "fuse": False}


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("vit_mini_patch4_29", PLAIN),
        ("vit_mini_patch4_tl8at2_28", LEARNED),
        ("vit_tiny_patch16_225", TIMM),
    ],
)
def test_an_unknown_name_is_refused_with_close_ones(name: str, close: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}.*{close}"):
        create_model(name)


def test_a_name_like_no_other_is_refused_with_where_to_look() -> None:
    with pytest.raises(ValueError, match="!!"):
        create_model("!!")


@pytest.mark.parametrize(
    "kwargs", [{"num_tokens": 4}, {"at": 2}, {"learner": "v1"}, {"fuse": True}], ids=str
)
def test_arguments_take_precedence_over_the_name(kwargs: dict[str, Any]) -> None:
    by_name = {"num_tokens": 8, "at": 3, "learner": "v11", "fuse": False}
    assert get_insertion(create_model(LEARNED, **kwargs)) == by_name | kwargs


@pytest.mark.parametrize("name", [PLAIN, TIMM])
@pytest.mark.parametrize("kwargs", [{"at": 2}, {"learner": "v1"}, {"fuse": True}], ids=str)
def test_how_to_learn_no_tokens_is_refused(kwargs: dict[str, Any], name: str) -> None:
    (key,) = kwargs
    with pytest.raises(ValueError, match=rf"{key} .*num_tokens"):
        create_model(name, **kwargs)


def test_tokens_in_a_model_that_cannot_take_them_are_refused() -> None:
    with pytest.raises(ValueError, match="ResNet"):
        create_model("resnet10t", num_tokens=8)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*mini*_28", [MIXER, PLAIN, LEARNED]),
        ("vivit_mini*tl*", [CLIPS]),
        ("resnet*", []),
    ],
)
def test_names_are_listed_by_pattern(pattern: str, names: list[str]) -> None:
    assert list_models(pattern) == names


def test_every_listed_name_is_one_that_timm_knows() -> None:
    assert all(timm.is_model(name) for name in list_models())


def test_a_mixer_is_built_with_the_tokens_that_are_asked_for() -> None:
    model = create_model(MIXER, num_tokens=5, learner="v1", embed_dim=24)
    assert get_insertion(model) == {"num_tokens": 5, "at": 3, "learner": "v1", "fuse": False}
    model = create_model(MIXER, num_tokens=5, at=1, fuse=True, embed_dim=24)
    assert get_insertion(model) == {"num_tokens": 5, "at": 1, "learner": "v11", "fuse": True}


def test_a_mixer_keeps_what_its_name_says_of_fusers() -> None:
    model = create_model("mixer_s32_tl8at4_224", num_tokens=4, num_blocks=2, at=1, embed_dim=24)
    assert get_insertion(model) == {"num_tokens": 4, "at": 1, "learner": "v11", "fuse": False}
    with torch.device("meta"):
        model = create_model("mixer_s16_tl8at4_fuser_224", num_tokens=4)
    assert get_insertion(model) == {"num_tokens": 4, "at": 4, "learner": "v11", "fuse": True}


def test_a_model_of_frames_is_built_with_the_tokens_that_are_asked_for() -> None:
    assert (get_insertion(create_model(FRAMES, num_tokens=3)) or {})["num_tokens"] == 3


@pytest.mark.parametrize("name", [PLAIN, TIMM, MIXER])
@pytest.mark.parametrize("width", [None, 8])
def test_the_width_of_the_fusers_goes_with_the_tokens(name: str, width: int | None) -> None:
    shape = {"embed_dim": 24} if name == MIXER else SHAPE
    model = create_model(name, num_tokens=3, fuse=True, fuser_bottleneck_dim=width, **shape)
    assert (get_insertion(model) or {})["fuser_bottleneck_dim"] == (width or 0)


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
    "sum": lambda: reset(small(num_tokens=3), 10, "sum"),
    "size": lambda: resize(small(num_tokens=3, learner="v1"), (20, 28)),
    "more_tokens_than_before": lambda: insert(resize(small(), 56), 100),
    "patches": lambda: resize(small(num_tokens=3), None, 7),
    "mixer_classes": lambda: reset(create_model(MIXER, embed_dim=24), 3, ""),
    "clips_size": lambda: reset(resize(create_model(CLIPS), 48), 3),
    "frames_classes": lambda: reset(create_model(FRAMES), 3),
    "timm_without_tokens": lambda: create_model(TIMM, **FOREIGN),
    "timm_pooling": lambda: reset(create_model(TIMM, num_tokens=3, **FOREIGN), 7, "avg"),
    "timm_size": lambda: resize(create_model(TIMM, num_tokens=3, **FOREIGN), (48, 40)),
    "resnet": lambda: reset(create_model("resnet10t", num_classes=3), 4, "max"),
}
SIZES = {
    "not_square": (1, 20, 28),
    "named_by_timm": (3, 32, 32),
    "clips": (3, 8, 32, 32),
    "frames": (3, 5, 48, 48),
    "size": (1, 20, 28),
    "more_tokens_than_before": (1, 56, 56),
    "clips_size": (3, 8, 48, 48),
    "frames_classes": (3, 6, 32, 32),
    "timm_without_tokens": (3, 32, 32),
    "timm_pooling": (3, 32, 32),
    "timm_size": (3, 48, 40),
    "resnet": (3, 64, 64),
}
each_model = pytest.mark.parametrize("kind", MODELS)


@each_model
@torch.no_grad()
def test_a_loaded_model_gives_the_same_numbers_to_the_bit(kind: str, tmp_path: Path) -> None:
    model, x = randomized(MODELS[kind]()), images(*SIZES.get(kind, ()))
    loaded = load_model(save_model(model, tmp_path))
    assert torch.equal(loaded(x), model(x))
    assert get_insertion(loaded) == get_insertion(model)
    assert not loaded.training


@each_model
def test_a_loaded_model_can_be_saved_again_to_the_same_bytes(kind: str, tmp_path: Path) -> None:
    first = save_model(MODELS[kind](), tmp_path / "first")
    second = save_model(load_model(first), tmp_path / "second")
    for file in ("model.safetensors", "config.json", "README.md"):
        assert (first.parent / file).read_bytes() == (second.parent / file).read_bytes()


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
    assert config == {"name": PLAIN, "kwargs": SHAPE | {"num_tokens": 3}, "insert": tokens}


def test_loading_does_not_ask_for_pretrained_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small(num_tokens=3)
    model.tokenlearner_config["kwargs"]["pretrained"] = True  # ours would refuse it
    assert load_model(save_model(model, tmp_path)).num_classes == 10


@torch.no_grad()
def test_loading_does_not_need_the_checkpoint_that_the_model_started_from(tmp_path: Path) -> None:
    start = tmp_path / "start.pth"
    torch.save(create_model(TIMM, **FOREIGN).state_dict(), start)
    model = create_model(TIMM, checkpoint_path=str(start), num_tokens=3, **FOREIGN).eval()
    file, x = save_model(model, tmp_path), images(3, 32, 32)
    start.unlink()
    assert torch.equal(load_model(file)(x), model(x))


# --- what cannot be saved ----------------------------------------------------------------------


def test_a_model_made_elsewhere_is_refused(tmp_path: Path) -> None:
    model = timm.create_model(TIMM, **FOREIGN)
    with pytest.raises(ValueError, match="VisionTransformer"):
        save_model(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_pooling_that_cannot_be_built_is_refused(tmp_path: Path) -> None:
    model = small()
    model.global_pool = "median"
    with pytest.raises(ValueError, match=r"global_pool .*'avg' to 'median'"):
        save_model(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_pooling_that_the_class_does_not_take_is_refused(tmp_path: Path) -> None:
    model = create_model(FRAMES)
    model.global_pool = "max"
    with pytest.raises(ValueError, match=r"global_pool .*None to 'max'"):
        save_model(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_tokens_that_a_mixer_was_not_built_with_are_refused(tmp_path: Path) -> None:
    model = create_model(MIXER, embed_dim=24)
    model.blocks[3] = model.blocks[3].block
    with pytest.raises(ValueError, match=r"blocks\.3\."):
        save_model(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_blocks_wrapped_by_hand_are_saved_once_a_config_describes_them(tmp_path: Path) -> None:
    model: Any = small()
    model.blocks[1] = ReducedBlock(model.blocks[1], TokenLearnerV11(24, 3), grid=model.patch_embed)
    model, x = randomized(model), images()
    with pytest.raises(ValueError, match="InsertionConfig"):
        save_model(model, tmp_path)
    model.tokenlearner_insertion = InsertionConfig(num_tokens=3, at=1)
    torch.testing.assert_close(load_model(save_model(model, tmp_path))(x), model(x))


def _new_head(model: nn.Module) -> None:
    model.head = nn.Linear(24, 3)  # not by reset_classifier, so num_classes does not tell


def _new_layer(model: nn.Module) -> None:
    model.extra = nn.Linear(2, 2)


def _without_norm(model: nn.Module) -> None:
    model.norm = nn.Identity()


@pytest.mark.parametrize(
    ("change", "key"),
    [(_new_head, "head.weight"), (_new_layer, "extra.weight"), (_without_norm, "norm.weight")],
)
def test_a_model_that_was_changed_is_refused_before_anything_is_written(
    change: Callable[[nn.Module], None], key: str, tmp_path: Path
) -> None:
    model = small(num_tokens=3)
    change(model)
    with pytest.raises(ValueError, match=key):
        save_model(model, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_arguments_that_json_has_no_form_for_are_refused(tmp_path: Path) -> None:
    model = small(norm_layer=nn.LayerNorm)
    with pytest.raises(ValueError, match=r"norm_layer.* JSON"):
        save_model(model, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@torch.no_grad()
def test_a_save_that_fails_midway_keeps_the_model_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = small(num_tokens=3), images()
    file = save_model(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(state: dict[str, Tensor], path: str, metadata: Any = None) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_model(small(num_tokens=2), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert torch.equal(load_model(file)(x), model(x))


# --- what cannot be loaded ---------------------------------------------------------------------


@pytest.mark.parametrize("path", ["nowhere", "nowhere.safetensors"])
def test_a_file_that_is_not_there_is_named(path: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere.*\.safetensors"):
        load_model(tmp_path / path)


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"not a model"], ids=str)
def test_a_file_that_is_no_safetensors_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        load_model(tmp_path)


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    file = save_model(small(), tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is not"):
        load_model(file)


def test_weights_without_a_config_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file(small().state_dict(), str(file))
    with pytest.raises(ValueError, match="no config"):
        load_model(file)


MISFITS = {
    "another_width": {"name": PLAIN, "kwargs": SHAPE | {"embed_dim": 48}, "insert": None},
    "another_depth": {"name": PLAIN, "kwargs": SHAPE | {"depth": 2}, "insert": None},
    "tokens_too_many": {"name": PLAIN, "kwargs": SHAPE, "insert": {"num_tokens": 3}},
}


@pytest.mark.parametrize("config", MISFITS.values(), ids=MISFITS)
def test_a_config_that_the_weights_do_not_fit_is_refused(config: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", small().state_dict(), config)
    with pytest.raises(ValueError, match=r"a\.safetensors .*differ"):
        load_model(file)


BROKEN = {
    "no_json": "{",
    "no_mapping": "[]",
    "empty": {},
    "no_name": {"kwargs": SHAPE, "insert": None},
    "unknown_name": {"name": "vit_mini", "kwargs": {}, "insert": None},
    "unknown_argument": {"name": PLAIN, "kwargs": {"wdith": 24}, "insert": None},
    "unknown_insertion": {"name": PLAIN, "kwargs": SHAPE, "insert": {"tokens": 3}},
}


@pytest.mark.parametrize("config", BROKEN.values(), ids=BROKEN)
def test_a_config_that_makes_no_model_is_refused(config: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", small().state_dict(), config)
    with pytest.raises(ValueError, match=r"config in .*a\.safetensors"):
        load_model(file)


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("dump", [pickle.dump, torch.save], ids=["pickle", "torch.save"])
def test_a_pickle_is_refused_and_what_it_carries_does_not_run(
    dump: Callable[..., None], tmp_path: Path
) -> None:
    mark, file = tmp_path / "mark", tmp_path / "model.safetensors"
    with file.open("wb") as opened:
        dump(Payload(mark), opened)
    with pytest.raises(ValueError, match=r"model\.safetensors is not"):
        load_model(tmp_path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists()  # so the payload would have shown


@pytest.mark.parametrize("name", ["pytorch_model.bin", "a.pth", "a.pt", "a.CKPT"])
@pytest.mark.parametrize("in_folder", [False, True], ids=["file", "folder"])
def test_a_file_that_only_unpickling_reads_is_not_opened(
    name: str, in_folder: bool, tmp_path: Path
) -> None:
    mark, file = tmp_path / "mark", tmp_path / "model" / name
    file.parent.mkdir()
    with file.open("wb") as opened:
        torch.save(Payload(mark), opened)
    with pytest.raises(ValueError, match=rf"{name} .*read_weights"):
        load_model(str(file.parent if in_folder else file))
    assert not mark.exists()


def test_weights_in_such_a_file_can_be_read_as_the_error_says(tmp_path: Path) -> None:
    source, model = randomized(small()), small()
    torch.save(source.state_dict(), tmp_path / "a.pth")
    model.load_state_dict(read_weights(tmp_path / "a.pth"))
    assert torch.equal(model.head.weight, source.head.weight)


@torch.no_grad()
def test_a_pickle_next_to_a_model_changes_nothing(tmp_path: Path) -> None:
    model, x = randomized(small()), images()
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


def test_a_config_cannot_name_a_model_elsewhere(tmp_path: Path) -> None:
    config = {"name": f"local-dir:{tmp_path}", "kwargs": {}, "insert": None}
    file = write(tmp_path / "a.safetensors", small().state_dict(), config)
    with pytest.raises(ValueError, match="there is no model 'local-dir:"):
        load_model(file)


@torch.no_grad()
def test_a_grid_that_was_passed_is_kept(tmp_path: Path) -> None:
    host, x = small(img_size=32, patch_size=8), images(1, 32, 32)
    model = randomized(insert(host, 3, learner="v1", grid=(2, 8)))
    assert torch.equal(load_model(save_model(model, tmp_path))(x), model(x))


@pytest.mark.parametrize("name", [PLAIN, TIMM])
def test_a_dtype_that_was_asked_for_is_kept(name: str, tmp_path: Path) -> None:
    model = create_model(name, dtype=torch.float64, **SHAPE)
    loaded = load_model(save_model(model, tmp_path))
    assert {p.dtype for p in loaded.parameters()} == {torch.float64}
