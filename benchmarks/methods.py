"""The rows of the quality table: every method reads a noisy TIFF file and writes a denoised one, as a user's would.

Filters come from `restormer3d.baselines`; an oracle tries a grid and keeps what scores best against the truth, which
nobody has. Networks go through `denoise_files`, time limit and all.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from restormer3d.artefacts.planes import WithoutPlanes, differences_of, find_planes, plane_images, put_back
from restormer3d.artefacts.set_aside import set_aside
from restormer3d.baselines import (
    SIGMAS_T,
    SIGMAS_XY,
    choose_gaussian,
    decomposed,
    gaussian_frames,
    put_together,
    svd_frames,
    temporal_mean_frames,
)
from restormer3d.config import recipe
from restormer3d.stacks import open_stack, write_stack

GAUSSIAN_GRID = {  # with all that the choice by held-out frames has
    "sigma_t": tuple(sorted({*SIGMAS_T, 5.0, 8.0, 12.0, 45.0})),
    "sigma_xy": tuple(sorted({*SIGMAS_XY, 1.3, 1.8, 2.5, 3.5, 5.0, 7.0})),
}
SVD_GRID = {"sigma_t": (0, 0.5, 1, 2, 4, 8, 16), "sigma_xy": (0, 0.5, 0.8, 1.2, 1.8, 2.5, 3.5, 5)}
_RECORDED = ("settings", "weights", "device", "engine", "threads", "blind_spot", "seconds", "iterations", "held_out")

Score = Callable[[Iterable[np.ndarray]], float]
"""How good denoised frames are, for an oracle: higher is better."""

Run = Callable[[Path, Path, dict[str, Any], Score], dict[str, Any]]
"""(noisy file, file to write, arguments of the job, score) -> what was done."""


@dataclass(frozen=True)
class Method:
    """A row: its name in the table, how it runs, and the score that an oracle chooses by."""

    label: str
    run: Run
    kind: Literal["filter", "network", "peer"] = "filter"
    oracle: str = ""
    grid: dict[str, tuple[float, ...]] | None = None
    differs: dict[str, Any] = field(default_factory=dict)  # arguments of `settings.settings`, for a network


def raw(noisy: Path, output: Path, _: dict[str, Any], __: Score) -> dict[str, Any]:
    shutil.copyfile(noisy, output)
    return {}


def temporal_mean(noisy: Path, output: Path, _: dict[str, Any], __: Score) -> dict[str, Any]:
    return _filter(noisy, output, temporal_mean_frames)


def gaussian(noisy: Path, output: Path, _: dict[str, Any], __: Score) -> dict[str, Any]:
    """Filter with the widths that predict held-out frames best: what `--method gaussian` does."""
    widths: dict[str, float] = {}

    def filtered(stack: Any) -> Iterator[np.ndarray]:
        widths["sigma_t"], widths["sigma_xy"] = choose_gaussian(stack, around_mean=True)
        return gaussian_frames(stack, **widths, around_mean=True)

    _filter(noisy, output, filtered)
    return widths


def gaussian_oracle(
    noisy: Path, output: Path, _: dict[str, Any], score: Score, *, around_mean: bool = False
) -> dict[str, Any]:
    """Filter with the grid point of the best score."""
    scores = {}
    with _ways_to_see(noisy) as ways:
        for way, (stack, as_recorded) in enumerate(ways):
            for sigma_xy in GAUSSIAN_GRID["sigma_xy"]:
                blurred = np.stack(list(gaussian_frames(stack, 0, sigma_xy, around_mean=around_mean)))
                for sigma_t in GAUSSIAN_GRID["sigma_t"]:
                    scores[sigma_t, sigma_xy, way] = score(as_recorded(gaussian_frames(blurred, sigma_t, 0)))
    return _filter_best(
        noisy, output, scores, lambda t, xy: partial(gaussian_frames, sigma_t=t, sigma_xy=xy, around_mean=around_mean)
    )


def svd(noisy: Path, output: Path, _: dict[str, Any], __: Score) -> dict[str, Any]:
    """Decompose without smoothing: singular values are shrunk."""
    return _filter(noisy, output, partial(svd_frames, sigma_t=0, sigma_xy=0))


def svd_gaussian(noisy: Path, output: Path, _: dict[str, Any], __: Score) -> dict[str, Any]:
    """Decompose and smooth a little: what `--method svd` does."""
    return _filter(noisy, output, svd_frames)


def svd_gaussian_oracle(noisy: Path, output: Path, _: dict[str, Any], score: Score) -> dict[str, Any]:
    """Decompose, and smooth by the grid point of the best score; without a width, shrink."""
    scores = {}
    with _ways_to_see(noisy) as ways:
        for way, (stack, as_recorded) in enumerate(ways):
            frames = stack[:]
            parts = {shrink: decomposed(frames, shrink=shrink) for shrink in (False, True)}
            for sigma_t in SVD_GRID["sigma_t"]:
                for sigma_xy in SVD_GRID["sigma_xy"]:
                    denoised = put_together(parts[not (sigma_t or sigma_xy)], sigma_t, sigma_xy)
                    scores[sigma_t, sigma_xy, way] = score(as_recorded(iter(denoised)))
    return _filter_best(noisy, output, scores, lambda t, xy: partial(svd_frames, sigma_t=t, sigma_xy=xy))


def network(noisy: Path, output: Path, arguments: dict[str, Any], _: Score) -> dict[str, Any]:
    """Denoise by `denoise_files`; `arguments` are those of `settings.settings`, the device and the time limit."""
    from restormer3d.settings import settings
    from restormer3d.workflow import denoise_files

    arguments = dict(arguments)
    device, time_limit = arguments.pop("device"), arguments.pop("time_limit")
    failures = denoise_files(
        [noisy],
        output,
        settings(**arguments),
        device=device,
        time_limit=time_limit,
        say=lambda line: print(f"    {line}", file=sys.stderr, flush=True),
    )
    for error in failures.values():
        raise error
    record = json.loads(output.with_name(output.name + ".json").read_text())
    if record["method"] != "restormer3d":
        raise RuntimeError(f"the time limit of {time_limit:g} min leaves no time for a network: give more")
    return {name: record[name] for name in _RECORDED}


def peer(noisy: Path, output: Path, arguments: dict[str, Any], _: Score) -> dict[str, Any]:
    """Denoise by another program: a command with {noisy} and {output}."""
    command = [part.format(noisy=noisy, output=output) for part in shlex.split(arguments["command"])]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return {}


METHODS = {
    "raw": Method("raw", raw),
    "temporal-mean": Method("temporal mean", temporal_mean),
    "gaussian": Method("Gaussian, widths by held-out frames (`--method gaussian`)", gaussian),
    "gaussian-oracle": Method("Gaussian", gaussian_oracle, oracle="stsnr", grid=GAUSSIAN_GRID),
    "gaussian-activity-oracle": Method("Gaussian", gaussian_oracle, oracle="activity_snr", grid=GAUSSIAN_GRID),
    "mean-gaussian-oracle": Method(
        "temporal mean + Gaussian of the rest",
        partial(gaussian_oracle, around_mean=True),
        oracle="stsnr",
        grid=GAUSSIAN_GRID,
    ),
    "svd": Method("SVD, shrunk, not smoothed", svd),
    "svd-gaussian": Method("SVD + small Gaussian (`--method svd`)", svd_gaussian),
    "svd-gaussian-oracle": Method("SVD + Gaussian", svd_gaussian_oracle, oracle="stsnr", grid=SVD_GRID),
    "svd-gaussian-activity-oracle": Method("SVD + Gaussian", svd_gaussian_oracle, oracle="activity_snr", grid=SVD_GRID),
    "peer": Method("peer", peer, "peer"),
    "published-scratch": Method(
        "Restormer3D, published recipe, from scratch",
        network,
        "network",
        differs={"recipe_name": "published", "weights": "none"},
    ),
    "published": Method(
        "Restormer3D, published recipe, from the shipped weights",
        network,
        "network",
        differs={"recipe_name": "published"},
    ),
    "default-scratch": Method(
        "Restormer3D, default recipe, from scratch", network, "network", differs={"weights": "none"}
    ),
    "default-point-not-fine-tuned": Method(
        "Restormer3D, default, weights as they are, neighbors' noise taken for independent (`--blind-spot point`)",
        network,
        "network",
        differs={"blind_spot": "point", "iterations": 0},
    ),
    "default-not-fine-tuned": Method(
        "Restormer3D, default, pretrained weights as they are", network, "network", differs={"iterations": 0}
    ),
    "default-point": Method(
        "Restormer3D, default, fine-tuned, neighbors' noise taken for independent (`--blind-spot point`)",
        network,
        "network",
        differs={"blind_spot": "point"},
    ),
    "default": Method("**Restormer3D, default**, pretrained and fine-tuned", network, "network"),
}
"""In the order of the table."""


def _filter(
    noisy: Path, output: Path, frames_of: Callable[[Any], Iterator[np.ndarray]], way: int = 0
) -> dict[str, Any]:
    with open_stack(noisy) as recorded, _ways_to_see(noisy) as ways:
        stack, as_recorded = ways[way]
        write_stack(output, as_recorded(frames_of(stack)), shape=recorded.shape, dtype=recorded.dtype)
    return {}


@contextmanager
def _ways_to_see(noisy: Path) -> Iterator[list[tuple[Any, Callable[[Iterator[np.ndarray]], Iterator[np.ndarray]]]]]:
    """Give a stack as the command gives it to filters and networks alike, and what puts the rest back.

    Nothing is set aside of a simulated recording. Of planes of the same activity there is a second way, which averages
    more: not kept apart. Planes of different activity, which the command denoises one by one, stay together here.
    """
    *_, parts = recipe("default", pretrained=True)
    with open_stack(noisy) as recorded:
        aside = set_aside(recorded, parts)
        ways = [(aside.stack, aside.put_back)]
        planes = find_planes(aside.stack, parts.planes)
        if planes is not None and planes.shared:
            apart = differences_of(plane_images(aside.stack, planes.count))
            ways.insert(0, (WithoutPlanes(aside.stack, apart), lambda frames: aside.put_back(put_back(frames, apart))))
        yield ways


def _filter_best(
    noisy: Path,
    output: Path,
    scores: dict[tuple[float, float, int], float],
    filter_of: Callable[[float, float], Callable[[Any], Iterator[np.ndarray]]],
) -> dict[str, Any]:
    sigma_t, sigma_xy, way = max(scores, key=lambda point: scores[point])
    _filter(noisy, output, filter_of(sigma_t, sigma_xy), way)
    return {"sigma_t": sigma_t, "sigma_xy": sigma_xy, "planes_apart": way == 0}
