"""Two processes that share a batch learn what one process with the whole batch learns."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing

from restormer3d import distributed
from restormer3d.config import ModelConfig, TrainingConfig
from restormer3d.distributed import average_gradients, is_first, joined_processes, part_of_batch, processes
from restormer3d.model import Restormer3D
from restormer3d.patches import training_stack
from restormer3d.training import fit

from .conftest import TINY, blinking_cells, photons

CPU = torch.device("cpu")


def train(iterations: int, warmup: int, **options) -> dict:
    """Gradients of the last iteration, weights and losses of a short training."""
    stack = photons(blinking_cells(24, 20, 20))
    torch.manual_seed(0)
    model = Restormer3D(ModelConfig(**TINY, start="filters"))
    config = TrainingConfig(
        patch=(16, 16, 16), batch_size=4, iterations=iterations, warmup_iterations=warmup, masked_fraction=0.05
    )
    # One stack whose noise is correlated along x: the batch's masks then depend on every patch in it.
    history = fit(model, [training_stack(stack), training_stack(stack[:20], (0, 0, 1))], config, **options)
    return {
        "gradients": torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]),
        "weights": torch.cat([p.detach().flatten() for p in model.parameters()]),
        "losses": torch.tensor([entry["loss"] for entry in history]),
    }


def train_in_one_of_two(rank: int, port: int, folder: Path) -> None:
    """As torchrun starts it."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    with joined_processes(CPU) as device:
        assert (device, processes(), is_first()) == (CPU, 2, rank == 0)
        assert part_of_batch(6) == slice(3 * rank, 3 * rank + 3)
        with pytest.raises(ValueError, match="5 patches cannot be shared equally by 2 processes"):
            part_of_batch(5)
        results = {
            "warmup": train(0, 1),
            "noise2void": train(1, 0),
            "both": train(1, 1, state_file=folder / f"state{rank}.pt"),
        }
    torch.save(results, folder / f"rank{rank}.pt")


def test_two_processes_learn_what_one_learns(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(train_in_one_of_two, (port, tmp_path), nprocs=2)
    alone = {"warmup": train(0, 1), "noise2void": train(1, 0), "both": train(1, 1)}
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    for name, expected in alone.items():
        for field, values in expected.items():
            assert torch.equal(first[name][field], second[name][field])
            torch.testing.assert_close(first[name][field], values, rtol=1e-3, atol=2e-6)
    assert (tmp_path / "state0.pt").exists()
    assert not (tmp_path / "state1.pt").exists()


def test_one_process_shares_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined_processes(CPU) as device:
        assert (device, processes(), is_first(), part_of_batch(3)) == (CPU, 1, True, slice(0, 3))
        assert average_gradients(torch.nn.Linear(1, 1), torch.tensor(2.0)) == 2


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(distributed.torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="at most 2"), joined_processes(torch.device("cuda")):
        pass
