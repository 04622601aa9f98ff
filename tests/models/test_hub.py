"""A folder that timm and the Hub read, and the model that comes back from there."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError
from tiny import images_for, randomized
from torch import nn

from tokenlearner import (
    create_model,
    insert,
    load_adapter,
    load_model,
    push_to_hub,
    save_model,
)
from tokenlearner.models.hub import HubModel, model_card
from tokenlearner.models.mixer import TokenLearnerMixer
from tokenlearner.models.vit import TokenLearnerViT
from tokenlearner.models.vivit import ViViT

PLAIN, TIMM = "vit_mini_patch4_28", "vit_tiny_patch16_224"
MIXER, CLIPS = "mixer_mini_patch4_tl8at3_28", "vivit_mini_patch8x2_tl4at3_32"
FRAMES = "framevit_mini_patch8_f6_tl4at3_32"
SHAPE: dict[str, Any] = {"embed_dim": 24, "depth": 3, "num_heads": 3}
FOREIGN: dict[str, Any] = SHAPE | {"img_size": 32, "patch_size": 8, "num_classes": 5}
FILES = {"model.safetensors", "config.json", "README.md"}


def small(**kwargs: Any) -> Any:
    return randomized(create_model(PLAIN, **({"num_tokens": 3} | SHAPE | kwargs)))


def host(**kwargs: Any) -> Any:
    """A model of timm's own, with tokens."""
    return randomized(create_model(TIMM, **({"num_tokens": 3} | FOREIGN | kwargs)))


def changed(model: Any, classes: int, size: Any = None, pool: str | None = None) -> Any:
    model.reset_classifier(classes, pool)
    if size:
        model.set_input_size(size)
    return randomized(model)


