"""Folders, names and lists as people have them: hidden files, links, names that are not UTF-8, encodings."""

import os
import shutil

import pytest
from PIL import Image

from glcan.data import available, load, load_pairs
from glcan.data.files import images_below, inside, read_lines
from glcan.errors import DataError


def sizes(data):
    return tuple(data.size(split) for split in ("train", "val", "test"))


def put(path, draw, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(draw(seed)).save(path)


# ---------------------------------------------------------------- hidden files


def test_hidden_folders_and_files_in_a_class_do_not_count(tree):
    root = tree({"cat": 6, "dog": 6, "dog/indoors/.thumbnails": 3})
    copies = root / "cat/.ipynb_checkpoints"
    copies.mkdir()
    for path in (root / "cat").glob("*.png"):
        shutil.copy(path, copies / f"{path.stem}-checkpoint.png")
    (root / "dog/._0.png").write_text("what macOS leaves on other disks")
    data = load("imagefolder", root=root, image_size=16)
    assert data.size("train") + data.size("test") == 12


def test_hidden_files_are_no_photographs(tmp_path, draw):
    for index in range(5):
        put(tmp_path / f"photos/{index}.png", draw, index)
    put(tmp_path / "photos/.cache/6.png", draw)
    (tmp_path / "photos/._0.png").write_text("what macOS leaves on other disks")
    assert load_pairs("photofolder", root=tmp_path / "photos", patch=8).size("train") == 4
    (tmp_path / "none").mkdir()
    shutil.copy(tmp_path / "photos/0.png", tmp_path / "none/.0.png")
    with pytest.raises(DataError, match="'set5' is not there"):
        load_pairs("set5", root=tmp_path / "none")


# ---------------------------------------------------------------- links


@pytest.mark.parametrize("target", ["cat", ".", "cat/indoors"])
def test_links_that_lead_back_are_not_followed(tree, target):
    root = tree({"cat": 4, "dog": 4, "cat/indoors": 2})
    (root / "cat/indoors/back").symlink_to(root / target)
    with pytest.warns(UserWarning, match=r"1 links in '.*cat' lead back .*indoors/back'. Remove") as caught:
        data = load("imagefolder", root=root, image_size=16)
    assert len(caught) == 1
    assert sizes(data) == (8, 0, 2)


def test_a_link_beside_the_classes_that_leads_back_is_no_class(tree):
    root = tree({"cat": 4, "dog": 4})
    (root / "all").symlink_to(root)
    with pytest.warns(UserWarning, match=r"1 links in .* lead back .*images/all'"):
        data = load("imagefolder", root=root, image_size=16)
    assert data.classes == ["cat", "dog"]
    assert sizes(data) == (6, 0, 2)


def test_links_between_two_folders_end(tmp_path, draw):
    for name in ("a", "b"):
        put(tmp_path / name / "0.png", draw)
    (tmp_path / "a/to_b").symlink_to(tmp_path / "b")
    (tmp_path / "b/to_a").symlink_to(tmp_path / "a")
    with pytest.warns(UserWarning, match="a/to_b/to_a"):
        assert [str(path.relative_to(tmp_path)) for path in images_below(tmp_path / "a")] == ["a/0.png", "a/to_b/0.png"]


def test_links_out_of_the_root_are_followed(tree, tmp_path):
    root = tree({"elsewhere/cat": 4, "elsewhere/dog/big": 4})
    linked = tmp_path / "linked"
    (linked / "dog").mkdir(parents=True)
    (linked / "cat").symlink_to(root / "elsewhere/cat")
    (linked / "dog/big").symlink_to(root / "elsewhere/dog/big")
    assert sizes(load("imagefolder", root=linked, image_size=16)) == (6, 0, 2)
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "album").symlink_to(root / "elsewhere/cat")
    assert load_pairs("photofolder", root=photos, patch=8).size("train") == 3


def test_a_link_that_leads_nowhere_is_named(tree):
    root = tree({"cat": 4, "dog": 4})
    (root / "cat/9.png").symlink_to(root / "gone.png")
    with pytest.raises(DataError, match=r"cat/9.png' cannot be read: there is no such file"):
        load("imagefolder", root=root, image_size=16)


def test_links_that_put_an_image_into_two_classes_or_splits_are_said_once(tree):
    root = tree({"train/cat": 4, "train/dog": 4, "val/cat": 1, "val/dog": 1})
    (root / "val/cat/7.png").symlink_to(root / "train/cat/0.png")
    os.link(root / "train/cat/1.png", root / "train/dog/8.png")
    wanted = (
        r"2 images of 'imagefolder' are in two parts.*cat/0.png' \(train as 'cat'\) is .*cat/7.png' \(test as 'cat'\)"
    )
    with pytest.warns(UserWarning, match="in two parts of it") as caught:
        load("imagefolder", root=root, image_size=16)
    assert len(caught) == 1
    (root / "train/dog/8.png").unlink()
    with pytest.warns(UserWarning, match=wanted.replace("2 images", "1 images")):
        load("imagefolder", root=root, image_size=16)
    (root / "val/cat/7.png").rename(root / "train/cat/7.png")  # the same image twice, in one place: that does no harm
    assert load("imagefolder", root=root, image_size=16).size("train") == 9


def test_photographs_that_are_in_train_and_test_are_said(tmp_path, draw):
    put(tmp_path / "p/train/a.png", draw)
    (tmp_path / "p/test").symlink_to(tmp_path / "p/train")
    with pytest.warns(
        UserWarning, match=r"1 images of the photographs.*train/a.png' \(train\) is .*test/a.png' \(test\)"
    ):
        load_pairs("photofolder", root=tmp_path / "p", patch=8)


