"""Weights of a trained model: from a run directory, or from a file, into a model."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file
from torch import nn

from glcan.errors import CheckpointError, ConfigError
from glcan.training.building import create_model
from glcan.training.run import RunDirectory, check_code


def load_model(out: Path, *, trust: bool = False) -> nn.Module:
    """The trained model of a finished run, on the CPU, in evaluation mode.

    Args:
        out: a run directory.
        trust: import the model where the run names it as package.module:factory, which executes that code.

    Raises:
        RunError: no run is there, or it is not finished; or it names a model of somebody's own, and `trust` is not set.
        CheckpointError: the weights are damaged or belong to another model.
    """
    run = RunDirectory(out)
    summary = run.read_summary()
    if not trust:
        check_code(out, summary.config, ("model",))
    channels, size = summary.preprocessing["channels"], summary.preprocessing.get("size", 0)
    model = create_model(summary.config, len(summary.classes), (channels, size, size))
    load_weights(model, run.weights)
    return model.eval()


def save_weights(model: nn.Module, path: Path) -> None:
    """Writes a model's state_dict as .safetensors; of tied tensors the first name alone, as the format wants it."""
    state = model.state_dict()
    firsts = [names[0] for names in _tied(model).values()]
    # clones: the format knows no tensors that are parts of one another
    save_file({name: state[name].detach().clone(memory_format=torch.contiguous_format) for name in firsts}, path)


def check_weights(model: nn.Module) -> None:
    """Refuses, before any training, a model whose state_dict could not be written at its end.

    Raises:
        ConfigError: names what is in the way.
    """
    for name, value in model.state_dict().items():
        try:
            save({name: value.detach().flatten()[:1].clone()})
        except (AttributeError, KeyError, RuntimeError, ValueError, SafetensorError, NotImplementedError) as error:
            raise ConfigError(
                f"The state_dict of {type(model).__name__} has {name!r}, a {type(value).__name__} that cannot be saved "
                f"({error!r}). Make it a dense tensor, or leave it out of the state_dict (persistent=False)."
            ) from None


def _tied(model: nn.Module) -> dict[tuple[object, ...], list[str]]:
    """The names in the state_dict of each tensor; more than one where weights are tied."""
    found: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in model.state_dict().items():
        same = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        found.setdefault(same if tensor.numel() else (name,), []).append(name)
    return found


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
            state = load_file(path)
            for names in _tied(model).values():  # of which the file has one
                there = [name for name in names if name in state]
                state |= {name: state[there[0]] for name in names if there and name not in state}
            model.load_state_dict(state)
        else:
            model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (SafetensorError, RuntimeError, TypeError, OSError, EOFError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())
        reason = reason[:300] + ("..." if len(reason) > 300 else "")
        raise CheckpointError(
            f"The weights in {path} are damaged or do not fit the model {type(model).__name__} ({reason}). "
            "Name the model, its options and the data they were trained with."
        ) from None