@torch.no_grad()
def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two models give the same numbers, to the bit."""
    x = images_for(a)
    return torch.equal(a(x), b(x))


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


# --- timm --------------------------------------------------------------------------------------


def test_the_config_is_in_timms_form(tmp_path: Path) -> None:
    save_model(changed(small(), 3, (20, 28)), tmp_path)
    config = config_of(tmp_path)
    assert (config["architecture"], config["num_classes"], config["num_features"]) == (PLAIN, 3, 24)
    assert config["global_pool"] == "avg"
    kwargs = SHAPE | {"num_classes": 3, "img_size": [20, 28], "num_tokens": 3}
    assert config["model_args"] == kwargs
    cfg = config["pretrained_cfg"]
    assert (cfg["input_size"], cfg["num_classes"], cfg["mean"]) == ([1, 20, 28], 3, [0.5])
    tokens = {"num_tokens": 3, "at": 1, "learner": "v11", "fuse": False}
    assert config["tokenlearner"] == {"name": PLAIN, "kwargs": kwargs, "insert": tokens}


def test_the_config_names_no_source_of_other_weights(tmp_path: Path) -> None:
    model = host()
    model.pretrained_cfg |= {"hf_hub_id": "timm/", "url": "https://x.y", "label_names": ["a"] * 5}
    model.pretrained_cfg["num_classes"] = 5
    save_model(model, tmp_path)
    cfg = config_of(tmp_path)["pretrained_cfg"]
    assert not {"hf_hub_id", "url", "file", "source", "architecture"} & cfg.keys()
    assert cfg["label_names"] == ["a"] * 5
    save_model(changed(model, 4), tmp_path)
    assert "label_names" not in config_of(tmp_path)["pretrained_cfg"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_model(small(), folder)
    return folder


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("crop_pct", value) for value in (1e-5, "1", 3, float("nan"))],
        *[("mean", value) for value in ("abc", [float("inf")], 1)],
        *[("std", value) for value in ([0.0], [-1.0], [[1]])],
        *[("input_size", value) for value in ([1, 200_000, 200_000], [28], "1", [1, 28, 0.5])],
        *[("interpolation", "x"), ("crop_mode", 3), ("license", ["x"] * 9)],
        *[("label_names", value) for value in ("abc", [["a"]], ["a" * 10**6], 3)],
    ],
)
def test_a_config_out_of_bounds_is_refused_by_name(
    key: str, value: Any, saved: Path, tmp_path: Path
) -> None:
    shutil.copy(saved / "model.safetensors", tmp_path)
    config = config_of(saved)
    config["pretrained_cfg"][key] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"config\.json: {key} is "):
        load_model(tmp_path)


def test_a_config_gives_no_orders(tmp_path: Path) -> None:
    save_model(small(), tmp_path)
    config = config_of(tmp_path)
    orders = {"url": "http://x", "file": "/x", "hf_hub_id": "a/b", "custom_load": True, "x": 1}
    config["pretrained_cfg"] |= orders | {"first_conv": "evil", "crop_pct": 0.5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model: Any = load_model(tmp_path)
    taken = {key: model.pretrained_cfg.get(key) for key in (*orders, "first_conv")}
    plain: Any = small()
    assert taken == {key: plain.pretrained_cfg.get(key) for key in (*orders, "first_conv")}
    assert model.pretrained_cfg["crop_pct"] == 0.5


# --- folders -----------------------------------------------------------------------------------


def test_a_folder_of_weights_alone_is_loaded(tmp_path: Path) -> None:
    model = small()
    save_model(model, tmp_path / "model.safetensors")
    assert same(model, load_model(tmp_path))


def test_a_readme_and_a_config_that_is_not_a_models_are_kept(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "config.json").write_text('{"lr": 1}')
    model = small()
    save_model(model, tmp_path, measured={"a": {"b": 1}})
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert config_of(tmp_path) == {"lr": 1}
    assert same(model, load_model(tmp_path))


def test_a_half_written_folder_is_refused(tmp_path: Path) -> None:
    save_model(small(), tmp_path)
    save_model(small(num_classes=3), tmp_path / "model.safetensors")  # without the config
    for load in (load_model, TokenLearnerViT.from_pretrained):
        with pytest.raises(ValueError, match=r"config\.json and model\.safetensors"):
            load(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "README.md", "config.json"])
def test_an_error_in_the_middle_leaves_the_old_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small()
    save_model(model, tmp_path)
    if name == "README.md":
        (tmp_path / name).unlink()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write = Path.write_text

    def full_disk(path: Path, *args: Any, **kwargs: Any) -> int:
        if path.suffix == Path(name).suffix:
            raise OSError("no space left on device")
        return write(path, *args, **kwargs)

    def half_a_file(state: Any, path: str, metadata: Any = None) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("no space left on device")

    if name == "model.safetensors":
        monkeypatch.setattr(safetensors.torch, "save_file", half_a_file)
    monkeypatch.setattr(Path, "write_text", full_disk)
    with pytest.raises(OSError, match="no space"):
        save_model(small(num_classes=3), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert same(model, load_model(tmp_path))


# --- classes -----------------------------------------------------------------------------------

CLASSES: dict[str, tuple[type[HubModel], Callable[[], Any]]] = {
    "vit": (TokenLearnerViT, small),
    "mixer": (TokenLearnerMixer, lambda: randomized(create_model(MIXER, embed_dim=24))),
    "vivit": (ViViT, lambda: randomized(create_model(CLIPS))),
    "vivit_as_a_vit": (TokenLearnerViT, lambda: randomized(create_model(CLIPS))),
}
each_class = pytest.mark.parametrize(("cls", "make"), CLASSES.values(), ids=CLASSES)


@each_class
def test_a_class_saves_and_loads_itself_and_its_copies(
    cls: type[HubModel], make: Any, tmp_path: Path
) -> None:
    model = make()
    assert model.save_pretrained(tmp_path) is None
    assert {path.name for path in tmp_path.iterdir()} == FILES
    for source in (tmp_path, str(tmp_path), tmp_path / "model.safetensors"):
        loaded = cls.from_pretrained(source)
        assert type(loaded) is type(model)
        assert same(model, loaded)
        assert not loaded.training
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(copied, cls)
        assert same(model, copied)
        save_model(copied, tmp_path)
        assert same(model, load_model(tmp_path))


def test_a_compiled_model_is_saved_as_the_model_that_it_is(tmp_path: Path) -> None:
    model = small()
    compiled: Any = torch.compile(model, backend="eager")
    save_model(compiled, tmp_path / "a")
    compiled.save_pretrained(tmp_path / "b")
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert same(model, TokenLearnerViT.from_pretrained(folder))
        assert "A TokenLearnerViT with" in (folder / "README.md").read_text()


def test_what_a_class_cannot_save_or_load_is_refused(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has a TokenLearnerViT, expected a ViViT"):
        ViViT.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="num_classes"):
        TokenLearnerViT.from_pretrained(tmp_path, num_classes=3)
    with pytest.raises(ValueError, match="config, private"):
        small().save_pretrained(tmp_path, config={}, private=True)
    with pytest.raises(ValueError, match="TokenLearnerViT"):
        TokenLearnerViT(**SHAPE).save_pretrained(tmp_path / "run")  # not made by its name
    assert not (tmp_path / "run").exists()


# --- the Hub -----------------------------------------------------------------------------------


class Hub:
    """Repositories in a folder, in place of the Hub's."""

    def __init__(self, root: Path):
        self.root, self.calls, self.reachable = root, [], True
        self.uploads: list[dict[str, Any]] = []
        self.readme = False

    def download(self, repo_id: str, filename: str, **options: Any) -> str:
        self.calls.append((repo_id, filename, options))
        file = self.root / repo_id / filename
        if not self.reachable or not file.is_file():
            raise LocalEntryNotFoundError("cannot find the file on the Hub or in the cache")
        return str(file)

    def create_repo(self, api: Any, repo_id: str, **options: Any) -> Any:
        self.calls.append((repo_id, "create_repo", options))
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def upload_folder(self, api: Any, *, folder_path: Any, repo_id: str, **options: Any) -> str:
        files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        self.uploads.append({"files": files, "repo_id": repo_id, "token": api.token, **options})
        (self.root / repo_id).mkdir(parents=True)
        for name, content in files.items():
            (self.root / repo_id / name).write_bytes(content)
        return f"https://huggingface.co/{repo_id}/commit/1"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    api = "huggingface_hub.HfApi"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tokenlearner.models.hub.hf_hub_download", hub.download)
    monkeypatch.setattr("tokenlearner.models.hub_access._is_reachable", lambda: True)
    monkeypatch.setattr(f"{api}.create_repo", lambda *a, **k: hub.create_repo(*a, **k))
    monkeypatch.setattr(f"{api}.upload_folder", lambda *a, **k: hub.upload_folder(*a, **k))
    monkeypatch.setattr(f"{api}.file_exists", lambda *a, **k: hub.readme)
    return hub


