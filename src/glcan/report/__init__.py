"""Comparisons of methods: run them, meter them, and put them into a table, a JSON file and plots."""

from glcan.report.compare import compare
from glcan.report.methods import Method, parse_method, parse_methods
from glcan.report.results import Comparison, Curve, MethodResult, Metric, VersusE2E

__all__ = [
    "Comparison",
    "Curve",
    "Method",
    "MethodResult",
    "Metric",
    "VersusE2E",
    "compare",
    "parse_method",
    "parse_methods",
]
