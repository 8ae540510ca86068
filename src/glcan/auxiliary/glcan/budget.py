"""What an auxiliary network of `glcan` may cost, and the options that all tasks share."""

from __future__ import annotations

from glcan.auxiliary.base import Site
from glcan.errors import ConfigError

__all__ = ["NAME", "SUMMARY", "check_budget", "check_shared", "share_of"]

NAME = "glcan"
SUMMARY = "global-local collaborative auxiliary networks (arXiv 2406.00446; our construction)"


def share_of(site: Site, budget: float, unit_share: float) -> float:
    """Forward FLOPs that an auxiliary network may cost, for the whole batch.

    Args:
        site: of the network.
        budget: of all auxiliary networks together, as a share of the model's forward FLOPs.
        unit_share: each may cost this share of the model's average unit even where the budget would give it less.
    """
    weighted = sum(unit.weights > 0 for unit in site.profile.units)
    return site.profile.flops * max(budget / max(1, site.blocks - 1), unit_share / max(1, weighted))


def check_budget(budget: float, unit_share: float) -> None:
    """Raises `ConfigError` where one of these cannot be."""
    if not 0 < budget <= 10:
        raise ConfigError(f"glcan.budget is {budget}; it must lie in (0, 10], 0.1 for a tenth of the model.")
    if not 0 <= unit_share <= 10:
        raise ConfigError(f"glcan.unit_share is {unit_share}; it must lie in [0, 10], 0 for none.")


def check_shared(use_local: bool, use_global: bool, width: float | None, long_end: float) -> None:
    """Raises `ConfigError` where one of these cannot be."""
    if not use_local and not use_global:
        raise ConfigError("glcan.use_local and glcan.use_global are both off; leave at least one branch on.")
    if width is not None and not 0 < width <= 4:
        raise ConfigError(f"glcan.width is {width}; it must lie in (0, 4], 1 for the real stages' width.")
    if not 0 <= long_end <= 1:
        raise ConfigError(f"glcan.long_end is {long_end}; it must lie in [0, 1], 0 for nothing that is recomputed.")
