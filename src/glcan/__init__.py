"""glcan: train PyTorch vision models with less memory, by supervised local learning and its rivals, honestly compared.

Importing this loads torch alone; data sets, models, training and reports live in sub-packages.
"""

from __future__ import annotations

from glcan import errors
from glcan.cost.cuts import Plan
from glcan.cost.step import StepCost, measure_step
from glcan.errors import GlcanError, GradientLeak
from glcan.inspect.isolation import Boundary, Isolation
from glcan.inspect.meter import LiveMemory
from glcan.inspect.profile import Profile
from glcan.inspect.record import profile
from glcan.learner import Learner
from glcan.planning import Forecast, plan
from glcan.strategies import names as methods

__version__ = "0.1.0"

__all__ = [
    "Boundary",
    "Forecast",
    "GlcanError",
    "GradientLeak",
    "Isolation",
    "Learner",
    "LiveMemory",
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
