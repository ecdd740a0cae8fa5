"""Processes that prepare what a training will need next, each on one thread.

They are spawned, as the caller may have started CUDA, which no fork survives. Nothing here imports PyTorch: processes
that do not need it start in a fraction of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

from restormer3d.threads import limit_pools

SPAWN = multiprocessing.get_context("spawn")
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


@contextmanager
def process_pool(workers: int, tell: Callable[..., Any] | None = None, *told: Any) -> Iterator[ProcessPoolExecutor]:
    """Start processes; when the block ends, what they have not begun is dropped.

    Parameters
    ----------
    workers : int
        How many.
    tell : function, optional
        Called in each process first, with `told`.
    """
    pool = ProcessPoolExecutor(workers, SPAWN, initializer=_begin, initargs=(tell, *told))
    try:
        with one_thread_each():
            for _ in range(workers):
                pool.submit(int)  # starts a process, as none is idle yet
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Let the libraries of processes that are started within the block compute on one thread."""
    variables: dict[str, str] = dict.fromkeys(_THREADS, "1")  # read when the libraries are loaded
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def leave_ctrl_c_to_the_caller() -> None:
    """Ignore SIGINT: the process that wants the results answers it, and ends this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _begin(tell: Callable[..., Any] | None, *told: Any) -> None:
    leave_ctrl_c_to_the_caller()
    os.environ.update(dict.fromkeys(_THREADS, "1"))  # for one that was started late, by a task
    limit_pools(1)
    if tell is not None:
        tell(*told)
