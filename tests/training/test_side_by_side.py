"""Calls in processes of their own: their results, their errors, their ends."""

import math
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import torch

from glcan import strategies
from glcan.errors import RunError, UnknownName
from glcan.training import RunDirectory, train
from glcan.training.progress import Board
from glcan.training.side_by_side import completed, cpus


def wait_for(condition, seconds=100):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "in vain"
        time.sleep(0.05)


def test_each_call_has_its_result_and_its_part_of_the_threads():
    calls = [partial(math.factorial, 5), torch.get_num_threads, partial(math.factorial, 3)]
    seen = []
    results = dict(completed(calls, 2, watch=seen.append))
    assert results == {0: 120, 1: max(1, min(torch.get_num_threads(), cpus() // 2)), 2: 6}
    assert {0, 1} <= {index for running in seen for index in running}
    assert max(map(len, seen)) == 2


def test_errors_are_handed_over_and_the_other_calls_are_made():
    calls = [
        partial(strategies.parse_method, "glcann:4"),
        partial(signal.raise_signal, signal.SIGKILL),
        partial(sys.exit, 3),
        partial(math.factorial, 4),
    ]
    results = dict(completed(calls, 2))
    with pytest.raises(UnknownName) as unknown:
        strategies.parse_method("glcann:4")
    assert (type(results[0]), str(results[0]), results[0].near) == (
        UnknownName,
        str(unknown.value),
        unknown.value.near,
    )
    assert isinstance(results[1], RunError)
    assert "killed by SIGKILL" in str(results[1])
    assert "exit code 3" in str(results[2])
    assert results[3] == 24


def test_closed_it_leaves_checkpoints_with_which_runs_go_on(tiny, tmp_path, same_run):
    config = tiny(epochs=40)
    train(config, tmp_path / "whole", progress=False)
    run = RunDirectory(tmp_path / "parts")
    runs = [("the run", config, run.path)]
    call = partial(train, config, run.path, resume=True, progress=False)
    with Board(runs, progress=False) as board, pytest.raises(StopAsyncIteration):

        def stop(running):
            board.update(running)
            if run.checkpoint.exists():
                raise StopAsyncIteration  # an error of the caller's

        with closing(completed([call], 1, watch=stop)) as results:
            list(results)
    assert not run.summary.exists()
    assert torch.load(run.checkpoint, weights_only=True)["progress"]["step"] > 0
    ((index, summary),) = completed([call], 1)
    assert (index, summary.epochs) == (0, 40)
    if torch.get_num_threads() <= cpus():  # else the call has fewer, and adds up in another order
        same_run(tmp_path / "whole", run.path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_calls_end_with_the_process_that_made_them(tmp_path, number):
    script, mark = tmp_path / "caller.py", tmp_path / "mark"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent / 'importable')!r})\n"
        "from functools import partial\n"
        "from pathlib import Path\n"
        "from waiting import forever\n"
        "from glcan.training.side_by_side import completed\n"
        f"if __name__ == '__main__': list(completed([partial(forever, Path({str(mark)!r}))], 1))\n"
    )
    caller = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(lambda: mark.exists() and mark.read_text())
    os.kill(caller.pid, number)
    caller.communicate(timeout=100)  # until the call, too, has let go of the output
    assert caller.returncode in {signal.SIGINT: (1, -2), signal.SIGTERM: (143,), signal.SIGKILL: (-9,)}[number]


def test_the_board_says_how_far_runs_are(tiny, tmp_path, capsys):
    first, second = tiny(), tiny(epochs=2, method="e2e")
    board = Board([("one", first, tmp_path / "1"), ("two", second, tmp_path / "2")], progress=True)
    with board:
        board.update([0, 1])
        assert capsys.readouterr().err == ""
        train(first, tmp_path / "1", progress=False)
        board.update([0, 1])
        train(second, tmp_path / "2", progress=False)
        board.update([1])
        board.update([1])
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("  lr")[0] for line in lines] == [
        "one: epoch 1/3", "one: epoch 2/3", "one: epoch 3/3", "two: epoch 1/2", "two: epoch 2/2",
    ]  # fmt: skip
    assert ["ETA" in line for line in lines] == [True, True, False, True, False]
    assert "test accuracy" in lines[2]