MODELS: dict[str, Callable[[], Any]] = {"ours": small, "timm": host}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_goes_to_the_hub_and_comes_back(kind: str, hub: Hub) -> None:
    model = MODELS[kind]()
    url = push_to_hub(model, "me/mini", {"ours": {"top-1": 0.5}}, private=True, token="hf_x")
    assert url == "https://huggingface.co/me/mini/commit/1"
    (upload,) = hub.uploads
    assert upload["files"].keys() == FILES
    assert (upload["repo_id"], upload["token"]) == ("me/mini", "hf_x")
    assert hub.calls == [("me/mini", "create_repo", {"private": True, "exist_ok": True})]
    card = upload["files"]["README.md"].decode()
    assert 'load_model("hf-hub:me/mini")' in card
    assert "| top-1 | 0.5 |" in card
    for name in ("hf-hub:me/mini", "hf-hub:me/mini@main"):
        assert same(model, load_model(name))


def test_timm_loads_our_names_from_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small()
    push_to_hub(model, "me/mini")
    monkeypatch.setattr("timm.models._hub.hf_hub_download", hub.download)
    assert same(model, timm.create_model("hf-hub:me/mini", pretrained=True).eval())


def test_a_class_pushes_itself_or_saves_and_pushes_under_the_folders_name(
    hub: Hub, tmp_path: Path
) -> None:
    url = small().save_pretrained(tmp_path / "tiny", push_to_hub=True, measured={"a": {"b": 2}})
    assert url == "https://huggingface.co/me/tiny/commit/1"
    assert b"| b | 2 |" in hub.uploads[0]["files"]["README.md"]
    assert (tmp_path / "tiny" / "config.json").is_file()
    model = small()
    model.push_to_hub("me/mini", branch="dev", create_pr=True, commit_message="One")
    asked = {key: hub.uploads[1][key] for key in ("revision", "create_pr", "commit_message")}
    assert asked == {"revision": "dev", "create_pr": True, "commit_message": "One"}
    assert same(model, TokenLearnerViT.from_pretrained("me/mini"))


