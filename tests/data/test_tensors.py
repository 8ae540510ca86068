import pytest
import torch

from glcan.data.tensors import Augmentation, TensorImages
from glcan.errors import DataError


def data(images=None, labels=None, **options):
    images = torch.randint(256, (12, 3, 8, 8), dtype=torch.uint8) if images is None else images
    labels = torch.arange(len(images)) % 2 if labels is None else labels
    sources = {"train": images, "test": images}, {"train": labels, "test": labels}
    return TensorImages("some", ["a", "b"], *sources, **options)


def test_crop_is_a_window_of_the_zero_padded_image():
    pixels = torch.randint(1, 256, (25, 3, 6, 6), dtype=torch.uint8)
    offsets = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    cropped = Augmentation(padding=2)(pixels, offsets, torch.ones(25, dtype=torch.bool))
    for image, (down, right), crop in zip(pixels, offsets.tolist(), cropped, strict=True):
        expected = torch.nn.functional.pad(image, (2, 2, 2, 2))[:, down : down + 6, right : right + 6]
        assert torch.equal(crop, expected)


def test_flip_mirrors_the_chosen_images_only():
    pixels = torch.randint(256, (2, 1, 4, 4), dtype=torch.uint8)
    flipped = Augmentation(flip=True)(pixels, torch.zeros(2, 2, dtype=torch.int64), torch.tensor([True, False]))
    assert torch.equal(flipped, torch.stack([pixels[0].flip(-1), pixels[1]]))


def test_all_offsets_and_both_directions_occur():
    pixels = torch.zeros(2000, 1, 3, 3, dtype=torch.uint8)
    pixels[:, :, 1, 0] = 255
    loader = data(pixels, augmentation=Augmentation(padding=1, flip=True), mean=[0], std=[1]).loader("train", 2000)
    images, _ = next(iter(loader))
    seen = {tuple(image.nonzero()[0].tolist()[1:]) if image.any() else None for image in images}
    assert seen == {None, *((row, column) for row in range(3) for column in range(3))}


def test_source_pixels_are_never_changed():
    pixels = torch.randint(256, (12, 3, 8, 8), dtype=torch.uint8)
    before = pixels.clone()
    for images, _ in data(pixels).loader("train", 12):
        images.zero_()
    assert torch.equal(pixels, before)


def test_pixels_are_normalised_by_the_train_images():
    images, _ = next(iter(data().loader("test", 12)))
    assert images.mean((0, 2, 3)).abs().max() < 1e-5
    assert (images.std((0, 2, 3), correction=0) - 1).abs().max() < 1e-5


def test_given_mean_and_std():
    images, _ = next(
        iter(data(torch.full((2, 1, 4, 4), 255, dtype=torch.uint8), mean=[0.5], std=[0.25]).loader("test", 2))
    )
    assert images.unique().tolist() == pytest.approx([2.0])


def test_size_interpolates():
    some = data(size=20)
    assert some.shape == (3, 20, 20)
    assert next(iter(some.loader("train", 4)))[0].shape == (4, 3, 20, 20)


def test_batches_lie_on_the_device_asked_for():
    images, labels = next(iter(data().loader("train", 4, device="meta")))
    assert (images.device.type, labels.device.type) == ("meta", "meta")


@pytest.mark.parametrize(
    "images",
    [torch.zeros(4, 3, 8, 8), torch.zeros(4, 8, 8, dtype=torch.uint8), torch.zeros(4, 3, 8, 9, dtype=torch.uint8)],
)
def test_images_of_another_kind_are_refused(images):
    with pytest.raises(DataError, match="H = W"):
        data(images)


def test_numbers_of_images_and_labels_must_agree():
    with pytest.raises(DataError, match="12 train images but 11 labels"):
        data(labels=torch.zeros(11, dtype=torch.int64))


def test_empty_data_set_is_refused():
    with pytest.raises(DataError, match="no train images"):
        data(torch.zeros(0, 3, 8, 8, dtype=torch.uint8), mean=[0] * 3, std=[1] * 3)


@pytest.mark.parametrize("label", [2, -1])
def test_label_out_of_range_is_named(label):
    with pytest.raises(DataError, match=rf"Label {label} of train image 5 .*0\.\.1"):
        data(labels=torch.tensor([0, 1, 0, 1, 0, label, 0, 1, 0, 1, 0, 1]))
