"""The rule `glcan`: its options and budgets, the macro-skeleton, and one auxiliary network for each task."""

from __future__ import annotations

from glcan.rules.glcan.rule import GLCAN

__all__ = ["GLCAN"]
