"""The JSON sidecar beside every result: what came in, what was done, with which settings, weights and versions."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from restormer3d.checkpoint import file_sha256
from restormer3d.planning import Settings
from restormer3d.stacks import StackCheck, TiffStack


def sidecar(
    stack: TiffStack, check: StackCheck, target: Path, written: dict[str, Any], record: dict[str, Any], seconds: float
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
    seconds : float
        Time from start to end.

    Returns
    -------
    dict
        JSON-serializable but for tuples and numpy scalars.
    """
    packages = ("restormer3d", "torch", "numpy", "numba", "tifffile")
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
        "total_seconds": seconds,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
    }


def weights_record(chosen: Settings) -> dict[str, Any] | None:
    """Name and hash of the weights that training started from; None from scratch."""
    if chosen.weights is None:
        return None
    return {"file": chosen.weights.name, "sha256": file_sha256(chosen.weights)}
