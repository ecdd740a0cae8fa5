"""What the quality table has to compute: its rows, and one job for every stack and row.

A job carries all settings that its result depends on; their hash is part of the name of its cell, so that a changed
setting is a new cell and an unchanged one is never computed twice.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cyclopts import App

from benchmarks.methods import METHODS
from restormer3d.stacks import open_stack

FIRST_SEED = 5000  # scene k has seed 5000 + k: no scene of pretraining or of its validation
_CROPPED = re.compile(r"(?P<path>.+?)(?P<crop>(:\d+){2}|(:\d+){6})?")


@dataclass(frozen=True)
class Options:
    """What the command line says about the networks and the peer."""

    iterations: int | None = None
    published_iterations: int | None = None
    time_limit: float | None = None
    seed: int = 0
    weights: str | None = None
    config: Path | None = None
    device: str = "auto"
    peer_command: str | None = None


def rows(names: tuple[str, ...], options: Options) -> list[dict[str, Any]]:
    """Return method, label, arguments and settings of each row that can be computed; all rows if none is named.

    Raises
    ------
    ValueError
        If a name is unknown or a setting is out of range.
    """
    if unknown := set(names) - set(METHODS):
        raise ValueError(f"unknown method {', '.join(sorted(unknown))}: expected some of {', '.join(METHODS)}")
    found = []
    for name, method in METHODS.items():
        row = {"method": name, "label": method.label, "arguments": {}, "settings": method.grid or {}}
        if names and name not in names:
            continue
        if method.kind == "network":
            row |= _network(name, options)
        if method.kind == "peer":
            row |= _peer(options)
        if row["arguments"] is None:
            print(f"{name}: left out, {row['settings']}", file=sys.stderr)
        else:
            found.append(row)
    return found


def scene_jobs(
    row: dict[str, Any], shape: tuple[int, int, int], scenes: int, levels: tuple[int, ...]
) -> Iterator[dict]:
    """Yield the jobs of a row on simulated scenes."""
    for number in range(scenes):
        for level in levels:
            job = {"kind": "scene", "number": number, "level": level, "shape": list(shape), "seed": FIRST_SEED + number}
            yield row | job


def real_job(row: dict[str, Any], text: str) -> dict[str, Any]:
    """Return the job of a row on a recording, given as FILE, FILE:T0:T1 or FILE:T0:T1:Y0:Y1:X0:X1.

    Raises
    ------
    ValueError
        If there is no such file.
    """
    from restormer3d.checkpoint import file_sha256

    match = _CROPPED.fullmatch(text)
    path = Path(match["path"]) if match else Path(text)
    if not match or not path.is_file():
        raise ValueError(f"--real {text}: expected a TIFF file, alone or with :T0:T1 or :T0:T1:Y0:Y1:X0:X1")
    crop = [int(part) for part in (match["crop"] or "").split(":")[1:]]
    spans = [slice(*crop[axis : axis + 2]) for axis in range(0, len(crop), 2)]
    job = {"kind": "real", "recording": path.name, "crop": [[span.start, span.stop] for span in spans]}
    job["sha256"] = file_sha256(path)  # two labs may have files of one name
    return row | job | {"path": str(path.resolve())}


def read_recording(job: dict[str, Any]) -> np.ndarray:
    """Read what a job of :func:`real_job` looks at, (T, H, W)."""
    with open_stack(job["path"]) as stack:
        return stack[tuple(slice(*span) for span in job["crop"]) or slice(None)]


def cell_file(folder: Path, job: dict[str, Any]) -> Path:
    """Where the result of a job is kept."""
    result_depends_on = {name: value for name, value in job.items() if name not in ("arguments", "label", "path")}
    digest = hashlib.sha256(json.dumps(result_depends_on, sort_keys=True).encode()).hexdigest()[:10]
    stack = f"scene{job['number']}_level{job['level']}" if job["kind"] == "scene" else Path(job["recording"]).stem
    return folder / f"{stack}_{job['method']}_{digest}.json"


def without_folders(words: list[str]) -> str:
    """Write a command as one line, of paths elsewhere their last part alone: the table names nobody's folders."""
    return shlex.join(word.rpartition("/")[2] if word.startswith(("/", "..", "~")) else word for word in words)


def run_app(app: App) -> None:
    """Run a command line and exit: with what it returns, or 2 for bad arguments."""
    try:
        sys.exit(app())
    except ValueError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def _network(name: str, options: Options) -> dict[str, Any]:
    """Arguments for `settings.settings` with device and time limit, and the settings that come out of them."""
    from restormer3d.checkpoint import shipped_weights
    from restormer3d.settings import settings
    from restormer3d.sidecar import networks_record, weights_record

    differs = METHODS[name].differs
    weights = str(options.weights or shipped_weights() or "none")
    if weights == "none" and "weights" not in differs:
        return {"arguments": None, "settings": "for there are no pretrained weights"}
    published = differs.get("recipe_name") == "published"
    arguments = {
        "recipe_name": "default",
        "weights": weights if weights == "none" else str(Path(weights).resolve()),
        "iterations": options.published_iterations if published else options.iterations,
        "seed": options.seed,
        "blind_spot": None,
        "config_file": None if options.config is None else str(options.config.resolve()),
    } | differs
    chosen = settings(**arguments)
    resolved = {part: getattr(chosen, part).model_dump(mode="json") for part in ("model", "training", "inference")}
    resolved |= {"weights": weights_record(chosen)} | networks_record(chosen)
    where = {"device": options.device, "time_limit": options.time_limit}
    return {"arguments": arguments | where, "settings": resolved | where}


def _peer(options: Options) -> dict[str, Any]:
    if options.peer_command is None:
        return {"arguments": None, "settings": "for there is no --peer-command"}
    shown = without_folders(shlex.split(options.peer_command))
    return {
        "label": f"peer: `{shown}`",
        "arguments": {"command": options.peer_command},
        "settings": {"command": shown, "sha256": hashlib.sha256(options.peer_command.encode()).hexdigest()},
    }
