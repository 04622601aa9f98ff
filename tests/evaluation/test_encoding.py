"""`encode`: the same shards by one process and by two, whole or cut off, and what they hold."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from files import make_video
from safetensors.torch import load
from tiny import FRAMES, TIMM, randomized, torchvision_vit, transformers_vit
from torch import nn

from tokenlearner import create_model, insert, save_model, set_num_tokens
from tokenlearner.commands.main import main
from tokenlearner.data import load_data
from tokenlearner.data.token_shards import read_manifest
from tokenlearner.data.video_folder import iterate_frames
from tokenlearner.evaluation import encode
from tokenlearner.models import FrameEncoder, FrameViT
from tokenlearner.models.preprocessing import Preprocessing, set_preprocessing

BAD = "train/a/2.mp4"
OPTIONS: dict[str, Any] = {"stride": 2, "shard_size": 2, "workers": 0, "batch_size": 4}


WORDS = [word for name, value in OPTIONS.items() for word in (f"--{name}", str(value))]


def vit(**tokens: Any) -> nn.Module:
    """Always the same weights."""
    torch.manual_seed(0)
    model = create_model("vit_tiny_patch16_224", **TIMM)
    set_preprocessing(model, Preprocessing((0.5,) * 3, (0.2,) * 3))
    return randomized(insert(model, 3, 1, **tokens))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of two splits and two classes, one that is broken; a model; and its tokens."""
    folder = tmp_path_factory.mktemp("encoded")
    for split, count in (("train", 3), ("val", 1)):
        for label in "ab":
            (folder / "videos" / split / label).mkdir(parents=True)
            for i in range(count):
                make_video(folder / "videos" / split / label / f"{i}.mp4", frames=9 + 2 * i)
    (folder / "videos" / BAD).write_bytes(b"no video")
    save_model(vit(), folder / "model")
    encode(vit(), folder / "videos", folder / "tokens", **OPTIONS)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def index(folder: Path, shard: str) -> list[dict[str, Any]]:
    return json.loads((folder / f"{shard}.json").read_text())["videos"]


# --- the same shards ---------------------------------------------------------------------------


def test_shards_are_the_same_by_one_process_and_by_several(folder: Path, tmp_path: Path) -> None:
    for process in (1, 0, 2):
        out, part = tmp_path / "a", {"process": process, "num_processes": 3}
        encode(vit(), folder / "videos", out, **OPTIONS | {"workers": 2}, **part)
    assert contents(tmp_path / "a") == contents(folder / "tokens")
    assert sorted(contents(tmp_path / "a")) == [
        "manifest.json",
        *(f"train-00000{shard}.{end}" for shard in range(3) for end in ("json", "tar")),
        *("val-000000.json", "val-000000.tar"),
    ]


def test_a_run_that_was_cut_off_goes_on_with_the_shards_that_are_not_done(
    folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(folder / "tokens", out)
    (out / "train-000001.json").unlink()  # what is written last
    (out / "val-000000.tar").write_bytes(b"half")
    (out / ".train-000001.0123abcd.tar").write_bytes(b"of a process that was killed")
    kept = (out / "train-000000.tar").stat().st_mtime_ns
    result = encode(vit(), folder / "videos", out, **OPTIONS)
    assert (result.shards, result.written) == (4, 2)
    assert (result.videos, len(result.broken)) == (7, 1)
    assert (out / "train-000000.tar").stat().st_mtime_ns == kept
    assert contents(out) == contents(folder / "tokens")


def test_shards_of_a_video_that_was_replaced_are_encoded_again(
    folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "x")
    make_video(tmp_path / "x" / "videos" / BAD)
    result = encode(vit(), tmp_path / "x" / "videos", tmp_path / "x" / "tokens", **OPTIONS)
    assert (result.written, result.broken, result.videos) == (1, [], 8)


def run(folder: Path, out: Path, *launcher: str, **options: Any) -> subprocess.Popen[str]:
    words = ["tokenlearner", "encode", str(folder / "videos"), str(out)]
    words += ["--model", str(folder / "model"), "--device", "cpu"]
    given = OPTIONS | options
    words += [word for name, value in given.items() for word in (f"--{name}", str(value))]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-m", *launcher, *(["-m"] if launcher else []), *words]
    return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.slow
def test_two_processes_of_torchrun_write_what_one_writes(folder: Path, tmp_path: Path) -> None:
    process = run(folder, tmp_path / "out", *TORCHRUN)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    assert f"left out: {BAD}" in errors
    assert contents(tmp_path / "out") == contents(folder / "tokens")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [(), TORCHRUN])
