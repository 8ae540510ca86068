"""Models that cannot be trained as they are, and models that changed after somebody looked at them."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from glcan.errors import ConfigError

__all__ = ["Seen", "refuse_wrapped"]

_REMEDY = {
    DataParallel: "Give the module inside (model.module); glcan trains on one device.",
    DistributedDataParallel: "Give the module inside (model.module), and average gradients after backward() yourself.",
}


def refuse_wrapped(model: nn.Module) -> None:
    """Refuses compiled models, whose code does not call the sub-modules, and those wrapped for several devices.

    Raises:
        ConfigError: the model, or a part of it, is one.
    """
    name = type(model).__name__
    for path, module in model.named_modules():
        where = f"its sub-module {path!r}" if path else "the model"
        if hasattr(module, "_orig_mod"):  # what torch.compile(module) gives
            raise ConfigError(
                f"{name}: {where} is compiled, and cannot be cut. Give the module that was compiled, as it was before "
                "torch.compile(module)."
            )
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise ConfigError(f"{name}: {where} is compiled, and cannot be cut. Leave out its .compile().")
        for kind, remedy in _REMEDY.items():
            if isinstance(module, kind):
                raise ConfigError(
                    f"{name}: {where} is wrapped in {kind.__name__}, whose hooks expect one backward "
                    f"pass from end to end. {remedy}"
                )
        if type(module).__name__ == "FullyShardedDataParallel" or hasattr(module, "set_requires_gradient_sync"):
            raise ConfigError(
                f"{name}: {where} is sharded (FSDP), and would get wrong gradients. Give the model as it was before."
            )


class Seen:
    """A model's parameters as they were when somebody looked, to notice what is another thing now.

    Args:
        model: any module.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._before = self._look()

    def _look(self) -> dict[str, tuple[int, bool, str, str]]:
        return {
            name: (id(p), p.requires_grad, str(p.dtype), str(p.device)) for name, p in self._model.named_parameters()
        }

    def check(self) -> None:
        """Refuses a model that has changed since.

        Raises:
            ConfigError: parameters were replaced, added, frozen, thawed, or moved to another type or device.
        """
        now = self._look()
        if now == self._before:
            return
        for text, place in (("replaced, added or removed", 0), ("frozen or thawed", 1), ("moved or cast", None)):
            changed = [
                name
                for name in self._before.keys() | now.keys()
                if (a := self._before.get(name)) != (b := now.get(name))
                and (place is None or a is None or b is None or a[place] != b[place])
            ]
            if changed:
                names = ", ".join(sorted(changed)[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
                raise ConfigError(
                    f"{len(changed)} parameters were {text} since the learner was built ({names}), so some would never "
                    "be trained, or not as planned. Build a new learner after such a change."
                )