def test_a_readme_on_the_hub_and_a_folder_here_go_before(hub: Hub, tmp_path: Path) -> None:
    hub.readme = True
    push_to_hub(small(), "me/mini")
    assert hub.uploads[0]["files"].keys() == FILES - {"README.md"}
    hub.calls.clear()
    model = small()
    save_model(model, tmp_path / "me" / "mini")
    assert same(model, load_model("me/mini"))
    assert same(model, TokenLearnerViT.from_pretrained("me/mini"))
    assert hub.calls == []


def test_nothing_is_made_on_the_hub_for_a_model_that_cannot_be_saved(hub: Hub) -> None:
    model = small()
    model.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"extra\.weight"):
        push_to_hub(model, "me/mini")
    with pytest.raises(ValueError, match="Repo id"):
        push_to_hub(small(), "a/b/c")
    assert hub.calls == []


def test_learned_tokens_alone_go_to_the_hub_and_into_their_host(hub: Hub) -> None:
    plain = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3)
    model = insert(copy.deepcopy(plain), 2, 1).eval()
    push_to_hub(model, "me/tokens", {"ours": {"top-1": 0.5}}, only="learned")
    (upload,) = hub.uploads
    assert upload["files"].keys() == {"adapter.safetensors", "README.md"}
    card = upload["files"]["README.md"].decode()
    assert 'load_adapter(host, "hf-hub:me/tokens")  # host: vit_tiny_patch16_224' in card
    assert "12,866 parameters to put into a VisionTransformer, alone" in card
    assert "| top-1 | 0.5 |" in card
    assert same(model, load_adapter(copy.deepcopy(plain).eval(), "hf-hub:me/tokens"))
    with pytest.raises(ValueError, match=r"none is not a file or folder, and adapter\.safetensors"):
        load_adapter(plain, "hf-hub:me/none")


def test_options_reach_the_hub(hub: Hub, tmp_path: Path) -> None:
    push_to_hub(small(), "me/mini")
    hub.calls.clear()
    options = {"cache_dir": tmp_path, "token": "hf_x"}
    options |= {"force_download": True, "local_files_only": True}
    load_model("hf-hub:me/mini", revision="v1", **options)
    TokenLearnerViT.from_pretrained("me/mini@v1", **options)
    options |= {"revision": "v1", "library_name": "tokenlearner"}
    files = ("config.json", "model.safetensors") * 2
    assert hub.calls == [("me/mini", file, options) for file in files]


@pytest.mark.parametrize("reachable", [True, False])
@pytest.mark.parametrize("load", [load_model, TokenLearnerViT.from_pretrained])
def test_what_is_neither_here_nor_on_the_hub_is_refused(
    load: Callable[[str], Any], reachable: bool, hub: Hub
) -> None:
    hub.reachable = reachable
    with pytest.raises(ValueError, match=r"me/mini .*config.json.* at v1 .*LocalEntryNotFound"):
        load("hf-hub:me/mini@v1")


@pytest.mark.parametrize(
    "path",
    ["me/mini", "mini", "./mini", "../mini", "a/b/c", "me/mini.safetensors", Path("me/mini"), ""],
)
def test_other_paths_are_never_asked_of_the_hub(path: str | Path, hub: Hub) -> None:
    with pytest.raises(ValueError, match="there is no file or folder"):
        load_model(path)
    assert hub.calls == []


def test_a_name_in_a_folder_here_is_not_asked_of_the_hub(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cwd" / "runs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "cwd")
    for load, sentence in (
        (load_model, "no file or folder runs/x"),
        (TokenLearnerViT.from_pretrained, "no runs/x, though runs is a folder"),
    ):
        with pytest.raises(ValueError, match=rf"{sentence}.* hf-hub:runs/x"):
            load("runs/x")
    assert hub.calls == []
    with pytest.raises(ValueError, match="from the Hub"):
        load_model("hf-hub:runs/x")
    assert len(hub.calls) == 1


