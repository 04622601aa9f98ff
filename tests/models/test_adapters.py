"""Learned tokens saved alone: for every kind of host, with what was fitted, and for no other."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from safetensors import safe_open
from tiny import TIMM, drawn, torchvision_vit, transformers_vit
from torch import nn

from tokenlearner import calibrate, create_model, insert, load_adapter, save_model
from tokenlearner.models.insertion import get_insertion

IMAGES = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def timm_vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **TIMM)


def eva() -> nn.Module:
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2}
    return timm.create_model("eva02_tiny_patch14_224", **sizes, num_classes=5)


def beit() -> nn.Module:
    return timm.create_model("beit_base_patch16_224", **TIMM)


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "timm": (timm_vit, {"num_tokens": 4, "at": 1, "overlap": 1}),
    "timm, fused": (timm_vit, {"num_tokens": 4, "at": 1, "fuse": True, "learner": "v1"}),
    "timm, two places": (timm_vit, {"num_tokens": (8, 4), "at": (1, 2), "learner": "grouped"}),
    "timm, elastic": (timm_vit, {"num_tokens": 4, "at": 1, "elastic": True, "active_tokens": 2}),
    "EVA": (eva, {"num_tokens": 4, "at": 1}),
    "BEiT": (beit, {"num_tokens": 4, "at": 1}),
    "torchvision": (torchvision_vit, {"num_tokens": 4, "at": 1}),
    "transformers": (transformers_vit, {"num_tokens": 4, "at": 1}),
}


def output(model: nn.Module) -> torch.Tensor:
    out = model.eval()(IMAGES)
    return getattr(out, "logits", out)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_host_gets_its_tokens_back(case: str, tmp_path: Path) -> None:
    build, arguments = CASES[case]
    host = drawn(build(), 0.1)
    model = insert(copy.deepcopy(host), **arguments)
    for name, parameter in model.named_parameters():
        if "learner" in name or "fuser" in name:
            nn.init.normal_(parameter, std=0.3)
    file = save_model(model, tmp_path / "tokens", only="learned")
    assert file == tmp_path / "tokens" / "adapter.safetensors"
    assert "load_adapter(host" in (file.parent / "README.md").read_text()
    with safe_open(file, "pt") as opened:
        assert all("learner" in key or "fuser" in key for key in opened.keys())  # noqa: SIM118
    loaded = load_adapter(host, tmp_path / "tokens")
    assert loaded is host
    assert get_insertion(loaded) == get_insertion(model)
    assert torch.equal(output(loaded), output(model))


def test_what_was_fitted_of_the_host_is_written_where_it_is_known(tmp_path: Path) -> None:
    host = drawn(timm_vit(), 0.2).eval()
    model = insert(copy.deepcopy(host), 4, 2)
    calibrate(model, IMAGES, steps=2, batch_size=4, tail=True, held_out=0)
    alone = save_model(model, tmp_path / "alone.safetensors", only="learned")
    with pytest.raises(ValueError, match=r"of a host with other weights: \d+ of \d+ tensors"):
        load_adapter(copy.deepcopy(host), alone)
    whole = save_model(model, tmp_path / "whole.safetensors", only="learned", host=host)
    with safe_open(whole, "pt") as opened:
        changed = [key for key in opened.keys() if key.startswith("host.")]  # noqa: SIM118
    assert changed
    assert all(key.startswith(("host.blocks.2", "host.norm", "host.head")) for key in changed)
    before = copy.deepcopy(host.state_dict())
    assert torch.equal(output(load_adapter(host, whole)), output(model))
    other = drawn(timm_vit(), 0.2)
    kept = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="of a host with other weights"):
        load_adapter(other, whole)
    assert all(torch.equal(kept[name], value) for name, value in other.state_dict().items())
    assert before.keys() == kept.keys()


def test_the_file_is_small(tmp_path: Path) -> None:
    model = insert(timm.create_model("vit_small_patch16_224", num_classes=10), 8)
    file = save_model(model, tmp_path, only="learned")
    assert file.stat().st_size < 250_000
    assert file.stat().st_size < 0.01 * sum(4 * p.numel() for p in model.parameters())


def damaged(file: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Writes a file again with something else in it."""
    with safe_open(file, "pt") as opened:
        header = json.loads(opened.metadata()["tokenlearner_adapter"])
        state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    change(header, state)
    safetensors.torch.save_file(state, file, {"tokenlearner_adapter": json.dumps(header)})


def test_what_is_no_adapter_of_this_host_is_refused_and_the_host_stays(tmp_path: Path) -> None:
    host, file = timm_vit(), tmp_path / "a.safetensors"
    before = {name: value.clone() for name, value in host.state_dict().items()}
    model = insert(copy.deepcopy(host), 4, 1)

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            load_adapter(host, file)
        assert before.keys() == host.state_dict().keys()
        assert all(torch.equal(before[name], value) for name, value in host.state_dict().items())

    refused("there is no .*a.safetensors")
    file.write_bytes(b"nothing")
    refused("not a readable safetensors file")
    safetensors.torch.save_file({"a": torch.zeros(1)}, file)
    refused("a whole model is read by tokenlearner.load_model")
    changes: dict[str, Callable[[dict[str, Any], dict[str, Any]], Any]] = {
        "does not fit this host": lambda header, _: header["insert"].update(at=9),
        "does not fit its own arguments": lambda header, _: header["insert"].update(num_tokens=5),
        "has NaN": lambda _, state: next(iter(state.values())).fill_(float("nan")),
        "is damaged": lambda header, _: header.pop("insert"),
        "of another host: only one of both has": lambda header, _: header["host"].popitem(),
        "does not fit this host.*code": lambda header, _: header["insert"].update(code="x"),
    }
    for message, change in changes.items():
        save_model(model, file, only="learned")
        damaged(file, change)
        refused(message)
    save_model(model, file, only="learned")
    with pytest.raises(ValueError, match="has learned tokens"):
        load_adapter(model, file)


def test_what_cannot_be_written_alone_is_refused(tmp_path: Path) -> None:
    host = timm_vit()
    model = insert(copy.deepcopy(host), 4, 1)
    of_peft: Any = insert(copy.deepcopy(host), 4, 1)
    of_peft.peft_config = {}
    for call, message in (
        (lambda: save_model(host, tmp_path, only="learned"), "no learned tokens"),
        (lambda: save_model(model, tmp_path, only="all"), "only is 'all'"),  # type: ignore[arg-type]
        (
            lambda: save_model(create_model("vit_mini_patch4_28"), tmp_path, host=host),
            "host is for",
        ),
        (
            lambda: save_model(model, tmp_path / "a.safetensors", {"a": {"b": 1}}, only="learned"),
            "has no model card",
        ),
        (lambda: save_model(model, tmp_path, only="learned", host=model), "not what the tokens"),
        (
            lambda: save_model(of_peft, tmp_path, only="learned"),
            "one of PEFT, whose save_pretrained",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert list(tmp_path.iterdir()) == []
