"""Training runs: configuration, the loop with exact resumption, evaluation, and what a run leaves behind."""

from glcan.training.building import autocast_dtype, build, class_names, create_model, load_data
from glcan.training.config import RunConfig, load_recipe, read_recipe, recipe_names
from glcan.training.evaluation import MEASURES, evaluate, formatted
from glcan.training.machine import environment, resolve_device
from glcan.training.run import Metric, RunDirectory, Summary, read_metrics
from glcan.training.trainer import train
from glcan.training.upscaling import open_picture, upscale, upscale_picture
from glcan.training.weights import load_model, load_weights

__all__ = [
    "MEASURES",
    "Metric",
    "RunConfig",
    "RunDirectory",
    "Summary",
    "autocast_dtype",
    "build",
    "class_names",
    "create_model",
    "environment",
    "evaluate",
    "formatted",
    "load_data",
    "load_model",
    "load_recipe",
    "load_weights",
    "open_picture",
    "read_metrics",
    "read_recipe",
    "recipe_names",
    "resolve_device",
    "train",
    "upscale",
    "upscale_picture",
]
