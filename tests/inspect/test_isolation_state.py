"""Isolation: what crosses a cut, and what is as before afterwards."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from tests import zoo
from tests.inspect.isolation_cases import (
    GlueOnASkip,
    SeveralTensors,
    SkipOverACut,
    assert_isolated,
    isolated,
)
from tests.zoo import Residual, Small, assert_equal, gradients, loss_of
from torch import Tensor

from glcan.errors import CutError, UnknownName
from glcan.inspect.isolation import Boundary, Isolation
from glcan.inspect.meter import LiveMemory
from glcan.inspect.record import profile

# -- boundaries ----------------------------------------------------------------------------------------------------


def test_what_passes_by_a_cut() -> None:
    model, batch = GlueOnASkip(), zoo.images(2, 8)
    seen: dict[str, Tensor] = {}

    class Watched(GlueOnASkip):
        def body(self, x: Tensor) -> Tensor:
            skip = self.a(x)
            seen["skip"] = skip.detach().clone()
            y = self.b(skip)
            y = y + F.avg_pool2d(skip, 3, 1, 1).flatten(1).view_as(skip) * 2
            doubled = y * 2
            seen["doubled"] = doubled.detach().clone()
            return self.d(self.c(y)) + doubled

    model = Watched()
    found = profile(model, (batch,))
    for cuts in (["b", "c", "d"], ["c", "d"], ["b", "d"], ["c"], ["d"]):
        run = isolated(model, batch, found.names, cuts, {c: found.crossing[c] for c in cuts})
        skipping = {b.cut: b.skipping for b in run.boundaries}
        assert all(t.requires_grad for b in run.boundaries for t in (*b.entering, *b.skipping))
        by = {cut: [t for t in tensors] for cut, tensors in skipping.items()}
        owner = "c" if "c" in cuts else "d"  # the first cut after `doubled` was made
        assert [torch.equal(t, seen["doubled"]) for t in by[owner]] == [True]
        assert not by.get("b"), "the skip itself enters b"
        if cuts == ["c", "d"]:
            assert by["d"] == [], "doubled belongs to an older block there"


def test_entering_keeps_the_order_of_the_arguments() -> None:
    model = SeveralTensors()
    found = profile(model, (zoo.images(2, 8),))
    run = isolated(model, zoo.images(2, 8), found.names, ["c"])
    assert [tuple(t.shape) for t in run.boundaries[0].entering] == [(2, 8, 8, 8), (2, 8, 8, 8), (2, 8, 1, 1)]
    run = isolated(model, zoo.images(2, 8), found.names, ["b", "c"])
    assert [tuple(t.shape) for t in run.boundaries[1].entering] == [(2, 8, 8, 8), (2, 8, 1, 1)]


def test_no_gradient_crosses_a_cut() -> None:
    for last in range(3):
        model = SkipOverACut()
        losses: list[Tensor] = []
        cuts = ["b", "c"]
        with Isolation(model, Small.units, cuts, lambda b, losses=losses: losses.append(loss_of(b.entering))):
            losses.append(loss_of(model(zoo.images(2, 8))))
        losses[last].backward()
        blocks = [["stem", "a"], ["b"], ["c", "d", "head"]]
        reached = {name.split(".")[0] for name in gradients(model)}
        assert reached == set(blocks[last])


def test_finished_blocks_are_freed_before_the_next_one_runs() -> None:
    class Noted(Small):
        class unit(Residual):
            def forward(self, x: Tensor) -> Tensor:
                live.append(memory.current["activations"])
                return super().forward(x)

    model, batch = Noted(), zoo.images(4, 32)
    feature = 4 * 8 * 32 * 32 * 4  # bytes of one map
    results = {}
    for cuts in ([], ["b", "c", "d"]):
        live: list[int] = []
        with (
            LiveMemory(model, inputs=batch) as memory,
            Isolation(model, Small.units, cuts, lambda b: loss_of(b.entering).backward()),
        ):
            loss_of(model(batch)).backward()
        results[len(cuts)] = live
        model.zero_grad()
    assert results[0] == sorted(results[0])
    assert results[0][3] - results[0][0] >= 3 * 3 * feature
    # what is left of the blocks before: the tensor that enters, and the stem's, which the model's own `x` holds
    assert all(live <= 2.01 * feature for live in results[3])


# -- leaving things as they were -----------------------------------------------------------------------------------


def test_a_forward_that_was_overridden_before() -> None:
    model = Small()
    original = model.b.forward

    def doubled(x: Tensor) -> Tensor:
        return original(x) * 2

    model.b.forward = doubled  # type: ignore[method-assign]
    twin = Small()
    twin.load_state_dict(model.state_dict())
    run = isolated(model, batch := zoo.images(2, 8), list(Small.units), ["c"])
    assert model.b.__dict__["forward"] is doubled
    assert [n for n, m in model.named_modules() if "forward" in m.__dict__] == ["b"]
    plain = isolated(twin, batch, list(Small.units), ["c"])
    assert not torch.equal(run.output, plain.output)


@pytest.mark.parametrize("where", ["unit", "callback", "backward", "after"])
def test_an_exception_in_the_middle(where: str) -> None:
    class Fails(Small):
        broken = False

        def body(self, x: Tensor) -> Tensor:
            x = self.b(self.a(x))
            if self.broken and where == "unit":
                with torch.device("cpu"):
                    self.c(x[:, :3])
            return self.d(self.c(x))

    def at_cut(boundary: Boundary) -> None:
        if model.broken and where == "callback":
            raise KeyboardInterrupt
        loss = loss_of(boundary.entering)
        if model.broken and where == "backward":
            loss.register_hook(lambda g: 1 / 0)
        loss.backward()

    model, batch = Fails(), zoo.images(2, 8)
    model.eval()
    isolation = Isolation(model, Small.units, ["b", "c"], at_cut)

    def step() -> None:
        with isolation:
            output = model(batch)
            if model.broken and where == "after":
                raise RuntimeError("after")
            with isolation.replay():
                loss_of(output).backward()

    step()
    wanted = {name: g.clone() for name, g in gradients(model).items()}
    model.zero_grad()
    model.broken = True
    with pytest.raises((RuntimeError, KeyboardInterrupt, ZeroDivisionError)):
        step()
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert torch._C._len_torch_function_stack() == 0
    model.zero_grad()
    model.broken = False
    step()
    assert_equal(gradients(model), wanted)


def test_entering_twice_is_refused_and_changes_nothing() -> None:
    model = Small()
    isolation = Isolation(model, Small.units, ["b"])
    with isolation, pytest.raises(RuntimeError, match="already entered"), isolation:
        pass
    assert not any("forward" in m.__dict__ for m in model.modules())
    with isolation:
        model(zoo.images(2, 8))


def test_state_kept_on_the_model_from_an_earlier_run() -> None:
    class Remembers(Small):
        memory: Tensor | None = None

        def body(self, x: Tensor) -> Tensor:
            x = self.a(x)
            if self.memory is not None:
                x = x + self.memory.detach() + self.memory.detach().clone()
            self.memory = x
            y = self.c(self.b(x))
            return self.d(y + self.memory)

    model, batch = Remembers(), zoo.images(2, 8)
    isolated(model, batch, list(Small.units), ["b", "c"])
    model.zero_grad()
    kept = model.memory
    twin = Remembers()
    twin.load_state_dict(model.state_dict())
    twin.memory = kept.detach().clone()
    isolated(model, batch, list(Small.units), ["b", "c"])
    isolated(twin, batch, list(Small.units), ["b", "c"])
    assert_equal(gradients(model), gradients(twin))


def test_nothing_is_kept_alive_after_a_run() -> None:
    model, batch = SkipOverACut(), zoo.images(2, 8)
    found = profile(model, (batch,))
    isolation = Isolation(model, found.names, ["c", "d"], lambda b: None, {c: found.crossing[c] for c in ("c", "d")})
    gc.collect()
    gc.disable()
    try:
        with LiveMemory(model, inputs=batch) as memory:
            with isolation:
                model(batch)
            assert memory.current["activations"] == 0, "no reference cycles either"
    finally:
        gc.enable()


def test_nothing_is_kept_alive_after_an_exception() -> None:
    model, batch = SkipOverACut(), zoo.images(2, 8)
    found = profile(model, (batch,))
    isolation = Isolation(model, found.names, ["c", "d"], lambda b: None, {c: found.crossing[c] for c in ("c", "d")})
    model.c.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), isolation:
        model(batch)
    assert found.crossing["d"]
    assert not isolation._kept


def test_tensors_of_another_run_are_nobodys() -> None:
    kept: list[Tensor] = []
    model = Small()
    with Isolation(model, Small.units, ["b"], lambda b: kept.extend(b.entering)):
        model(zoo.images(2, 8))
    other = Isolation(model, Small.units, ["b"])
    with other:
        model(zoo.images(2, 8))
        assert other.block == 1
        assert other.twin(kept[0]) is kept[0]


def test_one_model_inside_another_isolation_of_its_own() -> None:
    """A frozen teacher that is itself run under an isolation, in the middle of the student's run."""
    teacher, batch = Small(), zoo.images(2, 8)

    class Student(Small):
        def body(self, x: Tensor) -> Tensor:
            x = self.b(self.a(x))
            with torch.no_grad(), Isolation(teacher, Small.units, ["c"], lambda b: None):
                target = teacher(batch)
            return self.d(self.c(x)) * target.mean()

    student, plain = Student(), Small()
    plain.load_state_dict(student.state_dict())
    assert_isolated(student, batch, ["b", "c", "d"], units=Small.units)


# -- errors --------------------------------------------------------------------------------------------------------


def test_units_and_cuts_are_checked() -> None:
    model = Small()
    with pytest.raises(UnknownName, match="'sten'.*'stem'"):
        Isolation(model, ["sten"])
    with pytest.raises(UnknownName, match="unit ''"):
        Isolation(model, [""])
    with pytest.raises(UnknownName, match="cut 'a'"):
        Isolation(model, ["stem", "b"], ["a"])
    with pytest.raises(CutError, match=r"'a\.b' lies inside the unit 'a'"):
        Isolation(model, ["a.b", "a"])
    with pytest.raises(CutError, match="twice"):
        Isolation(model, ["a", "b"], ["b", "b"])
    model.b = model.a
    with pytest.raises(CutError, match="are the same module"):
        Isolation(model, ["a", "b"])
    assert not any("forward" in m.__dict__ for m in model.modules())
