"""One tiny model and one small noisy stack serve all tests."""

from __future__ import annotations

import os

import numpy as np
import pytest
import tifffile
import torch

from restormer3d.config import InferenceConfig, ModelConfig, TrainingConfig
from restormer3d.model import Restormer3D

from .emulated import make_known

make_known()
if not torch.cuda.is_available():
    # Read when Triton is imported for the first time; it only matters to tests that ask for engine "cuda".
    os.environ.setdefault("TRITON_INTERPRET", "1")

TINY = {
    "dim": 8,
    "num_blocks": (1, 1, 1, 1),
    "num_refinement_blocks": 1,
    "heads": (1, 1, 2, 2),
    "last_level_channels": 8,
}


def blinking_cells(frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Three Gaussian cells that flash and decay over a smooth ground, (T, H, W) float64, about 20 to 700 ADU."""
    rng = np.random.default_rng(seed)
    t = np.arange(frames)
    y, x = np.mgrid[:height, :width]
    signal = np.full((frames, height, width), 60.0) + 40 * np.sin(x / width * np.pi)
    for _ in range(3):
        center_y, center_x = rng.uniform(0.2, 0.8, 2) * (height, width)
        cell = np.exp(-((y - center_y) ** 2 + (x - center_x) ** 2) / (2 * 2.5**2))
        onset = rng.uniform(0, frames * 0.7)
        trace = 150 + 450 * np.where(t >= onset, np.exp(-(t - onset) / 15), 0)
        signal += trace[:, None, None] * cell
    return signal


def photons(clean: np.ndarray, gain: float = 40.0, read_noise: float = 20.0, seed: int = 0) -> np.ndarray:
    """Poisson-Gaussian noise, int16."""
    rng = np.random.default_rng(seed + 1000)
    noisy = rng.poisson(clean / gain) * gain + rng.normal(0, read_noise, clean.shape)
    return np.rint(noisy).astype(np.int16)


@pytest.fixture(scope="session")
def clean_stack() -> np.ndarray:
    return blinking_cells(40, 32, 40)


@pytest.fixture(scope="session")
def noisy_stack(clean_stack) -> np.ndarray:
    return photons(clean_stack)


@pytest.fixture
def noisy_file(noisy_stack, tmp_path):
    path = tmp_path / "recording.tif"
    tifffile.imwrite(path, noisy_stack, imagej=True, metadata={"axes": "TYX"})
    return path


@pytest.fixture(params=["input", "filters"])
def tiny_model(request) -> Restormer3D:
    torch.manual_seed(0)
    model = Restormer3D(ModelConfig(**TINY, start=request.param))
    for parameter in model.parameters():  # as if trained: nothing is left at zero
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def background_of(mean: torch.Tensor, frames: float = 24.0, zero: float = 0.0) -> torch.Tensor:
    """What a model is told of a whole stack with this temporal mean (B, 1, 1, H, W), as (B, 3, 1, H, W)."""
    return torch.cat([mean, torch.full_like(mean, 1 / frames), torch.full_like(mean, zero)], 1)


@pytest.fixture
def quick_training() -> TrainingConfig:
    return TrainingConfig(patch=(16, 16, 16), batch_size=2, iterations=6, warmup_iterations=2, masked_fraction=0.05)


@pytest.fixture
def quick_inference() -> InferenceConfig:
    return InferenceConfig(window=(16, 16, 16), batch_size=4)
