"""Processes that prepare things: each on one thread, told once what it needs."""

from __future__ import annotations

import os
import signal

from restormer3d.processes import process_pool


def threads_and_interrupt(_=None):
    return os.environ.get("OMP_NUM_THREADS"), signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def put(name, value):
    os.environ[name] = value


def test_each_computes_on_one_thread_and_leaves_ctrl_c_to_the_caller(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    with process_pool(2) as pool:
        assert list(pool.map(threads_and_interrupt, range(4))) == [("1", True)] * 4
    assert os.environ["OMP_NUM_THREADS"] == "7"


def test_each_is_told_first():
    with process_pool(2, put, "RESTORMER3D_TOLD", "yes") as pool:
        assert list(pool.map(os.getenv, ["RESTORMER3D_TOLD"] * 4)) == ["yes"] * 4
