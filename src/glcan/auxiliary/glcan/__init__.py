"""The rule `glcan`: Global-Local Collaborative Auxiliary Networks (arXiv 2406.00446), one file for each task.

The paper's text beyond its abstract was not at hand; this is our construction in its spirit (docs/rules/glcan.md says
what is ours). The auxiliary network of a block has

- a *local branch*: what the task needs of the block's own features, at their own scale;
- a *global branch*: a macro-skeleton of the network that is still to come, one light unit for each remaining stage,
  with the real network's down-sampling, so that the local loss sees the receptive field of the final head;
- *collaboration*: both together go into a head of the task's own kind.

Its input is reduced to the first remaining stage's resolution before anything is computed, and its width is solved for
a compute budget.
"""

from __future__ import annotations

from glcan.auxiliary.glcan.classification import GLCANClassification
from glcan.auxiliary.glcan.detection import GLCANDetection
from glcan.auxiliary.glcan.super_resolution import GLCANSuperResolution

__all__ = ["GLCANClassification", "GLCANDetection", "GLCANSuperResolution"]
