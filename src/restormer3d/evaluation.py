"""Scores of files, against a clean stack where there is one and from the recording itself where there is none.

Also the simulated files that such scores need.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from restormer3d.artefacts.planes import find_planes, of_one_image
from restormer3d.artefacts.temporal_correlation import Whitened, temporal_correlation
from restormer3d.checkpoint import replacing
from restormer3d.config import Method
from restormer3d.denoising import array_and_record
from restormer3d.metrics import evaluate_stacks
from restormer3d.progress import Progress, Say
from restormer3d.report import held_out_frame_error, photon_transfer, residual_whiteness
from restormer3d.settings import Settings
from restormer3d.sidecar import as_json
from restormer3d.simulation import NoisyScene, simulate_scene, write_scene
from restormer3d.stacks import StackError, TiffStack, check_stack, open_stack, without_missing
from restormer3d.workflow import FAILURES


def evaluate(
    denoised: Path, *, clean: Path, noisy: Path | None = None, masks: Path | None = None, frame_rate_hz: float = 30.0
) -> dict[str, float]:
    """Score a denoised stack against the clean one.

    Parameters
    ----------
    denoised, clean : Path
        TIFF files of the same shape.
    noisy : Path, optional
        The recording: its scores are added as `noisy_...`.
    masks : Path, optional
        A TIFF image (H, W) with 0 outside and n in ROI n: scores of the ROIs' events are added.
    frame_rate_hz : float
        Frames per second, for rise and decay times.

    Returns
    -------
    dict of str to float
        See :func:`restormer3d.metrics.evaluate_stacks`.

    Raises
    ------
    StackError
        If a file cannot be read or the shapes differ.
    """
    with open_stack(clean) as truth, open_stack(denoised) as result:
        _same_shape(truth, result)
        if noisy is None:
            return evaluate_stacks(truth, result, masks=_read_masks(masks), frame_rate_hz=frame_rate_hz)
        with open_stack(noisy) as recording:
            _same_shape(truth, recording)
            return evaluate_stacks(
                truth, result, noisy=recording, masks=_read_masks(masks), frame_rate_hz=frame_rate_hz
            )


def evaluate_real(
    noisy: Path,
    chosen: Settings,
    methods: list[Method],
    *,
    device: str = "auto",
    time_limit: float | None = None,
    progress: Progress,
    say: Say,
) -> dict[str, dict[str, Any]]:
    """Score methods on a recording without ground truth, by frames that they never saw.

    Each method denoises the even frames only (every other turn where the stack shows planes in turns); the odd ones,
    predicted by interpolation, are compared with what was recorded. The noise is independent between frames, so the
    error is the noise's variance plus the method's error: differences between methods are unbiased. Where it is not, as
    in running averages, it is made white before. Voxels that are NaN hold what other frames show there.

    Parameters
    ----------
    noisy : Path
        The recording.
    chosen : Settings
        Of the network.
    methods : list of str
        What to compare.
    device, time_limit, progress, say
        As for :func:`restormer3d.workflow.denoise`; the limit is for each denoising, of which a method needs two.

    Returns
    -------
    dict
        For each method the held-out error, the whiteness of the residual, and the photon transfer line;
        `instead_of_the_network` where the time sufficed for none; `failed` with the reason where it could not end.
    """
    with open_stack(noisy) as stack:
        recording = without_missing(stack, check_stack(stack, missing=True))[:]
    planes = find_planes(recording)
    averaged = temporal_correlation(recording) if planes is None else None
    if averaged is not None:
        say(
            f"the noise of frames is correlated along time, by up to {averaged.largest:.2g}, and who keeps it would "
            "foretell frames: methods denoise the recording whose noise was made white, and are scored on it"
        )
        recording = Whitened(recording, averaged.whitening)[:]
    noise = photon_transfer(of_one_image(recording, planes))
    scores: dict[str, dict[str, Any]] = {"recording": {"photon_transfer": noise}}
    for method in methods:
        say(
            f"{method}: denoising the even frames"
            if planes is None
            else f"{method}: denoising every other turn of planes"
        )
        result: dict[str, Any] = {}

        def run(frames: Any, method: Method = method, result: dict[str, Any] = result) -> Any:
            denoised, record = array_and_record(
                frames[:], chosen, method=method, device=device, time_limit=time_limit, progress=progress, say=say
            )
            if "instead_of_the_network" in record:
                result["instead_of_the_network"] = "Gaussian filter, for want of time"
            return denoised

        scores[method] = result
        try:
            held_out = held_out_frame_error(recording, run, 1 if planes is None else planes.count)
            result["held_out"] = {
                "mse": held_out.mse,
                "standard_error": held_out.standard_error,
                "in_noise_variances": held_out.in_noise_variances,
            }
            denoised = run(recording)
            result["residual"] = residual_whiteness(recording, denoised)
            result["photon_transfer"] = photon_transfer(of_one_image(denoised, planes))
        except FAILURES as error:
            result["failed"] = str(error) or type(error).__name__
            say(f"{method} failed: {result['failed']}")
    return scores


def write_json(path: Path, scores: dict[str, Any]) -> None:
    """Write scores to a JSON file, in one step; what is undefined (NaN) becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_text(json.dumps(as_json(scores), indent=2) + "\n")


def _same_shape(clean: TiffStack, other: TiffStack) -> None:
    if clean.shape != other.shape:
        raise StackError(
            f"{other.path}: expected the shape of the clean stack {clean.shape}, found {other.shape}; "
            "give files of the same recording"
        )


def _read_masks(path: Path | None) -> np.ndarray | None:
    return None if path is None else np.squeeze(tifffile.imread(path))


def simulate(
    folder: Path,
    *,
    scenes: int,
    shape: tuple[int, int, int],
    gain: float,
    read_noise_variance: float,
    label: str,
    seed: int,
    overwrite: bool = False,
    scene_parameters: dict[str, Any] | None = None,
    say: Say,
) -> list[dict[str, Path]]:
    """Write simulated recordings with their truth: noisy and clean TIFF, masks, traces, parameters.

    Parameters
    ----------
    folder : Path
        Where the files go.
    scenes : int
        How many; scene k has seed `seed + k`.
    shape : tuple of int
        Frames, rows and columns.
    gain, read_noise_variance : float
        ADU per photon, and variance of the read noise in ADU^2.
    label : str
        Part of the noisy file's name.
    seed : int
        Of the first scene.
    overwrite : bool
        Whether existing files are replaced.
    scene_parameters : dict, optional
        Fields of :class:`restormer3d.simulation.SceneParameters`.
    say : function
        Called with one line per scene.

    Returns
    -------
    list of dict
        The files of each scene.
    """
    written = []
    for number in range(scenes):
        scene = simulate_scene(shape, seed=seed + number, **(scene_parameters or {}))
        noisy = NoisyScene(scene, gain, read_noise_variance, seed=seed + number)
        written.append(write_scene(folder, number, noisy, label=label, overwrite=overwrite))
        say(f"scene {number}: {written[-1]['noisy']} and its truth")
    return written
