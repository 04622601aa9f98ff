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
from torch import Tensor, nn

from tokenlearner import create_model, list_models, load_model, remove, save_model
from tokenlearner.insert import insert, insertion

PLAIN, LEARNED = "vit_mini_patch4_28", "vit_mini_patch4_tl8at3_28"
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
def test_a_name_of_ours_becomes_a_model() -> None:
    assert create_model(LEARNED)(images()).shape == (2, 10)


@torch.no_grad()
def test_a_name_of_timm_becomes_a_model() -> None:
    model = create_model(TIMM, **FOREIGN)
    assert isinstance(model, timm.models.VisionTransformer)
    assert model(images(3, 32, 32)).shape == (2, 5)
    assert insertion(model) is None


@pytest.mark.parametrize("name", [PLAIN, TIMM])
def test_tokens_are_inserted_when_asked_for(name: str) -> None:
    tokens = {"num_tokens": 3, "at": 1, "learner": "v1", "fuse": True}
    assert insertion(create_model(name, **tokens, **SHAPE)) == tokens


def test_tokens_stand_half_way_unless_told_otherwise() -> None:
    model = create_model(PLAIN, num_tokens=4)
    assert insertion(model) == {"num_tokens": 4, "at": 3, "learner": "v11", "fuse": False}


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("vit_mini_patch4_29", PLAIN),
        ("vit_mini_patch4_tl8at2_28", LEARNED),
        ("vit_tiny_patch16_225", TIMM),
    ],
)
def test_an_unknown_name_is_refused_with_close_ones(name: str, close: str) -> None:
    with pytest.raises(ValueError, match=f"no model '{name}'; did you mean .*{close}"):
        create_model(name)


def test_a_name_like_no_other_is_refused_with_where_to_look() -> None:
    with pytest.raises(ValueError, match=r"no model '!!'; list_models\(\) names ours"):
        create_model("!!")


def test_a_named_variant_has_its_tokens_already() -> None:
    with pytest.raises(ValueError, match="learned tokens already"):
        create_model(LEARNED, num_tokens=4)


def test_tokens_in_a_model_that_cannot_take_them_are_refused() -> None:
    with pytest.raises(ValueError, match="ResNet is no model that tokens can be inserted in"):
        create_model("resnet10t", num_tokens=8)


@pytest.mark.parametrize(
    ("pattern", "names"), [("*", [PLAIN, LEARNED]), ("*tl8*", [LEARNED]), ("resnet*", [])]
)
def test_names_are_listed_by_pattern(pattern: str, names: list[str]) -> None:
    assert list_models(pattern) == names


# --- there and back ----------------------------------------------------------------------------

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
}
SIZES = {"not_square": (1, 20, 28)}
each_model = pytest.mark.parametrize("kind", MODELS)


def randomized(model: nn.Module) -> nn.Module:
    """The model with every parameter drawn at random: a fuser then adds something."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


@each_model
@torch.no_grad()
def test_a_loaded_model_gives_the_same_numbers_to_the_bit(kind: str, tmp_path: Path) -> None:
    model, x = randomized(MODELS[kind]()), images(*SIZES.get(kind, ()))
    loaded = load_model(save_model(model, tmp_path))
    assert torch.equal(loaded(x), model(x))
    assert insertion(loaded) == insertion(model)
    assert not loaded.training


@each_model
def test_a_loaded_model_can_be_saved_again_to_the_same_bytes(kind: str, tmp_path: Path) -> None:
    first = save_model(MODELS[kind](), tmp_path / "first")
    second = save_model(load_model(first), tmp_path / "second")
    assert first.read_bytes() == second.read_bytes()


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
    assert config == {"name": PLAIN, "kwargs": SHAPE, "insert": tokens}


def test_saving_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = small(num_tokens=3).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    save_model(model, tmp_path)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


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
    with pytest.raises(ValueError, match="VisionTransformer does not know how it was built; make"):
        save_model(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_another_pooling_is_refused_since_a_file_would_not_show_it(tmp_path: Path) -> None:
    model = small()
    model.reset_classifier(10, global_pool="max")
    with pytest.raises(ValueError, match="global_pool was changed from 'avg' to 'max' since"):
        save_model(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


def _new_head(model: nn.Module) -> None:
    model.reset_classifier(3)


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
    with pytest.raises(ValueError, match=f"changed since create_model made it: .*{key}.*differ"):
        save_model(model, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_arguments_that_json_has_no_form_for_are_refused(tmp_path: Path) -> None:
    model = small(norm_layer=nn.LayerNorm)
    with pytest.raises(ValueError, match=r"cannot be saved as JSON .*use plain values"):
        save_model(model, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@torch.no_grad()
def test_a_save_that_fails_midway_keeps_the_model_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = small(num_tokens=3), images()
    file = save_model(model, tmp_path)

    def full_disk(state: dict[str, Tensor], path: str, metadata: Any = None) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_model(small(num_tokens=3), tmp_path)
    assert list(tmp_path.iterdir()) == [file]
    assert torch.equal(load_model(file)(x), model(x))


# --- what cannot be loaded ---------------------------------------------------------------------


@pytest.mark.parametrize("path", ["nowhere", "nowhere.safetensors"])
def test_a_file_that_is_not_there_is_named(path: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no .*nowhere.*\.safetensors; pass the file"):
        load_model(tmp_path / path)


@pytest.mark.parametrize("content", [b"", b"\x00" * 100, b"not a model"], ids=str)
def test_a_file_that_is_no_safetensors_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is no readable safetensors file"):
        load_model(tmp_path)


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    file = save_model(small(), tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="no readable safetensors file"):
        load_model(file)


def test_weights_without_a_config_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file(small().state_dict(), str(file))
    with pytest.raises(ValueError, match="weights but no config; save it with"):
        load_model(file)


MISFITS = {
    "another_width": {"name": PLAIN, "kwargs": SHAPE | {"embed_dim": 48}, "insert": None},
    "another_depth": {"name": PLAIN, "kwargs": SHAPE | {"depth": 2}, "insert": None},
    "tokens_too_many": {"name": PLAIN, "kwargs": SHAPE, "insert": {"num_tokens": 3}},
}


@pytest.mark.parametrize("config", MISFITS.values(), ids=MISFITS)
def test_a_config_that_the_weights_do_not_fit_is_refused(config: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "a.safetensors", small().state_dict(), config)
    with pytest.raises(ValueError, match=r"a\.safetensors does not fit the model it names: .*diff"):
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
    with pytest.raises(ValueError, match=r"a\.safetensors has a config that makes no model"):
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
    with pytest.raises(ValueError, match="no readable safetensors file"):
        load_model(tmp_path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists()  # so the payload would have shown


@torch.no_grad()
def test_a_model_keeps_its_dtype(tmp_path: Path) -> None:
    model = small(num_tokens=3).bfloat16()
    loaded = load_model(save_model(model, tmp_path))
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


@torch.no_grad()
def test_a_grid_that_was_passed_is_kept(tmp_path: Path) -> None:
    host, x = small(img_size=32, patch_size=8), images(1, 32, 32)
    model = randomized(insert(host, 3, learner="v1", grid=(2, 8)))
    assert torch.equal(load_model(save_model(model, tmp_path))(x), model(x))
