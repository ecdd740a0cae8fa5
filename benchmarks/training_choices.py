"""What Noise2Void training gains by each choice, in equal time: `python -m benchmarks.training_choices`.

A small network of the published form learns one simulated recording from scratch, so that some minutes on a CPU show
how fast it learns; the package's own networks start far beyond where these differences are seen. Each cell is kept as
one JSON file: a run that was killed goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal
from unittest.mock import patch

import numpy as np
import torch
from cyclopts import App, Parameter
from torch import Tensor, nn

from benchmarks.cells import write_json
from benchmarks.jobs import without_folders
from benchmarks.tables import publish
from benchmarks.timing import alternate
from restormer3d import ops
from restormer3d.config import InferenceConfig, ModelConfig
from restormer3d.inference import denoise_frames
from restormer3d.metrics import evaluate_stacks
from restormer3d.model import GDFN, MDTA, Pointwise, Restormer3D, UNet, fold, unfold
from restormer3d.noise import estimate_noise
from restormer3d.objectives import hide, masked_loss
from restormer3d.patches import TrainingStack, random_patches, training_stack
from restormer3d.simulation import NoisyScene, noise_parameters, simulate_scene
from restormer3d.thinning import prepare_thinning
from restormer3d.training import update_average

BEGIN = "<!-- choices table: begin (written by benchmarks.training_choices --write; edit nothing here by hand) -->"
END = "<!-- choices table: end -->"
_SEED = 9_400_000
_WIDTH = 32  # pixels of a patch and of a window
_FRAMES = 64  # of all patches of a batch, or as many as one patch has
_RATE = 1e-3
_TIMED, _ROUNDS = 4, 10  # iterations that are timed at once, and how often


@dataclass(frozen=True)
class Choice:
    """How a network learns; the defaults are what the rows of the table differ from.

    Attributes
    ----------
    masked_fraction : float
        Share of a patch's voxels that are masked.
    maskings : int
        Masks of the same patch in a batch, which then holds so many patches less.
    loss : str
        As `objectives.masked_loss` takes it.
    decay : float
        Of the running average of the weights that is scored; 0 scores the last ones.
    thinning : float
        Smallest share of photons that patches keep.
    wide : bool
        Whether the last level keeps the channels of its skip connection.
    in_time : bool
        Whether levels are down-sampled along time, too.
    centered : bool
        Whether LayerNorm takes the mean over channels away.
    depth : int
        Frames of a patch and of a window.
    mean : {"unused", "given", "subtracted", "start"}
        What the network has of the temporal mean: nothing; a second channel; its channel is less the mean, but the
        residual is taken from the noisy voxel, as published; the residual is taken from the mean, too.
    """

    masked_fraction: float = 0.015
    maskings: int = 1
    loss: str = "mse"
    decay: float = 0.0
    thinning: float = 1.0
    wide: bool = False
    in_time: bool = True
    centered: bool = False
    depth: int = 32
    mean: Literal["unused", "given", "subtracted", "start"] = "unused"


ROWS = {
    "**as published**": Choice(),
    "0.5 % of the voxels masked": Choice(masked_fraction=0.005),
    "5 % masked": Choice(masked_fraction=0.05),
    "15 % masked": Choice(masked_fraction=0.15),
    "one patch masked twice, instead of two patches": Choice(maskings=2),
    "running average of the weights, decay 0.99": Choice(decay=0.99),
    "L1 instead of squared error": Choice(loss="l1"),
    "squared error in units of the local noise variance": Choice(loss="noise"),
    "photons thinned, to half at most": Choice(thinning=0.5),
    "patches and windows of 64 frames": Choice(depth=64),
    "patches and windows of 128 frames": Choice(depth=128),
    "the temporal mean as a second channel": Choice(mean="given"),
    "the temporal mean subtracted from what the network sees": Choice(mean="subtracted"),
    "the same, and the residual taken from the mean": Choice(mean="start"),
    "twice the channels at the last level": Choice(wide=True),
    "not down-sampled in time": Choice(in_time=False),
    "LayerNorm that centers": Choice(centered=True),
}

app = App(name="python -m benchmarks.training_choices", help_format="plaintext")


@app.default
def training_choices(
    *,
    shape: Annotated[tuple[int, int, int], Parameter(negative="")] = (128, 96, 96),
    level: int = 2,
    iterations: int = 400,
    seeds: int = 2,
    dim: int = 8,
    folder: Path = Path("runs/training_choices"),
    write: Path | None = None,
) -> int:
    """Fill the table of choices; resumes where it was stopped.

    Parameters
    ----------
    shape
        Frames, rows and columns of the simulated recording.
    level
        Noise level: 1, 2 or 3.
    iterations
        Of the first row; the others get as many as take the same time, by a short calibration before all else.
    seeds
        Trainings of each row, with other patches, masks and initial weights.
    dim
        Channels of the network at full resolution; 32 as published.
    folder
        Where the cells are kept.
    write
        Markdown file whose table is replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scene = simulate_scene(shape, seed=_SEED)
    noisy = NoisyScene(scene, *noise_parameters(level), seed=_SEED)[:]
    counts = _equal_times(noisy, (shape, level, iterations, dim), folder)
    lines = ["| | iterations | stSNR (dB) | activity SNR (dB) |", "|---|---|---|---|"]
    for label, choice in ROWS.items():
        setting = (shape, level, counts[label], dim)
        cells = [_cell(scene, noisy, choice, (*setting, seed), folder) for seed in range(seeds)]
        scores = [sorted(cell[name] for cell in cells) for name in ("stsnr", "activity_snr")]
        texts = [f"{found[0]:.2f} to {found[-1]:.2f}" for found in scores]
        lines.append(f"| {label} | {counts[label]} | {' | '.join(texts)} |")
        print(lines[-1], file=sys.stderr, flush=True)
    command = f"python -m benchmarks.training_choices {without_folders(sys.argv[1:])}".strip()
    size = " x ".join(map(str, shape))
    origin = f"Computed by `{command}` on one scene of {size} at level {level} (seed {_SEED})"
    note = (
        f"{origin}; lowest and highest of {seeds} trainings. Iterations: as many as took the time of the first row's."
    )
    publish(write, BEGIN, END, note, "\n".join(lines))
    return 0


