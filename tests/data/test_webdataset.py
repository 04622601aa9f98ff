"""Streams of tar files: what training and judging see, in which order, and what is broken."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any

import pytest
import torch
from PIL import Image
from streams import PER_SHARD, batches, gray, png, seen, write_shard, write_shards, write_tar
from torch import Tensor

from tokenlearner.data.dataset import UnreadableFile, require_order
from tokenlearner.data.factory import load_data
from tokenlearner.data.hub_datasets import TarShards
from tokenlearner.data.iterable import Record, StreamDataset
from tokenlearner.utils.limits import VARIABLE


def write_info(root: Path, split: str = "train", **changed: object) -> None:
    told = {
        "name": split,
        "num_samples": 20,
        "filenames": [f"train-{shard:03}.tar" for shard in range(4)],
        "shard_lengths": [PER_SHARD] * 4,
    }
    (root / "_info.json").write_text(json.dumps({"splits": {split: {**told, **changed}}}))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four shards of five images each."""
    return write_shards(tmp_path)


def load(root: Path, split: str = "train", **wanted: object) -> StreamDataset:
    usual = {"img_size": 8, "num_samples": 20, "num_classes": 20}
    return load_data("wds/", split, root=root, **{**usual, **wanted})


def noise(image: Image.Image) -> Tensor:
    return torch.rand(3, 8, 8)


def test_a_folder_that_was_packed_as_a_point_is_read(tmp_path: Path) -> None:
    members = [
        (f"./{i}.{end}", png(i) if end == "png" else b"%d" % i)
        for i in range(3)
        for end in ("png", "cls")
    ]
    path = write_tar(tmp_path / "train-0.tar", members)
    records = TarShards((str(path),)).records(0, 1, None)
    assert [getattr(record, "label", record) for record in records] == [0, 1, 2]


def test_an_image_that_is_packed_as_a_link_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "train-0.tar", [("0.png", png(0)), ("0.cls", b"0")])
    with tarfile.open(path, "a") as tar:
        entry = tarfile.TarInfo("1.png")
        entry.type, entry.linkname = tarfile.LNKTYPE, "0.png"
        tar.addfile(entry)
    first, error = TarShards((str(path),)).records(0, 1, None)
    assert not isinstance(first, UnreadableFile)
    assert re.search(r"holds 1\.png as a link; pack it with .* --hard-dereference", str(error))


# Training


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_has_every_image_once_in_full_batches(root: Path, workers: int) -> None:
    assert sorted(seen(load(root), workers=workers)) == list(range(20))
    found = batches(load(root), size=6, workers=workers)
    assert [len(batch.labels) for batch in found] == [6] * 3


