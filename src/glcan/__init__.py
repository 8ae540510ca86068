"""glcan: train PyTorch vision models in a fraction of the memory, by supervised local learning.

Importing this loads torch alone; data sets, models, training and reports live in sub-packages.
"""

from __future__ import annotations

from glcan import errors
from glcan.errors import GlcanError, GradientLeak
from glcan.isolation import Boundary, Isolation
from glcan.learner import LocalLearner
from glcan.memory import LiveMemory, StepCost, measure_step
from glcan.plan import Plan
from glcan.planner import Forecast, plan
from glcan.profile import Profile, profile
from glcan.rules import names as methods

__version__ = "0.1.0"

__all__ = [
    "Boundary",
    "Forecast",
    "GlcanError",
    "GradientLeak",
    "Isolation",
    "LiveMemory",
    "LocalLearner",
    "Plan",
    "Profile",
    "StepCost",
    "__version__",
    "errors",
    "measure_step",
    "methods",
    "plan",
    "profile",
]
