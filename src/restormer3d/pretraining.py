"""Pretraining on many noisy stacks, recorded and simulated, with validation on simulated scenes of known truth.

Never a clean target: simulated scenes are seen through their noise alone, as recordings are. Their truth only measures.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from restormer3d.checkpoint import CheckpointError, load_weights, save_history, save_weights, weights_notes
from restormer3d.config import InferenceConfig, ModelConfig, Precision, TrainingConfig
from restormer3d.distributed import part_of_batch
from restormer3d.inference import denoise_frames
from restormer3d.metrics import evaluate_stacks
from restormer3d.mixture import fit_mixture
from restormer3d.model import Restormer3D
from restormer3d.noise import estimate_noise
from restormer3d.patches import TrainingStack, measured_stack, training_stack
from restormer3d.progress import Progress
from restormer3d.scenes import Scenes, adapted, scenes_ahead, simulated
from restormer3d.simulation import NoisyScene, noise_parameters, simulate_scene
from restormer3d.stacks import TIFF_SUFFIXES, check_stack, open_stack
from restormer3d.thinning import prepare_thinning
from restormer3d.training import fit

_RECORDINGS = 8  # further noisy recordings of a simulated scene, which the network learns to predict together
_RECORDING_WINDOWS = 100  # of a recording
_MIXTURE_SCENES = 240  # that the usual mixture of filters and its modes are fitted to
_VALIDATION_SHAPE = (128, 64, 64)
_VALIDATION_WINDOWS = 4  # of the validation's scene, that its mixture of filters is fitted to
_VALIDATION_SEED = 9_000_000  # far from the seeds of training scenes and of the quality table


def pretrain(
    stacks: Sequence[Path],
    run_folder: Path,
    training: TrainingConfig,
    model_config: ModelConfig,
    *,
    simulate: int = 0,
    scene_shape: tuple[int, int, int] = (320, 80, 80),
    weights: Restormer3D | None = None,
    device: str | torch.device = "cpu",
    precision: Precision = "fp32",
    resume: bool = False,
    save_every: int = 500,
    workers: int = 0,
    tensorboard: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Train a network on many noisy stacks; a killed run goes on with `resume` to the same weights.

    Within :func:`restormer3d.distributed.joined_processes` the processes share each batch.

    Parameters
    ----------
    stacks : sequence of Path
        TIFF files, or folders whose TIFF files are taken.
    run_folder : Path
        Receives `weights.safetensors` (the last), `best.safetensors` (of the best validation), `history.jsonl`, and
        `state.pt` to resume from.
    training : TrainingConfig
        Iterations, patches, optimiser.
    model_config : ModelConfig
        Of the network.
    simulate : int
        Number of different simulated scenes to train on as well; they are made when needed and never stored.
    scene_shape : tuple of int
        Frames at most, rows and columns of the simulated scenes; each has 40 to 100 % of the frames.
    weights : Restormer3D, optional
        A model to go on from; by default a new one, with initial weights drawn from the seed.
    device : str or torch.device
        Where to compute.
    precision : {"fp32", "tf32", "bf16"}
        Of the network's arithmetic; the weights stay float32.
    resume : bool
        Go on with the run in `run_folder`.
    save_every : int
        Iterations between two savings, each with a validation.
    workers : int
        Processes that prepare the simulated scenes to come, for a GPU that would wait for them; 0 prepares each when
        it is needed. The scenes are the same, but for rounding.
    tensorboard : bool
        Write losses, learning rates and validations for TensorBoard, too, at each saving.
    progress : function, optional
        Called with ("train", iterations done, iterations in all).

    Returns
    -------
    Path
        The last weights.

    Raises
    ------
    ValueError
        If there is nothing to train on, workers are below 0, the processes cannot share the batch equally, or
        TensorBoard is not installed.
    CheckpointError
        If `run_folder` holds a run and `resume` is not set, or one with other settings.
    """
    files = stack_files(stacks)
    if not files and simulate < 1:
        raise ValueError("nothing to train on: name noisy stacks, or give --simulate N")
    if workers < 0:
        raise ValueError(f"expected workers of at least 0, got {workers}")
    part_of_batch(training.batch_size)  # refuses, if it has to, before stacks are read
    for file in files:
        with open_stack(file) as stack:
            check_stack(stack)  # here, where the error names the file, and not hours later
    board = _tensorboard() if tensorboard else None
    state = run_folder / "state.pt"
    if state.exists() and not resume:
        raise CheckpointError(f"{run_folder}: holds a run already; go on with --resume, or choose another folder")
    run_folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(training.seed)
    path = run_folder / "weights.safetensors"
    data = {"stacks": [file.name for file in files], "simulated_scenes": simulate, "scene_shape": list(scene_shape)}
    model = weights or Restormer3D(model_config)
    if state.exists() and path.is_file():
        _refuse_other_run(path, data, model.config)
    notes = data | {"training": training.model_dump()}

    def keep(history: list[dict[str, Any]], model: Restormer3D) -> None:
        history[-1]["validation"] = validate(model, training.patch, device, precision)
        _keep(run_folder, history, model, notes)
        if board is not None:
            _report(board, run_folder / "tensorboard", history)

    paired = training.simulated_target == "second_recording" and simulate > 0
    if paired and weights is None and model.config.start == "filters" and not state.exists():
        numbers = range(min(_MIXTURE_SCENES, simulate))
        fit_mixture(model, (simulated(training.seed, n, scene_shape, 1) for n in numbers), training.patch)

    # Mixtures are fitted when they are needed: a run that resumes has its model's by then.
    @cache
    def recording(file: Path) -> TrainingStack:
        return adapted(model, _recorded(file, training), training.patch, _RECORDING_WINDOWS)

    scenes = Scenes(training.seed, simulate, scene_shape, paired * _RECORDINGS, training.patch)
    with scenes_ahead(model, scenes, workers) as scene:
        fit(
            model,
            lambda iteration: [*map(recording, files), *map(scene, scenes.pool(iteration))],
            training,
            device=device,
            precision=precision,
            progress=progress,
            state_file=state,
            save_every=save_every,
            on_save=keep,
        )
    return path


