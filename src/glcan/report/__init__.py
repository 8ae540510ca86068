"""Comparisons of methods: run them, meter them, and put them into a table, a JSON file and plots."""

from glcan.report.comparison import compare
from glcan.report.results import Comparison, Curve, MethodResult, Metric, VersusE2E

__all__ = ["Comparison", "Curve", "MethodResult", "Metric", "VersusE2E", "compare"]
