from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def draw():
    """Pixels of a picture, uint8 [height, width, 3], smooth so that JPEG keeps them; different for every `seed`."""

    def make(seed=0, size=(40, 30)):
        coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        return np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BILINEAR))

    return make


@pytest.fixture
def tree(tmp_path, draw):
    """Makes an image folder: tree({"train/cat": 3, ...}) writes that many files; returns its root."""

    def make(counts, suffix=".png"):
        root = tmp_path / "images"
        number = 0
        for folder, count in counts.items():
            (root / folder).mkdir(parents=True, exist_ok=True)
            for index in range(count):
                Image.fromarray(draw(number)).save(Path(root / folder / f"{index}{suffix}"))
                number += 1
        return root

    return make