def test_a_hub_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = Event()
    monkeypatch.setattr("tokenlearner.models.hub.hf_hub_download", lambda *_, **__: ends.wait(60))
    monkeypatch.setattr("tokenlearner.models.hub._SECONDS", 0.1)
    monkeypatch.setattr("tokenlearner.models.hub_access._is_reachable", lambda: True)
    with pytest.raises(ValueError, match=r"within 0\.1 seconds"):
        load_model("hf-hub:me/mini")
    ends.set()


@pytest.mark.parametrize("config", ['{"architecture": "resnet18"}', "[]", "{"])
def test_a_model_of_others_is_refused_before_its_weights_are_fetched(config: str, hub: Hub) -> None:
    (hub.root / "timm/net").mkdir(parents=True)
    (hub.root / "timm/net/config.json").write_text(config)
    with pytest.raises(ValueError, match=r"timm/net .*config.json"):
        load_model("hf-hub:timm/net")
    assert [call[1] for call in hub.calls] == ["config.json"]


def test_a_repository_without_weights_and_two_revisions_are_refused(hub: Hub) -> None:
    push_to_hub(small(), "me/mini")
    (hub.root / "me/mini/model.safetensors").rename(hub.root / "me/mini/pytorch_model.bin")
    with pytest.raises(ValueError, match=r"model\.safetensors of me/mini"):
        load_model("hf-hub:me/mini")
    with pytest.raises(ValueError, match="v1 and revision='v2'"):
        load_model("hf-hub:me/mini@v1", revision="v2")


# --- the card ----------------------------------------------------------------------------------


def test_a_card_shows_names_as_text() -> None:
    card = model_card(small(), {"<b>[x](y)|\x1b[31m`": {"$a_b$": 0.5}})
    assert r"\<b\>\[x\](y)\|\\x1b\[31m\`" in card
    assert r"| \$a_b\$ | 0.5 |" in card


def test_a_card_says_what_the_model_is() -> None:
    model = small()
    card = ModelCard(model_card(model))
    assert card.data.to_dict() == {
        "library_name": "tokenlearner",
        "pipeline_tag": "image-classification",
        "tags": ["timm", "token-reduction", "tokenlearner"],
    }
    count = sum(parameter.numel() for parameter in model.parameters())
    assert f"# {PLAIN}\n\nA TokenLearnerViT with {count:,} parameters. It learns 3" in card.text
    assert "3 tokens in front of block 1, counted from 0 (learner `v11`), and the bl" in card.text
    assert "Nothing was measured when this model was saved." in card.text
    assert model.generate_model_card().content == card.content


def test_a_card_says_what_is_special() -> None:
    assert "It has no learned tokens." in model_card(small(num_tokens=0))
    assert "each block from there on puts them back on all" in model_card(small(fuse=True))
    for name in (CLIPS, FRAMES):
        card = ModelCard(model_card(create_model(name)))
        assert card.data.pipeline_tag == "video-classification"
    model = host()
    model.pretrained_cfg["license"] = "cc-by-nc-4.0"
    assert ModelCard(model_card(model)).data.license == "cc-by-nc-4.0"
    assert "from_pretrained" not in model_card(model)


def test_the_code_on_a_card_runs(tmp_path: Path) -> None:
    model = small()
    save_model(model, tmp_path)
    code = model_card(model, location=str(tmp_path)).split("```python\n")[1].split("```")[0]
    for part in code.split("# or\n"):
        names: dict[str, Any] = {}
        exec(part, names)
        assert same(model, names["model"])


@pytest.mark.parametrize(
    ("measured", "path"),
    [({"a": 1}, "run"), ({"a": [1]}, "run"), ([1], "run"), ({"a": {"b": 1}}, "a.safetensors")],
)
def test_what_is_no_table_or_has_no_place_is_refused_before_anything_is_written(
    measured: Any, path: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="measured"):
        save_model(small(), tmp_path / path, measured)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(
    value: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = small().half()
    torch.nn.init.constant_(model.blocks[1].attn.qkv.bias, 60000.0)  # a sum beyond half precision
    load_model(save_model(model, tmp_path))
    model.norm.weight.data[3] = value
    file = save_model(model, tmp_path)
    assert "norm.weight" in caplog.text
    with pytest.raises(ValueError, match=r"NaN or infinity in norm\.weight"):
        load_model(file)