@pytest.mark.parametrize("workers", [0, 2])
def test_every_image_and_epoch_has_changes_of_its_own_the_same_every_time(
    root: Path, workers: int
) -> None:
    before = torch.get_rng_state()
    one, two, other = (
        batches(load(root), transform=noise, workers=workers, epoch=epoch) for epoch in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    for first, second in zip(one, two, strict=True):
        assert torch.equal(first.labels, second.labels)
        assert torch.equal(first.images, second.images)
    assert len(torch.cat([batch.images[:, 0, 0, 0] for batch in one + other]).unique()) == 40


def test_every_epoch_and_every_seed_has_an_order_of_its_own_across_shards(root: Path) -> None:
    data = load(root)
    orders = [seen(data), seen(data, epoch=1), seen(data, seed=1), list(range(20))]
    assert len(set(map(tuple, orders))) == 4
    assert len({label // PER_SHARD for label in orders[0][:PER_SHARD]}) > 1


# Several processes


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_share_the_shards_without_overlap(root: Path, workers: int) -> None:
    data = load(root)
    parts = [
        seen(data, size=5, workers=workers, process=i, num_processes=2, epoch=3) for i in (0, 1)
    ]
    assert [len(part) for part in parts] == [10, 10]
    assert sorted(parts[0] + parts[1]) == list(range(20))


@pytest.mark.parametrize("process", range(3))
def test_processes_yield_as_many_batches_when_shards_do_not_divide(
    root: Path, process: int
) -> None:
    """20 images make 3 batches of 2 for each of 3 processes, two of which have 5 images."""
    assert len(batches(load(root), size=2, process=process, num_processes=3)) == 3


def test_processes_get_other_shards_in_another_epoch(root: Path) -> None:
    asked = {"size": 5, "process": 0, "num_processes": 2}
    assert len({frozenset(seen(load(root), epoch=i, **asked)) for i in range(6)}) > 1


def test_fewer_shards_than_processes_are_refused_by_every_process(root: Path) -> None:
    with pytest.raises(ValueError, match="wds/ has too few shards for 5 processes; write more"):
        load(root).train_batches(None, 2, epoch=0, seed=0, workers=0, process=0, num_processes=5)


def test_a_part_that_is_too_small_is_begun_again_in_another_order(root: Path) -> None:
    order = seen(load(root, num_samples=40))
    assert sorted(order[:20]) == sorted(order[20:]) == list(range(20))
    assert order[:20] != order[20:]


# What is broken


def break_one(root: Path) -> None:
    """The third image of a shard is broken."""
    images = {i: b"no image" if i == 2 else png(i) for i in range(5)}
    write_shard(root / "train-000.tar", images)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_left_out_and_reported(root: Path, workers: int) -> None:
    break_one(root)
    found = batches(load(root, num_samples=19), size=19, workers=workers)
    assert sorted(found[0].labels.tolist()) == [i for i in range(20) if i != 2]
    (broken,) = found[0].unreadable
    assert broken.startswith(f"{root}/train-000.tar: 002 cannot be read as an image")


@pytest.mark.parametrize(
    ("damage", "left"),
    [
        # 2 of 5 whole pairs, 4 blocks each
        (lambda path: path.write_bytes(path.read_bytes()[: 512 * 9 + 100]), [5, 6]),
        (lambda path: path.write_bytes(b"no tar file" * 100), []),
        (Path.unlink, []),
    ],
    ids=["cut", "no tar file", "gone"],
)
def test_a_tar_file_that_is_damaged_gives_what_it_has_and_is_reported(
    root: Path, damage: Callable[[Path], object], left: list[int]
) -> None:
    data, path = load(root), root / "train-001.tar"
    damage(path)
    (batch,) = data.eval_batches(30)
    assert batch.labels.tolist() == [*range(5), *left, *range(10, 20)]
    assert f"{path} cannot be read to its end" in " ".join(batch.unreadable)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([("0.txt", b"1"), ("0.cls", b"1")], "0 has no image, expected a file such as .jpg"),
        ([("0.png", png(1))], "0 has no label .*expected a .cls file with a number"),
        ([("0.png", png(1)), ("0.cls", b"cat")], "0 has no label .*expected a .cls file"),
        ([("0.png", png(1)), ("0.cls", b"20")], "0 has label 20, expected 0 to 19; pass num_cl"),
        ([("0.png", png(1)), ("0.cls", b"-1")], "0 has label -1, expected 0 to 19"),
    ],
    ids=["no image", "no label", "no number", "too large", "below 0"],
)
def test_what_does_not_make_a_pair_is_reported(
    root: Path, files: list[tuple[str, bytes]], message: str
) -> None:
    write_tar(root / "train-000.tar", files)
    (batch,) = load(root).eval_batches(30)
    assert len(batch.labels) == 15
    with pytest.raises(AssertionError, match=f"train-000.tar: {message}"):
        raise AssertionError(batch.unreadable[0])


def test_a_stream_of_which_nothing_can_be_read_is_refused_at_once_or_later(root: Path) -> None:
    data = load(root)
    for shard in range(4):
        write_tar(root / f"train-{shard:03}.tar", [("0.png", b"x"), ("0.cls", b"1")])
    with pytest.raises(ValueError, match="wds/ train: none of the first 4 images can be read"):
        load(root)
    with pytest.raises(ValueError, match="nothing in wds/ train can be read"):
        batches(data)


# Judging


@pytest.mark.parametrize("workers", [0, 2])
def test_judging_sees_every_image_once_plain_and_without_what_is_broken(
    root: Path, workers: int
) -> None:
    break_one(root)
    data = load(root, workers=workers)
    found = list(data.batches(6))
    assert [len(labels) for _, labels in found] == [6, 6, 6, 1]
    images, labels = (torch.cat(part) for part in zip(*found, strict=True))
    order = labels.tolist() if workers == 0 else sorted(labels.tolist())
    assert order == [0, 1, *range(3, 20)]
    plain = [data.eval_transform(gray(int(i))) for i in labels]
    torch.testing.assert_close(images, torch.stack(plain))


def test_a_last_batch_of_none_but_broken_images_is_not_judged_but_reported(root: Path) -> None:
    write_tar(root / "train-003.tar", [("0.png", b"x"), ("0.cls", b"1")])
    data = load(root)
    assert [len(labels) for _, labels in data.batches(15)] == [15]
    assert [len(batch.unreadable) for batch in data.eval_batches(15)] == [0, 1]


# What a stream tells


def test_info_tells_the_length_the_files_and_which_field_of_a_json_file_is_the_label(
    root: Path,
) -> None:
    write_info(root, num_samples=7, filenames=["json.tar"], alt_label="kind")
    label = json.dumps({"kind": 3, "other": 4}).encode()
    write_tar(root / "json.tar", [("0.png", png(0)), ("0.json", label), ("0.cls", b"9")])
    data = load(root, num_samples=None)
    assert len(data) == 7
    assert [labels.tolist() for _, labels in data.batches(30)] == [[3]]


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_the_held_out_shards_may_have_any_usual_name(root: Path, name: str) -> None:
    write_shards(root, 1, name)
    assert len(next(load(root, "test").batches(30))[1]) == PER_SHARD
    (root / f"{name}-000.tar").rename(root / "odd.tar")
    write_info(root, name, filenames=["odd.tar"])
    assert len(next(load(root, "test").batches(30))[1]) == PER_SHARD


def test_a_length_and_a_number_of_classes_that_are_not_known_are_asked_for(root: Path) -> None:
    data = load(root, num_samples=None)
    with pytest.raises(ValueError, match="num_samples"):
        len(data)
    with pytest.raises(ValueError, match="pass num_samples"):
        data.train_batches(None, 2, epoch=0, seed=0, workers=0)
    with pytest.raises(ValueError, match="num_classes"):
        load(root, num_classes=None)


def test_what_needs_an_order_is_refused_with_a_hint(root: Path) -> None:
    with pytest.raises(ValueError, match=r"wds/ is a stream .*draw 3 images.*'folder'"):
        require_order(load(root), "draw 3 images")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json", "is not as timm writes it .*JSONDecodeError"),
        ("[]", "is not as timm writes it"),
        ('{"splits": {"train": {"filenames": ["train-000.tar"]}}}', "as timm .*num_samples"),
        ('{"splits": {"train": {"filenames": ["x"], "num_samples": 1}}}', r"lacks .* \S+/x"),
    ],
    ids=["text", "list", "no length", "no file"],
)
def test_an_info_file_that_does_not_fit_is_refused(root: Path, text: str, message: str) -> None:
    (root / "_info.json").write_text(text)
    with pytest.raises(ValueError, match=f"{root}.* {message}"):
        load(root)


