"""Write a simulated recording for other programs: noisy and clean TIFF, masks, traces and parameters."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from restormer3d.simulation.detector import INT16, NoisyScene
from restormer3d.simulation.scene import Scene

FRAMES_AT_ONCE = 16


def write_scene(
    directory: str | Path, index: int, noisy: NoisyScene, *, label: str = "", overwrite: bool = False
) -> dict[str, Path]:
    """Write one recording with its truth, frame by frame.

    Parameters
    ----------
    directory : path
        Is created if it does not exist.
    index : int
        Number k in the file names.
    noisy : NoisyScene
        The recording; its clean scene is `noisy.scene`.
    label : str
        Put into the name of the noisy stack, `level2` for example; default: the gain.
    overwrite : bool
        Replace files that exist.

    Returns
    -------
    dict of str to Path
        `noisy`: scene<k>_noisy_<label>.tif, int16; `clean`: scene<k>_clean.tif, int16; `masks`: scene<k>_masks.tif,
        uint16, 0 outside and n in ROI n; `traces`: scene<k>_traces.csv, one row a frame, one column an ROI, in ADU;
        `parameters`: scene<k>_parameters.json.

    Raises
    ------
    FileExistsError
        If a file exists and `overwrite` is False; nothing is written then.
    """
    from restormer3d.stacks import write_stack

    label = label or f"gain{noisy.gain:g}"
    endings = {
        "noisy": f"noisy_{label}.tif",
        "clean": "clean.tif",
        "masks": "masks.tif",
        "traces": "traces.csv",
        "parameters": "parameters.json",
    }
    paths = {key: Path(directory) / f"scene{index}_{ending}" for key, ending in endings.items()}
    for path in paths.values():
        if path.exists() and not overwrite:
            raise FileExistsError(f"{path} exists; choose another directory or allow overwriting")
    Path(directory).mkdir(parents=True, exist_ok=True)
    scene = noisy.scene
    write_stack(paths["clean"], blocks_of(scene), shape=scene.shape, dtype=INT16, overwrite=overwrite)
    write_stack(paths["noisy"], blocks_of(noisy), shape=noisy.shape, dtype=INT16, overwrite=overwrite)
    mask_shape = (1, *scene.masks.shape)
    write_stack(paths["masks"], [scene.masks], shape=mask_shape, dtype=scene.masks.dtype, overwrite=overwrite)
    write_traces(paths["traces"], scene)
    paths["parameters"].write_text(json.dumps(describe(noisy), indent=2) + "\n", encoding="utf-8")
    return paths


def blocks_of(stack: Scene | NoisyScene) -> Iterator[np.ndarray]:
    """Yield the frames in blocks (n, H, W), rendered when they are asked for."""
    for start in range(0, stack.shape[0], FRAMES_AT_ONCE):
        yield stack[start : start + FRAMES_AT_ONCE]


def write_traces(path: Path, scene: Scene) -> None:
    """Write a table with the columns time_s, roi1, roi2, ...: each cell's own fluorescence in ADU."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["time_s", *(f"roi{number + 1}" for number in range(len(scene.traces)))])
        for frame, values in enumerate(scene.traces.T):
            writer.writerow([f"{frame / scene.parameters.frame_rate_hz:.4f}", *(f"{value:.2f}" for value in values)])


def describe(noisy: NoisyScene) -> dict[str, object]:
    """Return everything that is needed to simulate the recording again."""
    detector = {
        "gain_adu_per_photon": noisy.gain,
        "read_noise_variance_adu2": noisy.read_noise_variance,
        "correlation_xy": noisy.correlation,
        "line_noise_adu": noisy.line_noise,
        "outlier_fraction": noisy.outlier_fraction,
        "seed": noisy.seed,
    }
    scene = noisy.scene
    return {
        "shape": scene.shape,
        "seed": scene.seed,
        "rois": len(scene.traces),
        "scene": asdict(scene.parameters),
        "detector": detector,
    }
