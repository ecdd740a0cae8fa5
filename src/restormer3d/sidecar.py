"""The JSON sidecar beside every result: what came in, what was done, with which settings, weights and versions."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from restormer3d import ops
from restormer3d.checkpoint import COURSE_WEIGHTS, FOOTPRINT_WEIGHTS, IMAGE_WEIGHTS, file_sha256, network_file
from restormer3d.config import Precision
from restormer3d.patches import TrainingStack
from restormer3d.settings import Settings
from restormer3d.stacks import StackCheck, TiffStack

_LOSS_POINTS = 200  # entries of the loss curve


def as_json(value: Any) -> Any:
    """Turn a record into what JSON knows: numpy's numbers and arrays, paths; what is undefined (NaN) becomes null."""
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [as_json(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    if isinstance(value, np.generic):
        return value.item()
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def sidecar(
    stack: TiffStack,
    check: StackCheck,
    target: Path,
    written: dict[str, Any],
    record: dict[str, Any],
    messages: list[str],
    seconds: float,
) -> dict[str, Any]:
    """Put together the record of one denoised file.

    Parameters
    ----------
    stack : TiffStack
        The input.
    check : StackCheck
        What the first pass over it found.
    target : Path
        The output file.
    written : dict
        Fields of the :class:`restormer3d.stacks.WriteSummary`.
    record : dict
        Method, settings, losses and timings.
    messages : list of str
        What the user was told: how the file was understood, what was found, chosen and left out, and why.
    seconds : float
        Time from start to end.

    Returns
    -------
    dict
        JSON-serializable but for tuples and numpy scalars.
    """
    packages = ("restormer3d", "torch", "triton", "numpy", "numba", "tifffile")
    return {
        "input": {
            "file": str(stack.path),
            "file_sha256": file_sha256(stack.path),
            "voxels_sha256": check.sha256,
            "shape": stack.shape,
            "dtype": str(stack.dtype),
            "axes": stack.axes,
        },
        "output": {"file": str(target)} | {name: value for name, value in written.items() if name != "path"},
        **record,
        "messages": messages,
        "total_seconds": seconds,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()} | _versions(packages),
    }


def _versions(packages: Sequence[str]) -> dict[str, str]:
    """Versions of those packages that are there."""
    return {name: _version(name) for name in packages if find_spec(name) is not None}


def _version(package: str) -> str:
    """Version of a package; a folder on Python's path has none, and no result may be lost for that."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def network_record(
    chosen: Settings,
    source: TrainingStack,
    history: list[dict[str, Any]],
    *,
    weights: dict[str, Any] | None,
    device: torch.device,
    engine: str,
    precision: Precision,
) -> dict[str, Any]:
    """Say what the network was, where and how it computed, and how its training went.

    `precision` is the one that was used: where there is no TF32, asking for it gives "fp32".
    """
    return {
        "method": "restormer3d",
        "settings": {
            "recipe": chosen.recipe,
            "model": chosen.model.model_dump(),
            "training": chosen.training.model_dump(),
            "inference": chosen.inference.model_dump(),
        },
        "weights": weights,
        "seed": chosen.training.seed,
        "device": str(device),
        "engine": engine,
        "not_engine_cuda": ops.why_not_cuda(device) if device.type == "cuda" and engine != "cuda" else None,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "normalization": asdict(source.normalization),
        "blind_spot": source.blind_spot,
        "iterations": len(history),
        "losses": history[:: max(1, len(history) // _LOSS_POINTS)],
        "held_out": {
            name: history[-1][name] for name in ("held_out", "kept_iteration") if history and name in history[-1]
        },
    }


def weights_record(chosen: Settings) -> dict[str, Any] | None:
    """Name and hash of the weights that training started from; None from scratch."""
    if chosen.weights is None:
        return None
    return file_record(chosen.weights)


def networks_record(chosen: Settings) -> dict[str, dict[str, Any]]:
    """Names and hashes of the weights of the small networks that the settings ask for, by step."""
    steps = {"footprints": FOOTPRINT_WEIGHTS, "courses": COURSE_WEIGHTS, "static_image": IMAGE_WEIGHTS}
    asked = {step: name for step, name in steps.items() if getattr(chosen.inference, step)}
    return {step: file_record(network_file(name, chosen.networks)) for step, name in asked.items()}


def file_record(path: Path) -> dict[str, Any]:
    """Name and hash of a file."""
    return {"file": path.name, "sha256": file_sha256(path)}