def test_a_killed_run_goes_on_to_the_same_bytes(
    launcher: tuple[str, ...], folder: Path, tmp_path: Path
) -> None:
    """Killed where the first shard is written, and so in the middle of another."""
    for i in range(30):
        target = tmp_path / "x" / "videos" / "train" / "a" / f"more-{i}.mp4"
        target.parent.mkdir(parents=True, exist_ok=True)
        make_video(target, (320, 240), frames=80)
    shutil.copytree(folder / "model", tmp_path / "x" / "model")
    options = {"shard_size": 1, "stride": 1}
    killed = run(tmp_path / "x", tmp_path / "out", *launcher, **options)
    # `*` would find files that are being written too, whose names begin with a dot.
    while not [*(tmp_path / "out").glob("train-*.json")] and killed.poll() is None:
        time.sleep(0.01)
    started = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
    for pid in (killed.pid, *map(int, started)):  # torchrun's are in sessions of their own
        os.kill(pid, signal.SIGKILL)
    _, errors = killed.communicate()
    done = len([*(tmp_path / "out").glob("train-*.json")])
    assert 1 <= done < 30, errors[-3000:]
    for out in ("out", "whole"):
        process = run(tmp_path / "x", tmp_path / out, *launcher, **options)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# --- what they hold ----------------------------------------------------------------------------


def frames_of(path: Path, stride: int, size: int = 16) -> torch.Tensor:
    """Frames as timm prepares images for the model."""
    from torchvision.transforms.functional import to_pil_image

    transform = Preprocessing((0.5,) * 3, (0.2,) * 3).eval_transform((3, size, size))
    return torch.stack([transform(to_pil_image(f)) for f in iterate_frames(str(path), stride)])


@torch.no_grad()
def test_a_shard_is_a_tar_file_of_webdataset_with_the_tokens_of_each_video(folder: Path) -> None:
    with tarfile.open(folder / "tokens" / "train-000001.tar") as tar:
        files = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
    assert [*files] == [f"000000003.{end}" for end in ("cls", "json", "safetensors")]
    assert files["000000003.cls"] == b"1"
    said = json.loads(files["000000003.json"])
    assert said == {"video": "train/b/0.mp4", "frames": 5, "label": 1, "class": "b"}
    [tokens] = load(files["000000003.safetensors"]).values()
    assert (tokens.dtype, tokens.shape) == (torch.bfloat16, (5, 3, 16))
    frames = frames_of(folder / "videos" / "train" / "b" / "0.mp4", 2)
    torch.testing.assert_close(tokens, FrameEncoder(vit())(frames).bfloat16(), rtol=0.02, atol=0.02)


def test_videos_that_cannot_be_read_are_named_in_the_index_of_their_shard(folder: Path) -> None:
    broken = [row for shard in range(3) for row in index(folder / "tokens", f"train-{shard:06d}")]
    [row] = [row for row in broken if row["error"]]
    assert row["video"] == BAD
    assert row["error"].startswith(f"{BAD} cannot be read")


def test_too_many_broken_videos_end_the_run_and_leave_the_shards_that_are_done(
    folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match=rf"1 videos.*max_broken is 0: {BAD}"):
        encode(vit(), folder / "videos", tmp_path, **OPTIONS, max_broken=0)
    assert sorted(contents(tmp_path)) == ["manifest.json", "train-000000.json", "train-000000.tar"]
    assert encode(vit(), folder / "videos", tmp_path, **OPTIONS).written == 3
    assert contents(tmp_path) == contents(folder / "tokens")


def test_videos_none_of_which_can_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of 1 videos.*a\.mp4"):
        encode(vit(), tmp_path / "videos", tmp_path / "out", workers=0)


