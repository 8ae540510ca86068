"""Training runs: configuration, the loop with exact resumption, evaluation, and what a run leaves behind."""

from glcan.training.config import RunConfig, load_recipe, read_recipe, recipe_names
from glcan.training.environment import environment, resolve_device
from glcan.training.evaluation import evaluate
from glcan.training.run import Metric, RunDirectory, Summary, read_metrics
from glcan.training.trainer import autocast_dtype, build, create_model, load_data, train
from glcan.training.weights import load_model, load_weights

__all__ = [
    "Metric",
    "RunConfig",
    "RunDirectory",
    "Summary",
    "autocast_dtype",
    "build",
    "create_model",
    "environment",
    "evaluate",
    "load_data",
    "load_model",
    "load_recipe",
    "load_weights",
    "read_metrics",
    "read_recipe",
    "recipe_names",
    "resolve_device",
    "train",
]
