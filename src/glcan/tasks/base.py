"""What a task has to say to be learned block by block."""

from __future__ import annotations

import contextlib
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from torch import Tensor, nn

from glcan.inspect.tensors import replaced, tensors_in


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What a model says of a batch, and what that costs it.

    Attributes:
        tensors: [B, ...] each, what the loss is computed from.
        loss: the loss, from such tensors.
    """

    tensors: list[Tensor]
    loss: Callable[[list[Tensor]], Tensor]


class Task(ABC):
    """What is learned: how a batch becomes the model's arguments, and how outputs become losses.

    A batch is the tuple given to ``learner.backward(*batch)``. Rules read a task's attributes to build heads of its
    kind; `local_loss` turns what such a head gives into the block's loss.
    """

    name: ClassVar[str]
    assumes: ClassVar[bool] = False
    """Whether dry runs may assume values that decide something; see `glcan.inspect.dryrun.dry_run`."""

    images_apart: ClassVar[bool] = False
    """Whether a model of this task treats each image of a batch by itself, so that its end may be run in parts."""

    recordable: ClassVar[bool] = True
    """Whether a pass can be recorded as a CUDA graph: the loss reads no values on the host."""

    def arguments(self, batch: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The model's positional and keyword arguments; by default the first item of the batch."""
        return (batch[0],), {}

    def part(self, batch: tuple[Any, ...], begin: int, end: int) -> tuple[Any, ...]:
        """Some images of a batch, as a batch; by default each item's entries from begin to end."""
        return tuple(item[begin:end] for item in batch)

    def chosen(self, batch: tuple[Any, ...], places: Tensor) -> tuple[Any, ...]:
        """The images of a batch at these places [n], as a batch; by default each item's entries there."""
        return tuple(item[places] if isinstance(item, Tensor) else [item[i] for i in places.tolist()] for item in batch)

    @contextlib.contextmanager
    def repeatable(self, model: nn.Module) -> Iterator[Callable[[Tensor], contextlib.AbstractContextManager[None]]]:
        """Entered around a pass of a batch and one of its images at some places, which is to run as they ran there.

        What it gives is called with the places [n] and entered around the second pass.
        """
        yield lambda places: contextlib.nullcontext()

    @abstractmethod
    def example(self, batch: int, channels: int, image: tuple[int, int]) -> tuple[Any, ...]:
        """A batch of the shapes that the task has, for planning; its values mean nothing.

        Args:
            batch, channels: B, C.
            image: (height, width).
        """

    def prepare(self, shapes: tuple[tuple[int, ...], ...], batch: tuple[Any, ...]) -> None:
        """Checks the sample against the shapes of the model's outputs, and keeps what heads need to know.

        Raises:
            GlcanError: the sample does not fit the task or the model.
        """

    def choosable(self, model: nn.Module) -> bool:
        """Whether `predict` can say what the loss is computed from."""
        return True

    def predict(self, model: nn.Module, batch: tuple[Any, ...], arguments: tuple[Any, Any]) -> Predictions:
        """Runs the model up to its predictions; by default all floating-point tensors that it returns.

        Args:
            model: of this task.
            batch: what it is run on.
            arguments: the model's positional and keyword arguments for it.
        """
        args, kwargs = arguments
        output = model(*args, **kwargs)
        tensors = [t for t in tensors_in(output) if t.is_floating_point()]

        def loss(given: list[Tensor]) -> Tensor:
            by_id = {id(old): new for old, new in zip(tensors, given, strict=True)}
            return self.loss(replaced(output, lambda tensor: by_id.get(id(tensor), tensor)), batch)

        return Predictions(tensors, loss)

    def running(self, model: nn.Module) -> contextlib.AbstractContextManager[Any]:
        """Entered around each forward pass of a model in blocks, and around its profile."""
        return contextlib.nullcontext()

    @abstractmethod
    def loss(self, output: Any, batch: tuple[Any, ...]) -> Tensor:
        """The last block's loss, from the model's own output."""

    @abstractmethod
    def local_loss(self, prediction: Any, batch: tuple[Any, ...]) -> Tensor:
        """An earlier block's loss, from its auxiliary network's prediction."""
