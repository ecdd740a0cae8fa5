"""Work of a GPU as a CUDA graph: its thousand small launches are recorded once and then repeated as one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

_EAGER_STEPS = 3  # before recording: memory, optimizer state and compiled kernels have to be there


class GraphedStep:
    """Run a step as it is a few times, then record and repeat it as long as the shapes of its inputs stay.

    Every call does exactly one step. If shapes change, running and recording start anew; if recording fails, the
    steps go on unrecorded and a warning says so once.

    Parameters
    ----------
    step : function
        Maps an objective, or whatever else tells one kind of step from another, and tensors to a tensor without
        gradient; everything it does has to be launched on the GPU, with shapes that depend on the shapes of the
        inputs alone, and nothing read back.
    """

    def __init__(self, step: Callable[..., Tensor]) -> None:
        self._step = step
        self._key: Any = None
        self._eager_steps = 0
        self._failed = False
        self._inputs: tuple[Tensor, ...] = ()
        self._replay: Callable[[], Tensor] | None = None

    def __call__(self, objective: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Take one step and return its result, which later steps leave alone."""
        key = (objective, *((value.shape, value.dtype) for value in inputs))
        if key != self._key:
            self._key, self._eager_steps, self._replay, self._inputs = key, 0, None, ()
        if self._replay is None and self._eager_steps >= _EAGER_STEPS and not self._failed:
            self._record(objective, inputs)
        if self._replay is None:
            self._eager_steps += 1
            return _aside(lambda: self._step(objective, *inputs), inputs[0].device)
        for kept, given in zip(self._inputs, inputs, strict=True):
            kept.copy_(given)
        return self._replay().clone()

    def _record(self, objective: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> None:
        kept = tuple(value.clone() for value in inputs)
        try:
            self._replay = _recorded(lambda: self._step(objective, *kept), kept[0].device)
        except RuntimeError as error:
            self._failed = True
            warnings.warn(f"the GPU goes on without a CUDA graph, which is slower: {error}", stacklevel=3)
        else:
            self._inputs = kept


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # one for all: every stream keeps memory of its own


def _aside(function: Callable[[], Tensor], device: torch.device) -> Tensor:
    """Run a function on a stream of its own: what it leaves behind must not depend on the default stream."""
    stream, here = _side_stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        result = function()
    here.wait_stream(stream)
    return result


def _recorded(function: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """Record a function, without running it; the returned function runs it and hands out the same tensor each time."""
    graph = torch.cuda.CUDAGraph()
    # On a stream of this device: PyTorch's own is one of the device that recorded first. Errors of this thread alone:
    # the one that draws patches goes on allocating pinned memory meanwhile.
    stream = _side_stream(device)
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        result = function()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