def test_missing_shards_name_what_was_looked_for(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"split 'test', expected test-\*\.tar, .*or an _info"):
        load(root, "test")
    with pytest.raises(ValueError, match="none is not a folder; pass the one"):
        load(tmp_path / "none")
    with pytest.raises(ValueError, match=r"wds/ needs the folder .*; pass root"):
        load_data("wds/")


@pytest.mark.parametrize(
    "name",
    ["img.{}", "a.b/{}", "train/{}", "{}.mask", "{}.v1.0"],
)
def test_members_of_any_name_belong_together_and_those_of_tools_are_passed_over(
    name: str, tmp_path: Path
) -> None:
    files = []
    for i in range(20):
        stem = name.format(f"{i:03}")
        folder, _, base = stem.rpartition("/")
        mac = f"{folder}/._{base}.png" if folder else f"._{base}.png"
        files += [(mac, b"0"), (f"__MACOSX/{stem}.png", b"0")]
        files += [(f"{stem}.png", png(i)), (f"{stem}.cls", b"%d" % i), (f"{stem}.seg.png", b"0")]
    write_tar(tmp_path / "val-000.tar", files)
    data = load(tmp_path, "test")
    labels = torch.cat([labels for _, labels in data.batches(8)])
    assert labels.tolist() == [*range(20)]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes")
