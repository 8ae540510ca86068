"""Object detection: lists of images and of boxes, for models that compute their own losses as torchvision's do.

Shapes: B images of a batch, N boxes of one image, C channels, H height, W width.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import handle_torch_function, has_torch_function

from glcan.errors import ConfigError, DataError
from glcan.inspect.tensors import overridden, tensors_in
from glcan.tasks.base import Predictions, Task

_PART = 2**22  # predictions for which the losses are computed at a time, at least: 16 MiB of them
_SHARE = 4  # ... or this part of a batch's: each part has a hundred kernels, and a GPU waits for nine of them
_TOGETHER = 2**17  # predictions of a whole batch for which they are computed at once: 0.5 MiB of them
_EXAMPLE_BOXES = 7  # of an image; COCO's have 7.3 on average


class Detection(Task):
    """Boxes and classes, learned through the losses that the model itself returns in train mode.

    A batch is ``(images, targets)``: a list of B images float [C, H, W] in 0..1, which may differ in size, and a list
    of B dicts with ``boxes``, float [N, 4] as x1, y1, x2, y2 in pixels, and ``labels``, int64 [N] from 1 (0 is the
    background). N may be 0. The model is called as ``model(images, targets)`` and returns a dict of losses, which are
    added up; so torchvision's RetinaNet, FCOS and Faster R-CNN are trained as they are. Auxiliary networks return a
    dict of losses as well.
    """

    name: ClassVar[str] = "detection"
    assumes: ClassVar[bool] = True
    """One-stage detectors match anchors to boxes by masks alone, and run on fake tensors; others fall back."""
    recordable: ClassVar[bool] = False

    def __init__(self) -> None:
        # the first image of the batch that the model runs on, and what its transform made of the batch
        self._seen: tuple[Any, Any] | None = None
        self._classes: int | None = None  # that the model predicts, as far as it says so

    def arguments(self, batch: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if len(batch) != 2:
            raise ConfigError(f"A detection batch is (images, targets); this one has {len(batch)} items.")
        images, targets = batch
        _check_structure(images, targets)
        return (list(images), [dict(target) for target in targets]), {}

    def example(self, batch: int, channels: int, image: tuple[int, int]) -> tuple[Any, ...]:
        height, width = image
        corners = torch.arange(1, _EXAMPLE_BOXES + 1).unsqueeze(1) / _EXAMPLE_BOXES
        boxes = torch.cat([torch.zeros(_EXAMPLE_BOXES, 2), corners * torch.tensor([width, height])], 1)
        labels = torch.ones(_EXAMPLE_BOXES, dtype=torch.int64)
        images = [torch.zeros(channels, height, width) for _ in range(batch)]
        return images, [{"boxes": boxes.clone(), "labels": labels.clone()} for _ in range(batch)]

    def prepare(self, shapes: tuple[tuple[int, ...], ...], batch: tuple[Any, ...]) -> None:
        """Checks the sample; see `check_targets`."""
        check_targets(*batch, classes=self._classes)
        if any(shapes) or not shapes:
            raise ConfigError(
                f"The model returns tensors of shapes {list(shapes)}; in train mode a detector must return a dict of "
                "scalar losses, as torchvision's do. Call model.train() first, or wrap the model so that it does."
            )

    @contextlib.contextmanager
    def running(self, model: nn.Module) -> Iterator[None]:
        """Keeps what the model's transform makes of a batch, and computes the losses of its head in parts.

        The losses are thousands of small operations. To whatever watches operations, as `Isolation` does, they are one.
        """

        def keep(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            if arguments and len(arguments[0]):
                self._seen = arguments[0][0], output

        self._classes = classes_of(model)
        with contextlib.ExitStack() as stack:
            if isinstance(transform := getattr(model, "transform", None), nn.Module):
                stack.callback(transform.register_forward_hook(keep).remove)
            stack.enter_context(losses_in_parts(model))
            if _has_torchvisions_losses(model):
                vars(model)["compute_loss"] = _as_one_operation(model.compute_loss)  # type: ignore[arg-type]
                stack.callback(vars(model).pop, "compute_loss")
            try:
                yield
            finally:
                self._seen = None

    @contextlib.contextmanager
    def repeatable(self, model: nn.Module) -> Iterator[Callable[[Tensor], contextlib.AbstractContextManager[None]]]:
        """The second pass has what torchvision's transform made of the images in the first: sizes and padding."""
        from torchvision.models.detection.image_list import ImageList

        transform = _transform_of(model)
        made: list[Any] = []
        drawn: list[Tensor] = []  # the generator's state, which sizes have been drawn from

        def keep(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            made.append(output)
            if not isinstance(output[0].tensors, FakeTensor):
                drawn.append(torch.get_rng_state())

        @contextlib.contextmanager
        def again(places: Tensor) -> Iterator[None]:
            if transform is None:  # of another kind of detector: nothing was drawn, or images are not chosen
                yield
                return
            some = places.tolist()
            images, targets = made.pop()
            found = ImageList(images.tensors[places], [images.image_sizes[i] for i in some]), [targets[i] for i in some]
            del images

            def handed(*args: Any) -> Any:
                if drawn:
                    torch.set_rng_state(drawn.pop())
                return found

            with overridden([(transform, handed)]):
                yield

        with contextlib.ExitStack() as stack:
            if transform is not None:
                stack.callback(transform.register_forward_hook(keep).remove)
            yield again

    def choosable(self, model: nn.Module) -> bool:
        """Whether its losses are those of torchvision's one-stage detectors, from the heads' predictions alone."""
        return _transform_of(model) is not None and _has_torchvisions_losses(model)

    def predict(self, model: nn.Module, batch: tuple[Any, ...], arguments: tuple[Any, Any]) -> Predictions:
        """The heads' predictions [B, N, C] for the N anchors of each image."""
        found: list[tuple[Any, dict[str, Tensor], Any]] = []

        def keep(targets: Any, outputs: dict[str, Tensor], *others: Any) -> Any:
            found.append((targets, outputs, others))
            raise _Predicted

        args, kwargs = arguments
        vars(model)["compute_loss"] = keep
        try:
            self.loss(model(*args, **kwargs), batch)  # one in eval mode comes to this end, and is refused
        except _Predicted:
            pass
        finally:
            del vars(model)["compute_loss"]
        targets, outputs, others = found[0]

        def loss(given: list[Tensor]) -> Tensor:
            with losses_in_parts(model):
                compute: Callable[..., Any] = model.compute_loss  # type: ignore[assignment]
                return self.loss(compute(targets, dict(zip(outputs, given, strict=True)), *others), batch)

        return Predictions(list(outputs.values()), loss)

    def transformed(self, batch: tuple[Any, ...], transform: nn.Module) -> tuple[Any, list[dict[str, Tensor]]]:
        """Images and targets as the model's transform left them (resized, perhaps at random) in this very step.

        For a batch that the model is not running on, the transform is run.
        """
        images, targets = batch
        if self._seen is not None and self._seen[0] is images[0]:
            found = self._seen[1]
        else:
            found = transform(list(images), [dict(target) for target in targets])
        return found[0], found[1]

    def loss(self, output: Any, batch: tuple[Any, ...]) -> Tensor:
        return total_loss(output, "The model")

    def local_loss(self, prediction: Any, batch: tuple[Any, ...]) -> Tensor:
        return total_loss(prediction, "An auxiliary network")


class _Predicted(BaseException):
    """The model has made its predictions; its losses are computed elsewhere. No model catches it."""


def _transform_of(model: nn.Module) -> nn.Module | None:
    """What normalises, resizes and pads the images of torchvision's detectors."""
    from torchvision.models.detection.transform import GeneralizedRCNNTransform

    transform = getattr(model, "transform", None)
    return transform if isinstance(transform, GeneralizedRCNNTransform) else None


def _has_torchvisions_losses(model: nn.Module) -> bool:
    """Whether its losses come from what the method is given alone; one of the user's own may run units as well."""
    from torchvision.models.detection import FCOS, RetinaNet

    own = getattr(type(model), "compute_loss", None)
    return own in (FCOS.compute_loss, RetinaNet.compute_loss) and "compute_loss" not in vars(model)


@contextlib.contextmanager
def losses_in_parts(model: nn.Module) -> Iterator[None]:
    """The losses of torchvision's RetinaNet and FCOS are computed and differentiated for some anchors at a time.

    The loss of 163,000 anchors and 91 classes holds more memory than the heads that predict them. In parts, and with
    the gradient of the predictions in place of everything that leads to it, it holds little more than the predictions.
    The gradient is the same up to rounding: these losses are sums over anchors, divided by numbers in which no weight
    has a part. Other models run as they are.
    """
    head = getattr(model, "head", None)
    divisor = _divisor(head)
    if divisor is None or "compute_loss" in vars(head):
        yield
        return
    whole = head.compute_loss  # type: ignore[union-attr]

    def in_parts(
        targets: list[dict[str, Tensor]], outputs: dict[str, Tensor], anchors: list[Tensor], matched: list[Tensor]
    ) -> dict[str, Tensor]:
        names: list[str] = []

        def loss(image: int | None, some: slice, mine: Sequence[Tensor]) -> list[Tensor]:
            predictions = dict(zip(outputs, mine, strict=True))
            if image is None:
                losses = whole(targets, predictions, anchors, matched)
                names[:] = losses
                return list(losses.values())
            match = matched[image][some]
            # these losses are divided by the number of anchors on objects in this part
            losses = whole([targets[image]], predictions, [anchors[image][some]], [match])
            names[:] = losses
            multiplied, divided = _on_objects([match]), divisor(matched, image)
            return [value * multiplied / divided for value in losses.values()]

        found = _InParts.apply(loss, *outputs.values())
        return dict(zip(names, found, strict=True))

    vars(head)["compute_loss"] = _as_one_operation(in_parts)  # its `Function` alone would not be seen by an `Isolation`
    try:
        yield
    finally:
        del vars(head)["compute_loss"]


def _as_one_operation(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, which torch function modes see as an operation, and not the operations in it."""

    @functools.wraps(function)
    def operation(*args: Any, **kwargs: Any) -> Any:
        tensors = tuple(tensors_in((args, kwargs)))
        if has_torch_function(tensors):
            return handle_torch_function(function, tensors, *args, **kwargs)
        return function(*args, **kwargs)

    return operation


def _on_objects(matched: list[Tensor]) -> Tensor:
    """How many anchors are on objects; 1 if none, as torchvision divides."""
    return torch.stack([(match >= 0).sum() for match in matched]).sum().clamp(min=1)


def _divisor(head: Any) -> Callable[[list[Tensor], int], Tensor] | None:
    """What an image's anchors' losses are divided by, given the matches of all images; None: not known."""
    if head is None:
        return None
    from torchvision.models.detection.fcos import FCOSHead
    from torchvision.models.detection.retinanet import RetinaNetHead

    if type(head) is RetinaNetHead:  # the image's anchors on objects; then the mean over images
        return lambda matched, image: _on_objects([matched[image]]) * len(matched)
    if type(head) is FCOSHead:  # the batch's places in objects
        return lambda matched, image: _on_objects(matched)
    return None


class _InParts(torch.autograd.Function):
    """Losses of predictions [B, N, C], which are going to be added up, part by part; keeps their gradient alone.

    A part is some anchors of one image, or the whole batch where that is small: that costs less time.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, loss: Callable[[int | None, slice, Sequence[Tensor]], list[Tensor]], *outputs: Tensor
    ) -> tuple[Tensor, ...]:
        wide = [torch.float32 if o.dtype == torch.float16 else o.dtype for o in outputs]  # float16 would underflow
        ctx.gradients = [torch.zeros_like(o, dtype=dtype) for o, dtype in zip(outputs, wide, strict=True)]
        images, anchors = outputs[0].shape[:2]
        widest = max(o.shape[-1] for o in outputs)
        most = max(_PART, images * anchors * widest // _SHARE)
        step = max(1, math.ceil(anchors / max(1, math.ceil(anchors * widest / most))))
        together = images * anchors * widest <= min(_PART, _TOGETHER)
        losses: list[Tensor] = []
        for image in [None] if together else range(images):
            rows = slice(None) if image is None else slice(image, image + 1)
            for start in range(0, anchors, step):
                some = slice(start, start + step)
                with torch.enable_grad():
                    mine = [
                        o.detach()[rows, some].to(dtype).requires_grad_()
                        for o, dtype in zip(outputs, wide, strict=True)
                    ]
                    parts = loss(image, some, mine)
                    found = torch.autograd.grad(sum(parts[1:], start=parts[0]), mine, allow_unused=True)
                for gradient, part in zip(ctx.gradients, found, strict=True):
                    if part is not None:
                        gradient[rows, some] = part
                parts = [part.detach() for part in parts]
                losses = [a + b for a, b in zip(losses, parts, strict=True)] if losses else parts
                del mine, parts, found, gradient, part
        return tuple(losses)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *by_loss: Tensor) -> tuple[Any, ...]:
        if ctx.gradients is None:
            raise RuntimeError("These losses were computed in parts; their backward pass can be run once only.")
        gradients, ctx.gradients = ctx.gradients, None
        # the losses are added up, so all of them have the same gradient
        return None, *(gradient.mul_(by_loss[0]) for gradient in gradients)


def total_loss(losses: Any, origin: str) -> Tensor:
    """The sum of a dict of scalar losses.

    Raises:
        ConfigError: it is no such dict; `origin` says whose.
    """
    if not isinstance(losses, Mapping) or not losses or not all(isinstance(v, Tensor) for v in losses.values()):
        raise ConfigError(
            f"{origin} returned {type(losses).__name__}; detection needs a dict of scalar losses, as torchvision's "
            "detectors return in train mode. Call model.train() first."
        )
    first: Tensor
    first, *rest = losses.values()
    return sum(rest, start=first)


def classes_of(model: nn.Module) -> int | None:
    """The number of classes that the detector predicts, the background included; none: it does not say.

    A backbone is not asked: timm's have a `num_classes` of their own.
    """
    for name, module in model.named_modules():
        if "backbone" in name.split("."):
            continue
        if isinstance(found := getattr(module, "num_classes", None), int):
            return found
        if isinstance(scores := getattr(module, "cls_score", None), nn.Linear):
            return scores.out_features
    return None


def check_targets(
    images: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]], *, classes: int | None = None
) -> None:
    """Checks that a batch is one of detection: see `Detection`. Values of fake tensors are not looked at.

    Args:
        images, targets: the batch.
        classes: that the model predicts, the background included; none: not known.

    Raises:
        ConfigError: the batch has another form.
        DataError: a box without area or with a value that is no number, a label below 1 or beyond the model's classes.
    """
    _check_structure(images, targets)
    for index, (image, target) in enumerate(zip(images, targets, strict=True)):
        if image.dim() != 3 or not image.is_floating_point():
            raise ConfigError(
                f"Image {index} is {image.dtype} {list(image.shape)}; detection needs floating-point [C, H, W] in 0..1."
            )
        missing = {"boxes", "labels"} - set(target)
        if missing:
            raise ConfigError(
                f"Target {index} lacks {' and '.join(sorted(missing))}; it must be a dict with boxes [N, 4] and "
                "labels [N]."
            )
        boxes, labels = target["boxes"], target["labels"]
        if boxes.dim() != 2 or boxes.shape[1] != 4 or not boxes.is_floating_point():
            raise ConfigError(
                f"The boxes of target {index} are {boxes.dtype} {list(boxes.shape)}; they must be floating-point "
                "[N, 4], torch.zeros(0, 4) for an image without objects."
            )
        if labels.dtype != torch.int64 or labels.shape != boxes.shape[:1]:
            raise ConfigError(
                f"The labels of target {index} are {labels.dtype} {list(labels.shape)}; they must be torch.int64 "
                f"[{len(boxes)}], one for each box."
            )
        if isinstance(boxes, FakeTensor) or isinstance(labels, FakeTensor) or not len(boxes):
            continue
        wrong = ~(torch.isfinite(boxes).all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1))
        if wrong.any():
            which = int(wrong.nonzero()[0, 0])
            raise DataError(
                f"Box {which} of target {index} is {boxes[which].tolist()}; it must be x1, y1, x2, y2 with x1 < x2 and "
                "y1 < y2. Leave such boxes out."
            )
        if int(labels.min()) < 1:
            raise DataError(
                f"A label of target {index} is {int(labels.min())}; labels of objects count from 1, 0 is the "
                "background."
            )
        if classes is not None and int(labels.max()) >= classes:
            raise DataError(
                f"A label of target {index} is {int(labels.max())}, but the model predicts {classes} classes, the "
                f"background included, so labels must lie in 1 ... {classes - 1}. Give the model more (num_classes)."
            )


def _check_structure(images: Any, targets: Any) -> None:
    if not isinstance(targets, list | tuple) or not all(isinstance(target, Mapping) for target in targets):
        raise ConfigError(
            f"The targets of a detection batch are a list of dicts, one for each image, not {type(targets).__name__}."
        )
    if len(images) != len(targets):
        raise ConfigError(
            f"A detection batch has one target for each image; this one has {len(images)} images and {len(targets)} "
            "targets."
        )
