"""Calls side by side, each in a process of its own, whose end by the system is the end of no other."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, TypeVar

import torch

from glcan.errors import GlcanError, RunError
from glcan.training.stop import Stop, Stopped

Result = TypeVar("Result")

_TICK = 1.0  # seconds


def cpus() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def completed(
    calls: Sequence[Callable[[], Result]], jobs: int, *, watch: Callable[[Collection[int]], object] | None = None
) -> Generator[tuple[int, Result | GlcanError]]:
    """The results of calls, as they come.

    Closing the iterator, SIGINT and SIGTERM stop the calls that run with SIGTERM, and wait for them: a `train` leaves a
    checkpoint. So does the end of this process.

    Args:
        calls: picklable, as are their results.
        jobs: how many at a time. Each has its part of the CPUs, one thread at least, and no more than torch has here;
            also where there are fewer calls, so that one that is made again computes the same.
        watch: called about once a second, with the indices of the calls that run.

    Yields:
        The index of a call and its result; or the `GlcanError` that it raised, or `RunError` if its process came to
        another end.
    """
    threads = max(1, min(torch.get_num_threads(), cpus() // jobs))
    context = multiprocessing.get_context("spawn")  # torch's threads and CUDA do not survive a fork
    waiting = list(enumerate(calls))[::-1]
    running: dict[Connection, tuple[int, SpawnProcess]] = {}
    with Stop() as stop:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    index, call = waiting.pop()
                    receiver, sender = context.Pipe(duplex=False)
                    process = context.Process(target=_call, args=(call, sender, threads))
                    with _no_interrupt():
                        process.start()
                    sender.close()
                    running[receiver] = index, process
                ready = wait(list(running), timeout=_TICK)
                stop.check()
                if watch is not None:
                    watch([index for index, _ in running.values()])
                for receiver in list(running):
                    if receiver in ready:
                        index, process = running.pop(receiver)
                        yield index, _result(receiver, process)
        except Stopped:
            raise stop.exception() from None
        finally:
            for _, process in running.values():
                process.terminate()
            for _, process in running.values():
                process.join()


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """What is started here does not hear of Ctrl-C, which a terminal sends to all; its parent says when to stop."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # where `multiprocessing` starts it by the way, SIGINT is no longer blocked
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _call(call: Callable[[], object], sender: Connection, threads: int) -> None:
    """In the process: the call, what came of it sent back."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        result = call()
    except GlcanError as error:
        result = error
    sender.send(result)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _result(receiver: Connection, process: SpawnProcess) -> Any:
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        code = process.exitcode or 0
        end = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return RunError(f"Its process {end}, perhaps for want of memory. Lower --jobs; finished epochs are not lost.")
    finally:
        receiver.close()
        process.join()