def test_a_folder_without_splits_is_one_and_files_in_it_have_no_labels(tmp_path: Path) -> None:
    for name in ("flat/x.mp4", "classes/b/x.mp4", "classes/a/y.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        make_video(tmp_path / name)
    for name, classes, labels in (("flat", (), [None]), ("classes", ("a", "b"), [0, 1])):
        encode(vit(), tmp_path / name, tmp_path / f"{name} tokens", workers=0)
        out = tmp_path / f"{name} tokens"
        assert read_manifest(out).classes == classes
        assert [row["label"] for row in index(out, "train-000000")] == labels
    with pytest.raises(ValueError, match="no labels"):
        load_data("tokens", root=tmp_path / "flat tokens")


@torch.no_grad()
def test_a_long_video_is_read_in_parts_that_change_nothing(folder: Path, tmp_path: Path) -> None:
    video = folder / "videos" / "train" / "a" / "1.mp4"
    frames = [*iterate_frames(str(video), 1)]
    data = load_data("video-folder", root=folder / "videos", frames=11, stride=1, in_chans=3)
    assert torch.stack(frames).equal(data.load(1))
    encode(vit(), folder / "videos", tmp_path, **OPTIONS | {"batch_size": 1, "stride": 1})
    whole = FrameEncoder(vit())(frames_of(video, 1)).bfloat16()
    with tarfile.open(tmp_path / "train-000000.tar") as tar:
        content = tar.extractfile("000000001.safetensors").read()  # type: ignore[union-attr]
    torch.testing.assert_close(load(content)["tokens"], whole, rtol=0.02, atol=0.02)


# --- models ------------------------------------------------------------------------------------

HOSTS: dict[str, Callable[[], nn.Module]] = {
    "timm": lambda: create_model("vit_tiny_patch16_224", **TIMM),
    "timm-registers": lambda: create_model("vit_tiny_patch16_224", **TIMM, reg_tokens=2),
    "torchvision": torchvision_vit,
    "transformers": transformers_vit,
}


@pytest.mark.parametrize("name", HOSTS)
@torch.no_grad()
def test_tokens_are_those_that_the_next_block_of_a_host_runs_on(name: str) -> None:
    x = torch.randn(2, 3, 16, 16)
    model = randomized(insert(HOSTS[name](), 3, 1))
    from tokenlearner.models.features import wrapped_blocks

    seen: list[torch.Tensor] = []
    hook = wrapped_blocks(model)[1].block.register_forward_pre_hook(lambda _, a: seen.append(a[0]))
    expected = model(x)
    hook.remove()
    assert FrameEncoder(model)(x).equal(seen[0][:, -3:])
    logits = getattr(expected, "logits", expected)
    assert getattr(model(x), "logits", model(x)).equal(logits)  # the model is as it was


@torch.no_grad()
def test_a_host_without_tokens_gives_positions_of_a_block() -> None:
    model, x = randomized(HOSTS["timm"]()), torch.randn(2, 3, 16, 16)
    last = model.forward_features(x)[:, 1:]
    torch.testing.assert_close(model.norm(FrameEncoder(model)(x)), last)
    torch.testing.assert_close(model.blocks[2](
        torch.cat([torch.zeros(2, 1, 16), FrameEncoder(model, 2)(x)], 1)).shape, (2, 17, 16)
    )  # fmt: skip
    assert FrameEncoder(model, 0.5)(x).equal(FrameEncoder(model, 1)(x))


@torch.no_grad()
def test_overlap_and_elastic_tokens_count(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 16, 16)
    model = randomized(insert(HOSTS["timm"](), 5, 2, overlap=2, elastic=True))
    assert FrameEncoder(model)(x).shape == (2, 5, 16)
    out = torch.cat([torch.zeros(2, 1, 16), FrameEncoder(model)(x)], 1)
    assert model.blocks[2](out).shape == (2, 6, 16)
    assert FrameEncoder(set_num_tokens(model, 2))(x).shape == (2, 2, 16)


@torch.no_grad()
def test_tokens_of_a_framevit_are_those_of_whole_clips(tmp_path: Path) -> None:
    model = randomized(FrameViT(**FRAMES))
    set_preprocessing(model, Preprocessing((0.5,) * 3, (0.2,) * 3))
    (tmp_path / "videos" / "a").mkdir(parents=True)
    make_video(tmp_path / "videos" / "a" / "0.mp4", frames=7)
    encode(model, tmp_path / "videos", tmp_path / "out", dtype="float32", stride=2, workers=0)
    options = {"frames": 4, "stride": 2, "img_size": 16, "mean": [0.5] * 3, "std": [0.2] * 3}
    (tmp_path / "videos").rename(tmp_path / "train")
    clips = load_data("video-folder", "train", root=tmp_path, **options)
    tokens = load_data("tokens", "train", root=tmp_path / "out", frames=4, stride=2)
    [(clip, _)], [(found, _)] = clips.batches(1), tokens.batches(1)
    torch.testing.assert_close(model.encode(clip), found)
    torch.testing.assert_close(model.forward_tokens(found), model(clip))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "fused": (lambda: FrameEncoder(insert(HOSTS["timm"](), 3, 1, fuse=True)), "fuse=True"),
    "vivit": (lambda: FrameEncoder(create_model("vivit_mini_patch8x2_32")), "see each other"),
    "mixer": (lambda: FrameEncoder(create_model("mixer_mini_patch4_tl8at3_28")), "mixes tokens"),
    "no host": (lambda: FrameEncoder(nn.Linear(2, 2)), "Linear"),
    "temporal": (lambda: FrameEncoder(create_model("temporal_mini")), "tokens already"),
    "at": (lambda: FrameEncoder(vit(), at=1), "at is 1"),
    "cameras": (lambda: FrameEncoder(FrameViT(**FRAMES, num_cameras=2)), "num_cameras=2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_have_no_tokens_of_a_frame_are_refused(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()


# --- mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stride": 4}, "stride 2 against 4"),
        ({"dtype": "float32"}, "dtype 'bfloat16' against 'float32'"),
        ({"shard_size": 3}, "shard_size 2 against 3"),
        ({"model": vit(learner="v1")}, "weights"),
    ],
)
def test_a_folder_of_other_settings_is_refused(
    changes: dict[str, Any], message: str, folder: Path
) -> None:
    before = contents(folder / "tokens")
    options = {"model": vit(), "videos": folder / "videos", **OPTIONS, **changes}
    with pytest.raises(ValueError, match=rf"other settings or videos: .*{message}"):
        encode(out=folder / "tokens", **options)
    assert contents(folder / "tokens") == before


