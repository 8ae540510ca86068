"""Weights of a trained model: from a run directory, or from a file, into a model."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model as load_safetensors
from torch import nn

from glcan.errors import CheckpointError
from glcan.training.building import create_model
from glcan.training.run import RunDirectory


def load_model(out: Path) -> nn.Module:
    """The trained model of a finished run, on the CPU, in evaluation mode.

    Args:
        out: a run directory.

    Raises:
        RunError: no run is there, or it is not finished.
        CheckpointError: the weights are damaged or belong to another model.
    """
    run = RunDirectory(out)
    summary = run.read_summary()
    channels, size = summary.preprocessing["channels"], summary.preprocessing.get("size", 0)
    model = create_model(summary.config, len(summary.classes), (channels, size, size))
    load_weights(model, run.weights)
    return model.eval()


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state_dict into ``model``; every name must fit.

    Args:
        model: changed in place.
        path: a .safetensors file, or a state_dict that torch.save wrote.

    Raises:
        CheckpointError: the file is missing or damaged, or its names or shapes are not the model's.
    """
    if not path.is_file():
        raise CheckpointError(f"There are no weights at {path}. Name a .safetensors file or a saved state_dict.")
    try:
        if path.suffix == ".safetensors":
            load_safetensors(model, path)
        else:
            model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (SafetensorError, RuntimeError, TypeError, OSError, EOFError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())
        reason = reason[:300] + ("..." if len(reason) > 300 else "")
        raise CheckpointError(
            f"The weights in {path} are damaged or do not fit the model {type(model).__name__} ({reason}). "
            "Name the model, its options and the data they were trained with."
        ) from None
