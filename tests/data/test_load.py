"""Every named data set, read from a tiny folder of its usual layout."""

import gzip
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision.datasets as tv

from glcan.data import DETECTION, available, load
from glcan.data.photographs import PHOTOGRAPHS
from glcan.data.sets import SETS
from glcan.errors import ConfigError, DataError, UnknownName

RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def nowhere(tmp_path, monkeypatch):
    """No data set lies in a usual place, and no download is possible."""
    monkeypatch.chdir(tmp_path)
    for variable in ("XDG_DATA_HOME", "XDG_DATA_DIRS", "XDG_CACHE_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / variable.lower()))

    def refuse(*_, **__):
        raise OSError("no network in tests")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


@pytest.fixture
def any_checksum(monkeypatch):
    """Lets torchvision take our tiny files for the real ones."""
    for module in ("cifar", "svhn", "stl10"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda path, md5=None: True)


def write_idx(path, values, compress):
    header = struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    content = header + values.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    if compress:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)


def write_fashion(folder, compress=True, train_labels=None):
    for prefix, count in (("train", 20), ("t10k", 10)):
        labels = np.arange(count) % 10 if prefix == "t10k" or train_labels is None else train_labels
        write_idx(folder / f"{prefix}-images-idx3-ubyte", RANDOM.integers(0, 256, (count, 28, 28)), compress)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", labels, compress)


def write_cifar(root, kind):
    cls = {"cifar10": tv.CIFAR10, "cifar100": tv.CIFAR100}[kind]
    folder = root / cls.base_folder
    folder.mkdir(parents=True)
    key = "labels" if kind == "cifar10" else "fine_labels"
    names = [f"class {i}" for i in range(10 if kind == "cifar10" else 100)]
    for file, _ in (*cls.train_list, *cls.test_list):
        pixels = np.repeat(np.arange(4, dtype=np.uint8)[:, None], 3072, 1)
        (folder / file).write_bytes(pickle.dumps({"data": pixels, key: [0, 1, 2, 3]}))
    (folder / cls.meta["filename"]).write_bytes(pickle.dumps({cls.meta["key"]: names}))


def write_svhn(root):
    from scipy.io import savemat

    root.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        pixels = RANDOM.integers(0, 256, (32, 32, 3, 5), dtype=np.uint8)
        savemat(root / f"{split}_32x32.mat", {"X": pixels, "y": np.array([[1], [10], [9], [3], [4]], dtype=np.uint8)})


def write_stl10(root):
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    for split in ("train", "test"):
        RANDOM.integers(0, 256, (4, 3, 96, 96), dtype=np.uint8).tofile(folder / f"{split}_X.bin")
        np.array([1, 10, 2, 3], dtype=np.uint8).tofile(folder / f"{split}_y.bin")


def test_digits_by_default_parameters():
    data = load("digits")
    assert data.shape == (1, 16, 16)
    assert data.classes == list("0123456789")
    assert (data.size("train"), data.size("test")) == (SETS["digits"].train, SETS["digits"].test)
    assert torch.bincount(data.labels("test")).min() >= 34
    assert torch.equal(load("digits", seed=7).labels("test"), data.labels("test"))


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("below", ["", "FashionMNIST/raw", "fashion-mnist"])
def test_fashion_mnist_from_a_folder(tmp_path, compress, below):
    write_fashion(tmp_path / "root" / below, compress)
    data = load("fashion-mnist", root=tmp_path / "root")
    assert data.shape == (1, 28, 28)
    assert data.classes[0] == "T-shirt/top"
    assert (data.size("train"), data.size("test")) == (20, 10)
    images, labels = next(iter(data.loader("test", 10)))
    assert images.shape == (10, 1, 28, 28)
    assert labels.tolist() == list(range(10))


@pytest.mark.parametrize(
    "place",
    [
        "xdg_data_home/datasets/fashion-mnist",
        "xdg_data_dirs/datasets/fashion-mnist",
        "xdg_cache_home/glcan/FashionMNIST/raw",
    ],
)
def test_fashion_mnist_from_the_usual_places(tmp_path, place):
    write_fashion(tmp_path / place)
    assert load("fashion-mnist").size("train") == 20
    assert {info.name: info.found for info in available()}["fashion-mnist"] == tmp_path / place


def test_missing_data_states_places_and_remedies(tmp_path):
    with pytest.raises(
        DataError, match=r"looked in: .*apt-get install dataset-fashion-mnist.*--data-root.*download=True"
    ):
        load("fashion-mnist")
    with pytest.raises(DataError, match=r"'cifar10' is not there.*download=True"):
        load("cifar10", root=tmp_path)


def test_explicit_root_without_the_data_points_to_the_usual_place(tmp_path):
    write_fashion(tmp_path / "xdg_data_home/datasets/fashion-mnist")
    with pytest.raises(DataError, match=r"Or leave out --data-root: .*xdg_data_home"):
        load("fashion-mnist", root=tmp_path / "elsewhere")


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10", "cifar100", "svhn", "stl10"])
def test_failed_download_is_a_data_error(tmp_path, name):
    with pytest.raises(DataError, match="cannot be read or downloaded"):
        load(name, root=tmp_path / "new", download=True)


@pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"])
@pytest.mark.parametrize(
    "damage", [lambda content: content[:-3], lambda _: b"", lambda content: content[:9], lambda _: b"text" * 9]
)
@pytest.mark.parametrize("compress", [True, False])
def test_damaged_idx_file_is_named(tmp_path, file, damage, compress):
    write_fashion(tmp_path, compress)
    path = tmp_path / (f"{file}.gz" if compress else file)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=rf"{path.name}' (is damaged|holds)"):
        load("fashion-mnist", root=tmp_path)


def test_idx_file_of_another_kind_is_named(tmp_path):
    write_fashion(tmp_path, compress=False)
    write_idx(tmp_path / "train-images-idx3-ubyte", np.zeros((20, 784)), compress=False)
    with pytest.raises(DataError, match="2 dimensions"):
        load("fashion-mnist", root=tmp_path)


def test_numbers_of_images_and_labels_must_agree(tmp_path):
    write_fashion(tmp_path, train_labels=np.zeros(19))
    with pytest.raises(DataError, match="20 train images but 19 labels"):
        load("fashion-mnist", root=tmp_path)


def test_label_out_of_range_is_named(tmp_path):
    write_fashion(tmp_path, train_labels=np.array([0] * 12 + [10] + [1] * 7))
    with pytest.raises(DataError, match=r"Label 10 of train image 12 .*0\.\.9"):
        load("fashion-mnist", root=tmp_path)


@pytest.mark.parametrize(("kind", "train"), [("cifar10", 20), ("cifar100", 4)])
@pytest.mark.usefixtures("any_checksum")
def test_cifar(tmp_path, kind, train):
    write_cifar(tmp_path / "root", kind)
    data = load(kind, root=tmp_path / "root")
    assert data.shape == (3, 32, 32)
    assert data.classes[1] == "class 1"
    assert (data.size("train"), data.size("test")) == (train, 4)
    images, _ = next(iter(data.loader("test", 4)))
    mean, std = SETS[kind].mean, SETS[kind].std
    expected = torch.tensor([(2 / 255 - m) / s for m, s in zip(mean, std, strict=True)])
    assert torch.allclose(images[2], expected[:, None, None].expand(3, 32, 32), atol=1e-6)
    inside = tmp_path / "root" / {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[kind]
    assert load(kind, root=inside).size("train") == train


def test_cifar_with_another_checksum_is_refused(tmp_path):
    write_cifar(tmp_path, "cifar10")
    with pytest.raises(DataError, match=r"corrupted.*remove them"):
        load("cifar10", root=tmp_path)


@pytest.mark.usefixtures("any_checksum")
def test_svhn(tmp_path):
    write_svhn(tmp_path)
    data = load("svhn", root=tmp_path)
    assert data.shape == (3, 32, 32)
    assert data.labels("train").tolist() == [1, 0, 9, 3, 4]
    assert not SETS["svhn"].augmentation.flip


@pytest.mark.usefixtures("any_checksum")
def test_stl10(tmp_path):
    write_stl10(tmp_path)
    data = load("stl10", root=tmp_path, image_size=32)
    assert data.shape == (3, 32, 32)
    assert data.labels("train").tolist() == [0, 9, 1, 2]
    raw = torch.from_numpy(np.fromfile(tmp_path / "stl10_binary/test_X.bin", dtype=np.uint8).reshape(4, 3, 96, 96))
    native, _ = next(iter(load("stl10", root=tmp_path).loader("test", 4)))
    pixels = native[3, 0] * SETS["stl10"].std[0] + SETS["stl10"].mean[0]
    assert torch.equal(pixels.mul(255).round().to(torch.uint8), raw[3, 0].T)
    assert next(iter(data.loader("train", 4)))[0].shape == (4, 3, 32, 32)


def test_unknown_data_set():
    with pytest.raises(UnknownName, match=r"'fashion-mnist'.*imagefolder"):
        load("fashon-mnist")


def test_image_size_out_of_range():
    with pytest.raises(ConfigError, match="image_size=0"):
        load("digits", image_size=0)


def test_available_lists_every_data_set():
    infos = {info.name: info for info in available()}
    assert list(infos) == [*SETS, "imagefolder", *PHOTOGRAPHS, *DETECTION]
    assert infos["digits"].found is not None
    assert infos["cifar10"].found is None
    assert all(info.remedy for info in infos.values())


def test_available_looks_in_a_root(tmp_path):
    write_fashion(tmp_path / "root")
    assert {i.name: i.found for i in available(tmp_path / "root")}["fashion-mnist"] == tmp_path / "root"


def test_importing_data_loads_neither_torchvision_nor_sklearn():
    code = (
        "import sys, glcan.data; glcan.data.available(); sys.exit(bool({'torchvision', 'sklearn'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
