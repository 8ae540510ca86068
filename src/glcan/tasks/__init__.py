"""The tasks there are: one file each, one line here."""

from __future__ import annotations

from glcan.errors import UnknownName
from glcan.tasks.base import Predictions, Task
from glcan.tasks.classification import Classification
from glcan.tasks.detection import Detection
from glcan.tasks.super_resolution import SuperResolution

TASKS: dict[str, type[Task]] = {task.name: task for task in (Classification, SuperResolution, Detection)}

__all__ = ["TASKS", "Classification", "Detection", "Predictions", "SuperResolution", "Task", "create", "names"]


def names() -> list[str]:
    """The names that `create` takes."""
    return sorted(TASKS)


def create(task: str | Task) -> Task:
    """The task of this name, or the task itself.

    Raises:
        UnknownName: no task has this name.
    """
    if isinstance(task, Task):
        return task
    if task not in TASKS:
        raise UnknownName("task", task, names())
    return TASKS[task]()