def test_a_folder_of_other_videos_or_of_other_files_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "videos", tmp_path / "videos")
    make_video(tmp_path / "videos" / "val" / "a" / "new.mp4")
    with pytest.raises(ValueError, match=r"split val.*'videos': 2.*'videos': 3"):
        encode(vit(), tmp_path / "videos", folder / "tokens", **OPTIONS)
    with pytest.raises(ValueError, match="other files"):
        encode(vit(), folder / "videos", tmp_path, **OPTIONS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stride": 0}, "stride is 0"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"process": 2, "num_processes": 2}, "process is 2 of 2"),
        ({"videos": "nowhere"}, "nowhere is not a folder"),
        ({"videos": "."}, "holds no file that ends in"),
    ],
)
def test_mistakes_are_refused_before_anything_is_written(
    changes: dict[str, Any], message: str, folder: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    options = {"model": vit(), "videos": folder / "videos", "out": "out", **changes}
    with pytest.raises(ValueError, match=message):
        encode(**options)
    assert not (tmp_path / "out").exists()


def test_the_command_writes_what_the_function_writes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(folder / "videos"), str(tmp_path / "out"), "--model", str(folder / "model")]
    main(["encode", *words, *WORDS])
    printed = capsys.readouterr()
    assert "7 videos with 39 frames in 4 shards" in printed.out
    assert f"left out: {BAD} cannot be read" in printed.err
    assert contents(tmp_path / "out") == contents(folder / "tokens")
    with pytest.raises(SystemExit):
        main(["encode", *words[:2]])
    assert "--model" in capsys.readouterr().err