def _equal_times(noisy: np.ndarray, setting: tuple[Any, ...], folder: Path) -> dict[str, int]:
    """Iterations of every row that take as long as the first row's; measured once, on a machine that is quiet."""
    *_, iterations, dim = setting
    text = json.dumps([*setting, list(map(repr, ROWS.values()))])
    path = folder / f"iterations_{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
    if not path.exists():
        variants = {label: _some_iterations(noisy, choice, dim) for label, choice in ROWS.items()}
        seconds = alternate(variants, _ROUNDS, torch.device("cpu"))
        least = {label: min(found) for label, found in seconds.items()}  # other work only ever adds to it
        usual = next(iter(least.values()))
        write_json(path, {label: round(iterations * usual / found) for label, found in least.items()})
    return json.loads(path.read_text())


def _some_iterations(noisy: np.ndarray, choice: Choice, dim: int) -> Callable[[], object]:
    """Return what is timed: a few iterations, without what they begin with."""
    with _changed(choice):
        model, source = _network(choice, dim, 0), _source(noisy, choice)

    def run() -> None:
        with _changed(choice):
            _train(model, source, choice, _TIMED, 0)

    return run


def _cell(scene: Any, noisy: np.ndarray, choice: Choice, setting: tuple[Any, ...], folder: Path) -> dict[str, Any]:
    """Train and score, unless that was done before."""
    *_, iterations, dim, seed = setting
    text = json.dumps([repr(choice), *setting, _SEED, _RATE, _WIDTH, _FRAMES])
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:12]}.json"
    if path.exists():
        return json.loads(path.read_text())
    with _changed(choice):
        source = _source(noisy, choice)
        model = _train(_network(choice, dim, seed), source, choice, iterations, seed)
        frames = denoise_frames(
            model,
            source.stack,
            normalization=source.normalization,
            background=source.background,
            config=InferenceConfig(window=(choice.depth, _WIDTH, _WIDTH)),
        )
        scores = evaluate_stacks(scene[:], np.stack(list(frames)))
    cell = {name: scores[name] for name in ("stsnr", "activity_snr")}
    write_json(path, cell | {"choice": text})
    return cell


def _network(choice: Choice, dim: int, seed: int) -> Restormer3D:
    torch.manual_seed(seed)
    config = ModelConfig(dim=dim, last_level_channels=dim * (1 + choice.wide))
    return Restormer3D(config) if choice.mean == "unused" else _WithMean(config, choice.mean)