def _refuse_other_run(weights: Path, data: dict[str, Any], model: ModelConfig) -> None:
    """Refuse to go on with a run of another network, or on other data, by what its weights say."""
    if load_weights(weights).config != model:
        raise CheckpointError(
            f"{weights.parent}: its run is of another network; give its [model], --recipe and --weights, or choose "
            "another folder"
        )
    before = weights_notes(weights)
    if changed := [name for name, value in data.items() if before.get(name) != value]:
        name = changed[0]
        raise CheckpointError(
            f"{weights.parent}: its run has {name} = {before.get(name)}, asked for is {data[name]}; "
            "go on with what it had, or choose another folder"
        )


def _keep(run_folder: Path, history: list[dict[str, Any]], model: Restormer3D, notes: dict[str, Any]) -> None:
    """Write the last weights, the best if these are, and the history, each in one step."""
    notes = notes | {"iteration": history[-1]["iteration"], "last": history[-1]}
    save_weights(run_folder / "weights.safetensors", model, notes)
    if _is_best(history):
        save_weights(run_folder / "best.safetensors", model, notes)
    save_history(run_folder / "history.jsonl", history)


def _is_best(history: list[dict[str, Any]]) -> bool:
    """Whether the last entry's mean validation score, stSNR and activity SNR of all noise levels, is the best one."""
    *earlier, last = [float(np.mean(list(entry["validation"].values()))) for entry in history if "validation" in entry]
    return all(last > score for score in earlier)


def _tensorboard() -> Any:
    """Return the class that writes for TensorBoard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("--tensorboard needs TensorBoard: pip install 'restormer3d[tensorboard]'") from error
    return SummaryWriter


def _report(board: Any, folder: Path, history: list[dict[str, Any]]) -> None:
    """Write the entries since the last saving, and nothing that a killed run would write again."""
    saved = [entry["iteration"] for entry in history[:-1] if "validation" in entry]
    new = history[saved[-1] if saved else 0 :]
    began = time.time() - history[-1]["seconds"]
    with board(str(folder), purge_step=new[0]["iteration"]) as writer:
        for entry in new:
            scores = {f"validation/{name}": score for name, score in entry.get("validation", {}).items()}
            for name, value in ({key: entry[key] for key in ("loss", "learning_rate")} | scores).items():
                writer.add_scalar(name, value, entry["iteration"], walltime=began + entry["seconds"])


def stack_files(stacks: Sequence[Path]) -> list[Path]:
    """TIFF files among the given paths, those inside folders included, in order of their names."""
    found: list[Path] = []
    for path in stacks:
        inside = sorted(filter(_is_tiff, path.iterdir())) if path.is_dir() else [path]
        if not inside:
            raise ValueError(f"{path}: a folder without TIFF files")
        found += inside
    return found


def _is_tiff(path: Path) -> bool:
    """Whether it is named as a TIFF file; hidden ones, such as the shadows that macOS leaves, are none."""
    return path.suffix.lower() in TIFF_SUFFIXES and not path.name.startswith(".")


def validate(
    model: Restormer3D,
    window: tuple[int, int, int],
    device: str | torch.device,
    precision: Precision = "fp32",
) -> dict[str, float]:
    """StSNR and activity SNR (dB), without fine-tuning, on one simulated scene at each of the three noise levels."""
    was_training = model.training
    config = InferenceConfig(window=window, overlap_xy=0.25)
    scores = {}
    for level in (1, 2, 3):
        scene = _validation_scene()
        gain, read_noise = noise_parameters(level)
        noisy = NoisyScene(scene, gain, read_noise, seed=_VALIDATION_SEED + level)[:]
        source = adapted(model, training_stack(noisy), window, _VALIDATION_WINDOWS)
        frames = denoise_frames(
            model,
            noisy,
            source.normalization,
            source.background,
            config,
            mixture=source.mixture,
            device=device,
            precision=precision,
        )
        found = evaluate_stacks(scene[:], np.stack(list(frames)))
        scores |= {f"stsnr_level{level}": found["stsnr"], f"activity_snr_level{level}": found["activity_snr"]}
    model.train(was_training)
    return scores


@lru_cache(maxsize=1)
def _validation_scene() -> Any:
    return simulate_scene(_VALIDATION_SHAPE, seed=_VALIDATION_SEED)


def _recorded(path: Path, training: TrainingConfig) -> TrainingStack:
    stack = open_stack(path)
    noise = estimate_noise(stack)
    source = measured_stack(stack, noise, training.blind_spot)
    mean = source.normalization.invert(source.mean)
    return replace(source, thinning=prepare_thinning(stack, mean, source.normalization, noise, training.thinning))
