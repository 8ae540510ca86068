"""What every test starts from: one thread, no network, no display, the same random numbers."""

import os

# Before torch, matplotlib and huggingface_hub are imported: they read these once.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["MPLBACKEND"] = "Agg"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["COLUMNS"] = "160"  # rich and typer wrap at the terminal's width, and tests look for whole sentences
os.environ["NO_COLOR"] = "1"

import random

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
