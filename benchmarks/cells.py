"""One cell of the quality table, in a process of its own: a stack is made, denoised by one method, and scored.

The process is fresh so that its peak memory is that of one method; the job comes as JSON on standard input.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.jobs import read_recording
from benchmarks.memory import peak_resident_bytes
from benchmarks.methods import METHODS, Method, Score
from restormer3d.artefacts.planes import find_planes, of_one_image
from restormer3d.metrics import evaluate_stacks
from restormer3d.noise import estimate_noise
from restormer3d.report import held_out_frame_error, photon_transfer, residual_whiteness
from restormer3d.simulation import NoisyScene, Scene, noise_parameters, simulate_scene
from restormer3d.stacks import open_stack, write_stack

ROOT = Path(__file__).resolve().parents[1]
PICTURE_RANKS = (0.0, 0.01, 0.05)  # pixels drawn: so many of the others are livelier


def main() -> None:
    """Compute the job on standard input and write its cell to the file that the first argument names."""
    target = Path(sys.argv[1])
    job = json.load(sys.stdin)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as workspace:
        measure = _scene_cell if job["kind"] == "scene" else _real_cell
        cell = measure(job, METHODS[job["method"]], Path(workspace), target)
    cell |= {name: value for name, value in job.items() if name not in ("arguments", "path")}
    cell |= {
        "load_average": load,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": _machine(),
    }
    write_json(target, cell)


def write_json(path: Path, value: Any) -> None:
    """Write JSON under a temporary name and rename it; what is not finite becomes null."""
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    part.write_text(json.dumps(_finite(value), indent=1, allow_nan=False, default=float) + "\n")
    os.replace(part, path)


def simulated(job: dict[str, Any]) -> tuple[Scene, NoisyScene]:
    """Return the clean scene of a job and what the microscope records of it."""
    frames, height, width = job["shape"]
    scene = simulate_scene((frames, height, width), seed=job["seed"])
    return scene, NoisyScene(scene, *noise_parameters(job["level"]), seed=job["seed"])


def truth_score(clean: np.ndarray, name: str) -> Score:
    """Score denoised frames by `stsnr` or `activity_snr` as `evaluate_stacks` does, without its other metrics."""

    def decibels(signal: np.ndarray, error: np.ndarray) -> float:
        has_signal = signal > 0
        return float(np.mean(10 * np.log10(signal[has_signal] / error[has_signal])))

    def score(frames: Iterable[np.ndarray]) -> float:
        error = np.stack(list(frames)) - clean
        if name == "stsnr":
            parts = (
                decibels(np.sum(clean**2, axes, dtype=float), np.sum(error**2, axes, dtype=float))
                for axes in ((1, 2), 0)
            )
            return sum(parts) / 2
        total = (np.var(part, axis=0, dtype=float).sum() for part in (clean, error))
        return decibels(*(np.atleast_1d(value) for value in total))

    return score


def _scene_cell(job: dict[str, Any], method: Method, workspace: Path, target: Path) -> dict[str, Any]:
    scene, noisy = simulated(job)
    source, output = workspace / "noisy.tif", workspace / "denoised.tif"
    write_stack(source, (noisy[t] for t in range(len(noisy))), shape=noisy.shape, dtype=noisy.dtype)
    score = truth_score(scene[:], method.oracle) if method.oracle else _no_truth
    cell = _run(method, source, output, job["arguments"], score)
    clean = scene[:]
    with open_stack(output) as denoised:
        cell["scores"] = evaluate_stacks(
            clean, denoised, masks=scene.masks, frame_rate_hz=scene.parameters.frame_rate_hz
        )
        if job["number"] == 0:
            np.savez_compressed(target.with_suffix(".npz"), **picture(clean, denoised))
    return cell


def _real_cell(job: dict[str, Any], method: Method, workspace: Path, _: Path) -> dict[str, Any]:
    """Score without truth: held-out frames, then, but for an oracle, what is left in the residual."""
    recording = read_recording(job)
    cell: dict[str, Any] = {"noise": _noise(recording)} if job["method"] == "raw" else {}
    found = find_planes(recording)
    planes = 1 if found is None else found.count  # as `evaluate --real`: every other turn is held out

    def run(name: str, frames: np.ndarray) -> Iterator[np.ndarray]:
        source, output = workspace / f"{name}.tif", workspace / f"{name}_denoised.tif"
        write_stack(source, [frames], shape=frames.shape, dtype=frames.dtype)
        cell.update(_run(method, source, output, job["arguments"], held_out))
        with open_stack(output) as denoised:
            yield from (denoised[t] for t in range(denoised.shape[0]))

    def held_out(frames: Iterable[np.ndarray]) -> float:
        return -held_out_frame_error(recording, lambda _: frames, planes).mse

    score = held_out_frame_error(recording, lambda even: run("even", even[:]), planes)
    cell["held_out"] = {name: getattr(score, name) for name in ("mse", "standard_error", "noise_variance")}
    cell["held_out"]["per_frame"] = score.per_frame.tolist()
    if not method.oracle and job["method"] != "raw":
        denoised = np.stack(list(run("whole", recording)))
        cell["residual"] = residual_whiteness(recording, denoised)
        cell["photon_transfer"] = photon_transfer(of_one_image(denoised, found))
    return cell


def _run(method: Method, source: Path, output: Path, arguments: dict[str, Any], score: Score) -> dict[str, Any]:
    """Denoise one file against the clock; libraries are loaded before it starts."""
    if method.kind == "network":
        importlib.import_module("restormer3d.workflow")
    started = time.monotonic()
    done = method.run(source, output, arguments, score)
    seconds = time.monotonic() - started
    return {
        "done": done,
        "seconds": seconds,
        "peak_memory_mb": peak_resident_bytes(of_children=method.kind == "peer") / 1e6,
        **_gpu_memory(method),
    }


def _no_truth(_: Iterable[np.ndarray]) -> float:
    raise AssertionError("only an oracle may look at the truth")


def _gpu_memory(method: Method) -> dict[str, Any]:
    if method.kind != "network":
        return {}
    import torch

    if not torch.cuda.is_available():
        return {}
    return {"gpu": torch.cuda.get_device_name(), "peak_gpu_memory_mb": torch.cuda.max_memory_allocated() / 1e6}


def picture(clean: np.ndarray, denoised: Any) -> dict[str, Any]:
    """One frame and three pixels' traces: the liveliest pixel, at its peak, and two of other ranks away from it."""
    order = np.argsort(-clean.std(axis=0), axis=None)
    places = np.stack(np.unravel_index(order, clean.shape[1:]), axis=1)  # (H W, 2), the liveliest first
    away = np.ones(len(places), dtype=bool)
    pixels = []
    for rank in PICTURE_RANKS:
        below = np.arange(len(places)) >= round(rank * (len(places) - 1))
        pixels.append(places[np.argmax(away & below)])
        away &= np.abs(places - pixels[-1]).max(axis=1) > min(clean.shape[1:]) // 6
    frame = int(clean[:, *pixels[0]].argmax())
    return {
        "pixels": np.array(pixels),
        "number": np.array(frame),
        "clean_frame": clean[frame],
        "clean_traces": np.stack([clean[:, y, x] for y, x in pixels]),
        "frame": denoised[frame],
        "traces": np.stack([denoised[:, y : y + 1, x : x + 1].ravel() for y, x in pixels]),
    }


def _noise(recording: np.ndarray) -> dict[str, Any]:
    found = estimate_noise(recording)
    return {
        "gain": found.gain,
        "read_noise_variance": found.read_noise_variance,
        "photons_per_pixel": found.photons_per_pixel,
        "correlation": {axis: lags[0] for axis, lags in found.correlation.items()},
    }


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value


def _commit() -> str:
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude=*"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def _machine() -> str:
    models = (
        re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else []
    )
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB, "
        f"Python {platform.python_version()}, torch {version('torch')}, numpy {version('numpy')}"
    )


if __name__ == "__main__":
    main()