def test_a_folder_that_cannot_be_listed_is_named(tree, monkeypatch):
    root = tree({"cat": 4, "dog": 4, "dog/more": 1})
    scandir = os.scandir

    def refuse(folder):
        if str(folder).endswith("more"):  # file permissions do not stop root
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(DataError, match=r"dog/more' cannot be listed: Permission denied"):
        load("imagefolder", root=root, image_size=16)


def test_a_root_that_is_no_folder_holds_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "none", tmp_path / "file"):
        assert {info.name for info in available(root) if info.found} >= {"digits"}
        assert {info.name: info.found for info in available(root)}["set5"] is None


# ---------------------------------------------------------------- names


def test_file_names_that_are_not_utf8(tree, tmp_path, draw):
    root = tree({"cat": 4, "dog": 4})
    odd = os.fsdecode(b"caf\xe9 [1].png")
    put(root / "cat" / odd, draw)
    assert sizes(load("imagefolder", root=root, image_size=16)) == (7, 0, 2)
    assert load_pairs("photofolder", root=root / "cat", patch=8).size("train") == 4
    (root / "cat" / odd).write_bytes(b"")
    with pytest.raises(DataError, match=r"caf\\udce9 \[1\].png' cannot be read"):
        load("imagefolder", root=root, image_size=16)
    with pytest.warns(UserWarning, match=r"caf\\udce9 \[1\].png'"):
        load("imagefolder", root=root, image_size=16, skip_corrupt=True)


def test_a_class_that_is_not_utf8_is_refused(tree):
    root = tree({"cat": 4, "dog": 4})
    (root / "dog").rename(root / os.fsdecode(b"ca\xf1"))
    with pytest.raises(DataError, match=r"'ca\\udcf1' .* is not in UTF-8.*rename"):
        load("imagefolder", root=root, image_size=16)


@pytest.mark.parametrize("name", ["../../x.png", "/etc/x.png", "a/../../../x.png"])
def test_names_that_lead_out_are_refused(tmp_path, name):
    with pytest.raises(DataError, match=rf"The list names '{name}', which leads out of .*relative to that"):
        inside(tmp_path, tmp_path / "images", name, "The list")


def test_names_that_stay_inside_are_kept(tmp_path):
    for name in ("x.png", "a/x.png", "../other/x.png", "..x.png"):
        assert inside(tmp_path, tmp_path / "images", name, "The list") == tmp_path / "images" / name
    assert inside(tmp_path, tmp_path, str(tmp_path / "x.png"), "The list") == tmp_path / "x.png"


# ---------------------------------------------------------------- pairs


@pytest.mark.parametrize(
    ("high", "low", "message"),
    [
        (["a.png", "a.jpg"], ["ax2.png"], r"HR/a.jpg' and '.*HR/a.png' differ in the ending"),
        (["a.png"], ["ax2.png", "ax2.bmp"], r"ax2.bmp' and '.*ax2.png' differ in the ending"),
        (["a.png"], ["ax2.png", "a.png"], r"HR/a.png' has two low-resolution partners, '.*ax2.png' and '.*a.png'"),
    ],
)
def test_pairs_that_names_do_not_tell(tmp_path, draw, high, low, message):
    for folder, names in (("HR", high), ("LR_bicubic/X2", low)):
        for name in names:
            put(tmp_path / folder / name, draw)
    with pytest.raises(DataError, match=message):
        load_pairs("benchmark", root=tmp_path)


def test_a_high_resolution_name_that_ends_in_the_scale(tmp_path, draw):
    put(tmp_path / "HR/carx2.png", draw)
    (tmp_path / "LR_bicubic/X2").mkdir(parents=True)
    Image.fromarray(draw(0, (20, 15))).save(tmp_path / "LR_bicubic/X2/carx2.png")
    assert load_pairs("benchmark", root=tmp_path).size("test") == 1


def test_a_split_of_which_no_photograph_can_be_read(tmp_path, draw):
    put(tmp_path / "train/a.png", draw)
    (tmp_path / "test").mkdir()
    (tmp_path / "test/b.png").write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="1 of 2 images cannot be read"),
        pytest.raises(DataError, match=r"None of the 1 test images can be read. The first: .*b.png"),
    ):
        load_pairs("photofolder", root=tmp_path, patch=8, skip_corrupt=True)


# ---------------------------------------------------------------- lists


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le-bom"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lists_in_every_encoding_that_says_which_it_is(tmp_path, encoding, end):
    text = end.join(("photo one", "", "  café ", "中文\u2028x"))
    content = b"\xff\xfe" + text.encode("utf-16-le") if encoding == "utf-16-le-bom" else text.encode(encoding)
    (tmp_path / "list.txt").write_bytes(content)
    assert read_lines(tmp_path / "list.txt") == ["photo one", "café", "中文\u2028x"]


def test_lists_of_names_that_are_not_utf8(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"caf\xe9\nx\n")
    assert read_lines(tmp_path / "list.txt") == [os.fsdecode(b"caf\xe9"), "x"]


@pytest.mark.parametrize("content", ["a\nb\n".encode("utf-16-le"), b"\xff\xfea", "ab".encode("utf-32")])
def test_lists_that_are_no_text_are_refused(tmp_path, content):
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(DataError, match=r"list.txt' .*Save it as .*UTF-8"):
        read_lines(tmp_path / "list.txt")
