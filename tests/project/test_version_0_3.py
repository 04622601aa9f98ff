"""What version 0.3 wrote, and the import paths it had, still work.

The files in tests/version_0_3 were written by version 0.3.0 and are not made anew.
"""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import tokenlearner
from tokenlearner import TrainConfig, load_model, train
from tokenlearner.deploy import load_exported
from tokenlearner.utils.moved import MODULES, NAMES, PACKAGES

FILES = Path(__file__).parents[1] / "version_0_3"
IMAGES = torch.linspace(-1, 1, 2 * 784).reshape(2, 1, 28, 28)


def expected(name: str) -> torch.Tensor:
    return torch.load(FILES / "expected.pt", weights_only=True)[name]


@torch.no_grad()
@pytest.mark.parametrize("name", ["folder", "inserted.safetensors", "v1.safetensors"])
def test_saved_models_load(name: str) -> None:
    torch.testing.assert_close(load_model(FILES / name)(IMAGES), expected(name))


@torch.no_grad()
def test_exported_programs_load(tmp_path: Path) -> None:
    torch.testing.assert_close(load_exported(FILES / "model.pt2")(IMAGES), expected("model.pt2"))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:tokenlearner.*has moved:DeprecationWarning")
def test_a_module_that_torch_saved_as_a_whole_loads() -> None:
    model = torch.load(FILES / "module.pt", weights_only=False)
    torch.testing.assert_close(model(IMAGES), expected("module.pt"))


def test_a_run_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    shutil.copytree(FILES / "run", tmp_path / "run")
    options = json.loads((tmp_path / "run" / "train.json").read_text())
    result = train(TrainConfig(**{**options, "out": str(tmp_path / "run")}))
    assert [row["epoch"] for row in result.history] == [1, 2]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_moved_module_is_found_and_its_new_place_named(name: str) -> None:
    sys.modules.pop(f"tokenlearner.{name}", None)
    with pytest.warns(DeprecationWarning, match=f"moved to tokenlearner.{MODULES[name]};"):
        importlib.import_module(f"tokenlearner.{name}")


DEEP = [  # imports that the documentation of version 0.3 showed
    "from tokenlearner.stream import TokenStream",
    "from tokenlearner.wrappers import FusedBlock, PatchGrid, ReducedBlock, UnplacedBlock",
    "from tokenlearner.hosts import HOSTS, Host, look",
    "from tokenlearner.vit import TokenLearnerViT",
    "from tokenlearner.overlap import MapStats, map_stats",
    "from tokenlearner.distill import Distillation, feature_loss, watch",
    "from tokenlearner.narrow import compare_precisions, narrow",
    "from tokenlearner.formats import load_exported",
    "from tokenlearner.labelled import LabelledData, Wanted",
    "from tokenlearner.data import ImageDataset, list_data, load_data",
    "from tokenlearner.checkpoints import find_params, read_weights",
    "from tokenlearner.layers import frames, pool",
    "from tokenlearner.benchmark import Spread, times_in_turn, twin",
    "from tokenlearner.insert import LEARNERS, insert, wrapped_blocks",
    "from tokenlearner.train import TrainResult, train",
    "from tokenlearner.resume import Stopped",
    "from tokenlearner.evaluate import Evaluation, evaluate, mode",
]


@pytest.mark.parametrize("line", DEEP)
def test_an_import_of_version_0_3_works(line: str) -> None:
    names: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        exec(line, names)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_renamed_name_has_a_new_one(name: str) -> None:
    home, _, new = NAMES[name].partition(":")
    owner = importlib.import_module(home if home.startswith("torch") else f"tokenlearner.{home}")
    assert hasattr(owner, new)


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_an_unknown_name_of_a_package_is_an_attribute_error(package: str) -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        vars(importlib.import_module(f"tokenlearner.{package}"))["__getattr__"]("no_such_name")


@pytest.mark.slow
def test_public_functions_stay_callable_when_the_file_of_their_name_is_imported() -> None:
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "import tokenlearner, tokenlearner.insert, tokenlearner.train\n"
        "from tokenlearner import create_model, insert\n"
        "print(type(insert(create_model('vit_mini_patch4_28'), 4)).__name__)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "TokenLearnerViT", result.stderr


def test_public_modules_keep_their_names_without_a_warning() -> None:
    from tokenlearner.adapt import init_from
    from tokenlearner.convert import load_scenic, to_scenic

    assert tokenlearner.convert.load_scenic is load_scenic
    assert callable(init_from)
    assert callable(to_scenic)
