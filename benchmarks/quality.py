"""The quality table: `python -m benchmarks.quality` denoises simulated and recorded stacks by every method.

Each cell (stack, noise level, method, settings) is computed in a process of its own and kept as one JSON file: a run
that was killed goes on where it stopped, and a cell that exists is not computed again.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from benchmarks.cells import ROOT, write_json
from benchmarks.methods import METHODS
from benchmarks.pictures import draw_levels
from benchmarks.tables import BEGIN, END, machine, markdown

FIRST_SEED = 5000  # scene k has seed 5000 + k: no scene of pretraining or of its validation
_SETTINGS = {
    "published-scratch": {"recipe_name": "published", "weights": "none"},
    "default-scratch": {"recipe_name": "default", "weights": "none"},
    "default-not-fine-tuned": {"recipe_name": "default", "iterations": 0},
    "default": {"recipe_name": "default"},
}
_QUICK_CONFIG = """
[model]
dim = 8
num_blocks = [1, 1, 1, 1]
num_refinement_blocks = 1
heads = [1, 1, 2, 2]
last_level_channels = 8
[training]
patch = [16, 16, 16]
batch_size = 1
warmup_iterations = 0
[inference]
window = [16, 16, 16]
"""
_QUICK_REAL_METHODS = ("raw", "gaussian", "gaussian-oracle", "default")
Many = Parameter(consume_multiple=True, negative="")

app = App(name="python -m benchmarks.quality")


@app.default
def quality(
    *,
    shape: Annotated[tuple[int, int, int], Parameter(negative="")] = (200, 96, 96),
    scenes: int = 2,
    levels: Annotated[tuple[int, ...], Many] = (1, 2, 3),
    methods: Annotated[tuple[str, ...], Many] = (),
    iterations: int | None = None,
    published_iterations: int | None = None,
    time_limit: float | None = None,
    seed: int = 0,
    real: Annotated[tuple[str, ...], Many] = (),
    weights: str | None = None,
    config: Path | None = None,
    device: str = "auto",
    peer_command: str | None = None,
    folder: Path = Path("runs/quality"),
    quick: Annotated[bool, Parameter(negative="")] = False,
    write: Path | None = None,
) -> int:
    """Fill the quality table.

    Parameters
    ----------
    shape
        Frames, rows and columns of the simulated scenes.
    scenes
        How many scenes; scene k has seed 5000 + k. 0 leaves them out.
    levels
        Noise levels: 1, 2, 3.
    methods
        Rows to compute, by their names in benchmarks/methods.py. All by default.
    iterations, published_iterations
        Noise2Void iterations of the default recipe (with and without weights), and of the published one. By default the
        recipes' own.
    time_limit
        Minutes for each network on each stack: the recipes at equal time.
    seed
        Of the networks' patches, masks and initial weights.
    real
        Recordings to score without truth: FILE, FILE:T0:T1 or FILE:T0:T1:Y0:Y1:X0:X1.
    weights
        Pretrained weights of the default recipe, or "none". By default those in the package.
    config
        TOML file with [model], [training], [inference] for all networks, as for `restormer3d denoise`.
    device
        auto, cpu, cuda or mps.
    peer_command
        Another program, as a row: a command with {noisy} and {output}, both TIFF files.
    folder
        Where the cells are kept.
    quick
        A check of a minute that every row can be computed and the table be written; the numbers mean nothing.
    write
        Markdown file whose table is replaced; the pictures and the JSON of all cells go beside it.
    """
    command = "python -m benchmarks.quality " + _without_folders(sys.argv[1:])
    jobs: list[dict[str, Any]] = []
    if quick:
        folder = Path(tempfile.mkdtemp(prefix="quality-"))
        write = _quick_document(folder)
        shape, scenes, levels, iterations, published_iterations = (40, 32, 32), 1, (2,), 2, 2
        config, weights = _quick_network(folder)
        real = (f"{ROOT / 'src/restormer3d/data/fmi_mouse_gcamp_192x96x96.tif'}:0:33:30:62:30:62",)
        peer_command = "cp {noisy} {output}"
    rows = _rows(methods, weights, iterations, published_iterations, seed, config, device, time_limit, peer_command)
    for row in rows:
        jobs += [_scene_job(row, number, level, shape) for level in levels for number in range(scenes)]
        jobs += [_real_job(row, text) for text in real if not quick or row["method"] in _QUICK_REAL_METHODS]
    folder.mkdir(parents=True, exist_ok=True)
    failed = _compute(sorted(jobs, key=_order), folder)
    cells = [json.loads(path.read_text()) for path in (_path(folder, job) for job in jobs) if path.exists()]
    results = {"command": command, "machine": machine(), "cells": cells}
    write_json(folder / "results.json", results)
    table = markdown(results, list(METHODS))
    (folder / "table.md").write_text(table)
    print(table)
    if write is not None:
        _write_document(write, table, results, folder)
    return 1 if failed else 0


def _rows(
    names: tuple[str, ...],
    weights: str | None,
    iterations: int | None,
    published_iterations: int | None,
    seed: int,
    config: Path | None,
    device: str,
    time_limit: float | None,
    peer_command: str | None,
) -> list[dict[str, Any]]:
    """Return method, label, arguments, and all settings that the result depends on, for each row that can run."""
    if unknown := set(names) - set(METHODS):
        raise ValueError(f"unknown method {', '.join(sorted(unknown))}: expected some of {', '.join(METHODS)}")
    rows = []
    for name, method in METHODS.items():
        row: dict[str, Any] = {"method": name, "label": method.label, "arguments": {}, "settings": method.grid or {}}
        if names and name not in names or (method.kind == "peer" and peer_command is None):
            continue
        if method.kind == "peer" and peer_command is not None:
            row["arguments"] = row["settings"] = {"command": peer_command}
            row["label"] = f"peer: `{_without_folders(shlex.split(peer_command))}`"
        if method.kind == "network":
            count = published_iterations if name.startswith("published") else iterations
            arguments = {"weights": weights, "iterations": count, "seed": seed, "config_file": config}
            found = _network(arguments | _SETTINGS[name], device, time_limit)
            if found is None:
                print(f"{method.label}: left out, for there are no pretrained weights", file=sys.stderr)
                continue
            row |= found
        rows.append(row)
    return rows


def _network(arguments: dict[str, Any], device: str, time_limit: float | None) -> dict[str, Any] | None:
    """Resolve the settings of a network; None if it is to start from weights and there are none."""
    from restormer3d.checkpoint import shipped_weights
    from restormer3d.planning import settings
    from restormer3d.sidecar import weights_record

    scratch = _SETTINGS["default-scratch"].items() <= arguments.items() or arguments["recipe_name"] == "published"
    if not scratch and (arguments["weights"] == "none" or not (arguments["weights"] or shipped_weights())):
        return None
    for name in ("weights", "config_file"):
        if arguments[name] not in (None, "none"):
            arguments[name] = str(Path(arguments[name]).resolve())
    chosen = settings(**arguments)
    resolved = {part: getattr(chosen, part).model_dump() for part in ("model", "training", "inference")}
    resolved |= {"weights": weights_record(chosen), "device": device, "time_limit": time_limit}
    return {"arguments": arguments | {"device": device, "time_limit": time_limit}, "settings": resolved}