def test_a_pipe_in_place_of_a_shard_does_not_hang(root: Path) -> None:
    os.mkfifo(root / "train-009.tar")
    records = TarShards((str(root / "train-009.tar"),)).records(0, 1, None)
    [reason] = records
    assert isinstance(reason, UnreadableFile)
    assert "pipe" in str(reason)


def header(size: int, kind: bytes = tarfile.REGTYPE, real: int = 0) -> bytes:
    """The head of a member; a sparse one declares its real size too."""
    entry = tarfile.TarInfo("0.png")
    entry.size, entry.type = size, kind
    block = bytearray(entry.tobuf(tarfile.GNU_FORMAT))
    block[483:495] = real.to_bytes(12, "big")
    block[483] |= 0x80 * (real > 0)
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + 256 + sum(block[156:]))
    return bytes(block)


def packed(by: Any, head: bytes, content: bytes = b"\0") -> bytes:
    """The head and 128 MiB of a byte, in streams of one MiB each."""
    return by.compress(head) + by.compress(content * 2**20) * 2**7


TARS = {
    "terabytes": (header(2**43), f"{VARIABLE}=8192 "),
    "sparse": (header(0, tarfile.GNUTYPE_SPARSE, 900 * 2**20), "pack it without --sparse"),
    "sparse terabytes": (header(0, tarfile.GNUTYPE_SPARSE, 2**43), "pack it without --sparse"),
    "zeros": (packed(bz2, header(2**28)), "100 times its size"),
    "long name": (packed(bz2, header(2**28, b"L"), b"a"), "100 times its size"),
    "attributes": (packed(gzip, header(2**28, b"x")), "100 times its size"),
    "no image": (packed(lzma, header(2**28, b"V")), "100 times its size"),
    "names of names": (header(0, b"L") * 5000, "recursion"),
    "a link to itself": (header(0, tarfile.SYMTYPE), "as a link"),
}


@pytest.mark.parametrize("name", TARS)
def test_a_tar_file_that_would_become_huge_is_refused(name: str, tmp_path: Path) -> None:
    content, reason = TARS[name]
    path = tmp_path / "train-000.tar"
    path.write_bytes(content + bytes(10240))
    start = process_time()
    [*_, last] = TarShards((str(path),)).records(0, 1, None)
    assert isinstance(last, UnreadableFile)
    assert reason in str(last)
    assert process_time() - start < 2


@pytest.mark.parametrize("by", [bz2, gzip, lzma])
def test_a_tar_file_may_be_compressed(by: Any, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [("0.png", png(0)), ("0.cls", b"1")])
    path.write_bytes(by.compress(path.read_bytes()))
    [record] = TarShards((str(path),)).records(0, 1, None)
    assert isinstance(record, Record)
    assert record.label == 1


@pytest.mark.parametrize("content", [b'{"label": Infinity}', b"[" * 100_000], ids=["inf", "deep"])
def test_odd_json_is_no_label(tmp_path: Path, content: bytes) -> None:
    path = write_tar(tmp_path / "x.tar", [("0.png", png(0)), ("0.json", content)])
    [reason] = TarShards((str(path),), "label").records(0, 1, None)
    assert isinstance(reason, UnreadableFile)