def _source(noisy: np.ndarray, choice: Choice) -> TrainingStack:
    source = training_stack(noisy)
    if choice.thinning == 1:
        return source
    mean = source.normalization.invert(source.mean)
    noise = estimate_noise(noisy)
    return replace(source, thinning=prepare_thinning(noisy, mean, source.normalization, noise, choice.thinning))


def _train(model: Restormer3D, source: TrainingStack, choice: Choice, iterations: int, seed: int) -> nn.Module:
    """Train a network by Noise2Void, with one cosine; returns what is to be scored."""
    average = _network(choice, model.config.dim, seed)
    optimizer = torch.optim.AdamW(model.parameters(), _RATE, weight_decay=1e-5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations, 1e-6)
    patch_shape = (choice.depth, _WIDTH, _WIDTH)
    count = max(_FRAMES // choice.depth, 1) // choice.maskings
    for iteration in range(iterations):
        rng = np.random.default_rng([seed, iteration])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        batch = random_patches([source], patch_shape, count, rng)
        values = (x.repeat_interleave(choice.maskings, 0) for x in (batch.noisy, batch.background, batch.stack_frames))
        hidden = hide(*values, masked_fraction=choice.masked_fraction, extent=(0, 0, 0), generator=generator)
        loss = masked_loss(model, *hidden, loss=choice.loss)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if choice.decay:
            update_average(average, model, choice.decay, iteration)
    return (average if choice.decay else model).eval()


def _changed(choice: Choice) -> ExitStack:
    """Within it, networks are made and computed as chosen."""
    stack = ExitStack()
    if choice.centered:
        stack.enter_context(patch("restormer3d.model.MDTA.forward", _centered_mdta))
        stack.enter_context(patch("restormer3d.model.GDFN.forward", _centered_gdfn))
    if not choice.in_time:
        stack.enter_context(patch("restormer3d.model.Downsample", partial(_InPlane, up=False)))
        stack.enter_context(patch("restormer3d.model.Upsample", partial(_InPlane, up=True)))
    return stack


def _centered_mdta(self: MDTA, x: Tensor) -> Tensor:
    qkv = _centering(self.qkv, self.norm_weight)
    return ops.mdta(x, self.norm_weight, qkv, self.qkv_dwconv, self.temperature, self.project_out)


def _centered_gdfn(self: GDFN, x: Tensor) -> Tensor:
    project_in = _centering(self.project_in, self.norm_weight)
    return ops.gdfn(x, self.norm_weight, project_in, self.dwconv, self.project_out)


def _centering(weight: Tensor, norm_weight: Tensor) -> Tensor:
    """Make a map of what LayerNorm gives one of the same less its mean: taking it away is linear."""
    scale = norm_weight.view(1, -1, 1, 1, 1)
    scaled = weight * scale
    return (scaled - scaled.mean(1, keepdim=True)) / scale


class _WithMean(Restormer3D):
    """The published form with the stack's temporal mean, the first of `background`; no masked voxel is in it."""

    def __init__(self, config: ModelConfig, mean: Literal["given", "subtracted", "start"]) -> None:
        super().__init__(config)
        self.mean = mean
        if mean == "given":
            self.unet = UNet(config, in_channels=2, out_channels=1)

    def forward(self, x: Tensor, background: Tensor | None = None, mixture: Tensor | None = None) -> Tensor:
        """Map windows (B, 1, T, H, W), multiples of 8, and their background to denoised windows; no mixture."""
        assert background is not None
        assert mixture is None
        mean = background[:, :1].expand_as(x)
        residual = self.unet(torch.cat([x, mean], 1) if self.mean == "given" else x - mean)
        return (mean if self.mean == "start" else x) - residual


class _InPlane(nn.Module):
    """Halve H and W and double the channels, or the reverse; T stays."""

    def __init__(self, dim: int, *, up: bool) -> None:
        super().__init__()
        self.up = up
        self.pointwise = Pointwise(dim, 2 * dim if up else dim // 2)

    def forward(self, x: Tensor) -> Tensor:
        return (unfold if self.up else fold)(self.pointwise(x), (1, 2, 2))


if __name__ == "__main__":
    app()
