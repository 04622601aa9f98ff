"""Listing files: folders a class and lists, the order of both, and everything that is refused."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from torchvision.datasets import ImageFolder

from tokenlearner.data.file_lists import list_labeled_files

ENDS = (".png", ".jpg")


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def make_folders(root: Path, train: str = "train", test: str = "val") -> Path:
    """Classes cat and dog with a file each in both splits."""
    touch(*(root / split / name / "0.png" for split in (train, test) for name in ("dog", "cat")))
    return root


def make_lists(root: Path, text: str, name: str = "train.csv") -> Path:
    touch(*(root / f"{letter}.png" for letter in "abc"))
    (root / name).write_text(text, encoding="utf-8", errors="surrogateescape")
    return root


def refused(root: Path, message: str, split: str = "train") -> None:
    with pytest.raises(ValueError, match=message):
        list_labeled_files(root, split, ENDS)


# Folders


def test_files_and_classes_are_those_of_torchvision_in_its_order(tmp_path: Path) -> None:
    names = ["b/1.png", "b/10.png", "b/2.JPG", "B/0.jpg", "a b/x.y/0.png"]
    names += ["b/sub/0.png", "b/sub/z/0.png", "b/sub-x/0.png"]
    touch(*(tmp_path / "train" / name for name in names))
    theirs = ImageFolder(str(tmp_path / "train"))
    paths, labels, classes = list_labeled_files(tmp_path, "train", ENDS)
    assert list(zip(paths, labels, strict=True)) == theirs.samples
    assert list(classes) == theirs.classes


def test_folders_of_classes_without_splits_are_to_train_on(tmp_path: Path) -> None:
    touch(tmp_path / "cat" / "0.png", tmp_path / "dog" / "a" / "1.png", tmp_path / "notes.txt")
    paths, labels, classes = list_labeled_files(tmp_path, "train", ENDS)
    assert [os.path.relpath(path, tmp_path) for path in paths] == ["cat/0.png", "dog/a/1.png"]
    assert (labels, classes) == ([0, 1], ("cat", "dog"))
    refused(tmp_path, "one part, folders of classes; hold a share .* held_out=0.1", "val")


@pytest.mark.parametrize("beside", ["train2017/x/0.png", "Validation/x/0.png", "test.csv"])
def test_what_may_be_splits_is_not_taken_for_classes(beside: str, tmp_path: Path) -> None:
    touch(tmp_path / "cat" / "0.png", tmp_path / "dog" / "0.png", tmp_path / beside)
    refused(tmp_path, "has nothing for split 'train'.*if these are classes, make train/ and val/")


def test_a_single_folder_is_not_taken_for_a_class(tmp_path: Path) -> None:
    touch(tmp_path / "images" / "cat" / "0.png")
    refused(tmp_path, "has nothing for split 'train'.*it holds images")


def test_other_extensions_and_what_is_hidden_or_beside_the_classes_are_left_out(
    tmp_path: Path,
) -> None:
    names = ["a/0.PNG", "a/1.txt", "a/2.png.bak", "a/png", "a/._0.png", "a/.cache/0.png"]
    names += [".ipynb_checkpoints/0.png", "0.png"]
    touch(*(tmp_path / "train" / name for name in names))
    paths, _, classes = list_labeled_files(tmp_path, "train", ENDS)
    assert ([Path(path).name for path in paths], classes) == (["0.PNG"], ("a",))


def test_folders_that_systems_make_are_no_classes_and_hold_no_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = ("__MACOSX", "@eaDir", "lost+found")
    names = [*(f"{name}/0.png" for name in made), *(f"a/{name}/0.png" for name in made)]
    touch(*(tmp_path / "train" / name for name in (*names, "a/1.png")))
    paths, _, classes = list_labeled_files(tmp_path, "train", ENDS)
    assert ([Path(path).name for path in paths], classes) == (["1.png"], ("a",))
    assert "@eaDir, __MACOSX, lost+found left out" in caplog.text


COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"  # one name, as Linux and as macOS write it


def test_names_of_classes_count_in_one_form_of_unicode(tmp_path: Path) -> None:
    make_lists(tmp_path, f"path,label\na.png,{COMPOSED}\nb.png,{DECOMPOSED}\n")
    touch(tmp_path / "val" / DECOMPOSED / "0.png")
    for split in ("train", "val"):
        _, labels, classes = list_labeled_files(tmp_path, split, ENDS)
        assert ({*labels}, classes) == ({0}, (COMPOSED,))
    touch(tmp_path / "val" / COMPOSED / "0.png")
    refused(tmp_path, r"cafe\\u0301' and 'caf\\xe9' are one name", "val")


def test_a_link_that_leads_back_does_not_hang_or_repeat(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere" / "0.png")
    (tmp_path / "train").mkdir()
    os.symlink(tmp_path / "elsewhere", tmp_path / "train" / "a")
    os.symlink(tmp_path / "train" / "a", tmp_path / "elsewhere" / "again")
    assert len(list_labeled_files(tmp_path, "train", ENDS)[0]) == 1


@pytest.mark.parametrize("what", ["a folder", "a file", "a list", "a list of links"])
def test_files_out_of_the_root_are_taken_on_request_only(what: str, tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside" / "0.png"
    touch(outside, root / "train" / "b" / "1.png")
    if what == "a folder":
        os.symlink(outside.parent, root / "train" / "a")
    else:
        (root / "train" / "a").mkdir()
        os.symlink(outside, root / "train" / "a" / "0.png")
    if what.startswith("a list"):
        named = outside if what == "a list" else "train/a/0.png"
        make_lists(root, f"path,label\n{named},a\ntrain/b/1.png,b\n")
    os.symlink(root, tmp_path / "moved")  # the root itself may be a link
    for place in (root, tmp_path / "moved"):
        with pytest.raises(ValueError, match=f"{outside.parent}.*follow_links"):
            list_labeled_files(place, "train", ENDS)
        assert len(list_labeled_files(place, "train", ENDS, follow_links=True)[0]) == 2


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_the_held_out_split_may_have_any_usual_name_before_test(tmp_path: Path, name: str) -> None:
    make_folders(make_folders(tmp_path, test="test"), test=name)
    assert f"/{name}/" in list_labeled_files(tmp_path, "val", ENDS)[0][0]
    assert "/test/" in list_labeled_files(tmp_path, "test", ENDS)[0][0]


# Lists


def test_a_list_gives_paths_from_the_root_in_its_order_and_sorted_classes(tmp_path: Path) -> None:
    make_lists(tmp_path, "path,label\nb.png,zebra\na.png,ape\nc.png,zebra\n")
    paths, labels, classes = list_labeled_files(tmp_path, "train", ENDS)
    assert paths == [str(tmp_path / f"{letter}.png") for letter in "bac"]
    assert (labels, classes) == ([1, 0, 1], ("ape", "zebra"))


def test_a_list_may_hold_quotes_spaces_empty_lines_a_mark_and_whole_paths(tmp_path: Path) -> None:
    whole = tmp_path / "else, where" / "0.gif"
    touch(whole)
    make_lists(tmp_path, f'\ufeffpath, label\n\n"{whole}", big cat\r\na.png,dog\n')
    paths, labels, classes = list_labeled_files(tmp_path, "train", ENDS)
    assert paths == [str(whole), str(tmp_path / "a.png")]
    assert (labels, classes) == ([0, 1], ("big cat", "dog"))


def test_a_list_goes_before_a_folder_of_its_name_and_the_other_split_may_be_a_folder(
    tmp_path: Path,
) -> None:
    make_lists(make_folders(tmp_path), "path,label\ntrain/cat/0.png,dog\na.png,cat\n")
    assert list_labeled_files(tmp_path, "train", ENDS)[1] == [1, 0]
    assert "/val/" in list_labeled_files(tmp_path, "test", ENDS)[0][0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "does not start with the line path,label"),
        ("a.png,cat\n", "does not start with the line path,label"),
        ("path,label\n", "lists no file"),
        ("path,label\na.png\nb.png,cat\n", "has line 2 without a path and a label"),
        ("path,label\nb.png,cat\n\na.png,\n", "has line 4 without a path and a label"),
        ("path,label\na.png,cat,1\n", "has line 2 without"),
        ("path,label\na.png,cat\nz.png,dog\n", r".* \S+z.png \(line 3\); correct"),
        ("path,label\n" + "z.png,cat\n" * 8, r"\(line 6\), ... \(8 in all\)"),
        ('path,label\n"a.png,' + "x" * 140_000, "cannot be read as a list .*field larger"),
        ("path,label\n\udcff\udcfe,cat\n", "cannot be read as a list .*UTF-8"),
    ],
    ids=[
        *("empty", "no header", "no row", "one cell", "no label"),
        *("3 cells", "gone", "many", "csv", "no text"),
    ],
)
def test_a_list_that_is_not_one_is_refused(tmp_path: Path, text: str, message: str) -> None:
    refused(make_lists(tmp_path, text), re.escape(str(tmp_path / "train.csv")) + f" .*{message}")


def test_a_file_listed_twice_is_counted_or_with_two_labels_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_lists(tmp_path, "path,label\na.png,cat\nb.png,dog\n./a.png,cat\n")
    assert list_labeled_files(tmp_path, "train", ENDS)[1] == [0, 1, 0]
    assert "lists 1 file more than once" in caplog.text
    make_lists(tmp_path, "path,label\na.png,cat\nb.png,dog\n./a.png,dog\n")
    refused(tmp_path, r"a\.png as 'cat' \(line 2\) and as 'dog' \(line 4\)")


# Refusals


def test_a_root_that_is_missing_or_a_file_is_refused(tmp_path: Path) -> None:
    touch(tmp_path / "file")
    for name in ("none", "file"):
        refused(tmp_path / name, f"{name} is not a folder; pass root")


LOOKED = "val/ or val.csv, valid/ or valid.csv, validation/ or validation.csv, test/ or test.csv"


@pytest.mark.parametrize(
    ("files", "split", "message"),
    [
        (["train/a/0.png"], "val", f"nothing for split 'val', expected {LOOKED}; make train/"),
        (
            ["a/0.png", "b/0.png", "test/a/0.png"],
            "train",
            "it holds a, b: if these are classes, make train/ and",
        ),
        (["train/0.png"], "train", "train holds no folder; make one for each class"),
        (["train/a/0.png", "train/b/0.txt"], "train", r"train/b holds .* ends in \.png, \.jpg"),
    ],
    ids=["no split", "no splits", "no classes", "no files"],
)
def test_folders_that_do_not_fit_are_refused(
    tmp_path: Path, files: list[str], split: str, message: str
) -> None:
    touch(*(tmp_path / file for file in files))
    refused(tmp_path, message, split)


@pytest.mark.parametrize("split", ["train", "test"])
def test_splits_with_different_classes_are_refused_from_either_side(
    tmp_path: Path, split: str
) -> None:
    make_folders(tmp_path)
    touch(tmp_path / "train" / "bird" / "0.png", tmp_path / "val" / "emu" / "0.png")
    refused(tmp_path, r"different classes: .*/val lacks bird[;]", split)
    refused(tmp_path, r"different classes: .*/train lacks emu[;]", split)
    make_lists(tmp_path, "path,label\na.png,cat\nb.png,dog\n")
    make_lists(tmp_path, "path,label\na.png,cat\n", "val.csv")
    refused(tmp_path, r"different classes: \S+/val\.csv lacks dog; both", split)
