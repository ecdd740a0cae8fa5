"""A recorded step does what the step does. Recording is stood in for: it needs a GPU, the rest is the same."""

from __future__ import annotations

import pytest
import torch

from restormer3d import cuda_graph
from restormer3d.cuda_graph import GraphedStep


class Accumulator:
    """A step with a state: adds its input up, weighted."""

    def __init__(self) -> None:
        self.total = torch.zeros(())

    def __call__(self, objective, value):
        self.total += objective(value)
        return self.total


@pytest.fixture
def recordings(monkeypatch):
    """As CUDA does it: recording runs nothing, replaying reads the inputs of the recording and fills one result."""
    made = []

    def record(function, _):
        made.append(function)
        result = torch.empty(())
        return lambda: result.copy_(function())

    monkeypatch.setattr(cuda_graph, "_recorded", record)
    monkeypatch.setattr(cuda_graph, "_aside", lambda function, _: function().clone())
    return made


def test_every_call_is_one_step_with_its_own_input(recordings):
    step = GraphedStep(Accumulator())
    results = [step(torch.sum, torch.tensor([float(i), 1.0])) for i in range(8)]
    assert [float(r) for r in results] == [1, 3, 6, 10, 15, 21, 28, 36]
    assert len(recordings) == 1


def test_another_shape_or_objective_is_recorded_anew(recordings):
    step = GraphedStep(Accumulator())
    total = 0.0
    for objective, size in [(torch.sum, 2)] * 6 + [(torch.sum, 3)] * 6 + [(torch.mean, 3)] * 6 + [(torch.sum, 2)] * 2:
        total += size if objective is torch.sum else 1
        assert float(step(objective, torch.ones(size))) == total
    assert len(recordings) == 3


def test_a_step_that_cannot_be_recorded_goes_on_as_it_is(recordings, monkeypatch):
    def fail(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(cuda_graph, "_recorded", fail)
    step = GraphedStep(Accumulator())
    with pytest.warns(UserWarning, match="without a CUDA graph.*not permitted") as said:
        results = [float(step(torch.sum, torch.ones(2))) for _ in range(7)]
    assert results == [2, 4, 6, 8, 10, 12, 14]
    assert len(said) == 1
