"""What is computed on another device is what the CPU computes, with and without double precision there."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from restormer3d import mixture, refinement, static_image
from restormer3d.activity import components
from restormer3d.arithmetic import float64_device, forced_engine
from restormer3d.config import ModelConfig
from restormer3d.denoising import start_denoising
from restormer3d.inference import denoise_frames
from restormer3d.mixture import fit_mixture
from restormer3d.model import Restormer3D
from restormer3d.patches import training_stack
from restormer3d.progress import silent
from restormer3d.settings import settings
from restormer3d.training import fit

from .conftest import TINY, blinking_cells, photons
from .emulated import emulated_device

NOISY = photons(blinking_cells(52, 24, 28))


@contextmanager
def device_with(monkeypatch, float64: bool):
    """Like a GPU of NVIDIA's, or like one of Apple's."""
    with emulated_device(float64) as device:
        if float64:
            for module in (components, refinement, mixture, static_image):
                monkeypatch.setattr(module, "float64_device", torch.device)
        yield device


def denoised(stack, device: torch.device, recipe="default", **changed) -> np.ndarray:
    chosen = settings(recipe, engine="reference", **changed)
    with forced_engine("reference"):
        return np.stack(list(start_denoising(stack, chosen, "restormer3d", device, None, silent, silent).frames))


def test_tensors_of_two_devices_do_not_mix():
    with emulated_device(float64=False) as device:
        x = torch.arange(6.0).reshape(2, 3).to(device)
        assert x.device == device
        assert (2 * x + 1).sum().item() == 36
        assert x[torch.tensor([1])].tolist() == [[3, 4, 5]]  # as on a GPU
        for mixed in (lambda: x + torch.ones(3), lambda: torch.ones(2, 3)[x.long()], lambda: torch.cat([x, x.cpu()])):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        for doubled in (x.double, lambda: torch.zeros(3, dtype=torch.float64, device=device)):
            with pytest.raises(TypeError, match="double precision"):
                doubled()
        with pytest.raises((TypeError, RuntimeError)):
            x.numpy()
    with emulated_device(float64=True) as device:
        assert torch.ones(3, device=device).double().sum().item() == 3


def test_double_precision_is_computed_where_there_is_any():
    for device, where in (("cpu", "cpu"), ("cuda:1", "cuda:1"), ("mps", "cpu")):
        assert float64_device(device) == torch.device(where)


@pytest.mark.parametrize("changed", [{"iterations": 2}, {"iterations": 0, "symmetries": 4}])
def test_a_stack_is_denoised_as_on_the_cpu(changed, monkeypatch):
    expected = denoised(NOISY, torch.device("cpu"), **changed)
    for float64 in (True, False):
        with monkeypatch.context() as patched, device_with(patched, float64) as device:
            found = denoised(NOISY, device, **changed)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3 * expected.std(), err_msg=f"{float64=}")


@pytest.mark.parametrize(
    ("part", "float64"),
    [((32, 24, 28), False), ((52, 17, 28), False), ((32, 24, 20), True)],
    ids=["frames", "tiles", "both"],
)
def test_so_are_planes_and_a_long_recording_in_parts(part, float64, monkeypatch):
    monkeypatch.setattr(refinement, "part_shape", lambda *_: part)
    other = photons(blinking_cells(52, 24, 28, seed=4) + 400, seed=4)
    in_turns = np.stack([NOISY, other], 1).reshape(-1, *NOISY.shape[1:])
    expected = denoised(in_turns, torch.device("cpu"), iterations=0, planes=2)
    with device_with(monkeypatch, float64) as device:
        found = denoised(in_turns, device, iterations=0, planes=2)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3 * expected.std())


@pytest.mark.parametrize("twice", [False, True], ids=["blind spot", "second recording"])
def test_a_network_is_trained_and_applied_as_on_the_cpu(tiny_model, quick_training, quick_inference, twice):
    source = training_stack(NOISY, (0, 0, 1), second=NOISY[::-1].copy() if twice else None)

    def trained_on(device: torch.device) -> np.ndarray:
        model = copy.deepcopy(tiny_model)
        with forced_engine("reference"):
            fit(model, [source], quick_training, device=device)
            shown = source.normalization, source.background, quick_inference
            return np.stack(list(denoise_frames(model, NOISY, *shown, device=device)))

    expected = trained_on(torch.device("cpu"))
    with emulated_device(float64=False) as device:
        np.testing.assert_allclose(trained_on(device), expected, rtol=1e-3, atol=1e-3 * expected.std())


@pytest.mark.parametrize("float64", [True, False])
def test_a_mixture_of_filters_is_learned_as_on_the_cpu(float64, monkeypatch):
    pairs = [training_stack(NOISY, second=NOISY[::-1].copy()), training_stack(NOISY[:, ::-1], second=NOISY)]

    def learned_on(device: torch.device) -> torch.Tensor:
        model = Restormer3D(ModelConfig(**TINY, start="filters")).to(device)
        fit_mixture(model, iter(pairs), (48, 24, 24))
        return model.filter_weights.cpu()

    expected = learned_on(torch.device("cpu"))
    with device_with(monkeypatch, float64) as device:
        torch.testing.assert_close(learned_on(device), expected, rtol=1e-3, atol=1e-3)
