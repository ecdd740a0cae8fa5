"""The quality table: `python -m benchmarks.quality` denoises simulated and recorded stacks by every method.

Each cell (stack, noise level, method, settings) is computed in a process of its own and kept as one JSON file: a run
that was killed goes on where it stopped, and a cell that exists is not computed again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from benchmarks.cells import ROOT, write_json
from benchmarks.jobs import Options, cell_file, real_job, rows, run_app, scene_jobs, without_folders
from benchmarks.methods import METHODS
from benchmarks.pictures import draw_level
from benchmarks.tables import markdown, put_between, row_label

BEGIN = "<!-- quality table: begin (written by benchmarks.quality --write; edit nothing here by hand) -->"
END = "<!-- quality table: end -->"
_QUICK_NOTE = "**A check that the benchmark runs, with a tiny network: the numbers mean nothing.**"
_QUICK_REAL_METHODS = ("raw", "gaussian", "gaussian-oracle", "default")
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
_Many = Parameter(consume_multiple=True, negative="")
_Flag = Parameter(negative="")

app = App(name="python -m benchmarks.quality", help_format="plaintext")


@app.default
def quality(
    *,
    shape: Annotated[tuple[int, int, int], _Flag] = (200, 96, 96),
    scenes: int = 2,
    levels: Annotated[tuple[int, ...], _Many] = (1, 2, 3),
    methods: Annotated[tuple[str, ...], _Many] = (),
    iterations: int | None = None,
    published_iterations: int | None = None,
    time_limit: float | None = None,
    seed: int = 0,
    real: Annotated[tuple[str, ...], _Many] = (),
    weights: str | None = None,
    config: Path | None = None,
    device: str = "auto",
    peer_command: str | None = None,
    folder: Path = Path("runs/quality"),
    write: Path | None = None,
    quick: Annotated[bool, _Flag] = False,
) -> int:
    """Fill the quality table; resumes where it was stopped.

    Parameters
    ----------
    shape
        Frames, rows and columns of the simulated scenes.
    scenes
        How many scenes; scene k has seed 5000 + k. 0 leaves them out.
    levels
        Noise levels: 1, 2, 3.
    methods
        Rows, by their names in benchmarks/methods.py. All by default.
    iterations
        Noise2Void iterations of the default recipe, with weights and from scratch. By default the recipe's.
    published_iterations
        Noise2Void iterations of the published recipe. By default the recipe's.
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
        Another program as a row: a command with {noisy} and {output}, both TIFF files.
    folder
        Where the cells are kept.
    write
        Markdown file whose table is replaced; pictures and the JSON of all cells go beside it.
    quick
        Only check, within a minute, that every row can be computed and the table be written.
    """
    options = Options(iterations, published_iterations, time_limit, seed, weights, config, device, peer_command)
    if quick:
        with tempfile.TemporaryDirectory() as temporary:
            return _quick(Path(temporary))
    chosen = rows(methods, options)
    jobs = [job for row in chosen for job in scene_jobs(row, shape, scenes, levels)]
    with_score = [row for row in chosen if METHODS[row["method"]].oracle != "activity_snr"]  # frames have one score
    jobs += [real_job(row, text) for row in with_score for text in real]
    return fill_table(jobs, folder, write)


def fill_table(jobs: list[dict[str, Any]], folder: Path, write: Path | None, note: str = "") -> int:
    """Compute the cells that are missing and write the table.

    Parameters
    ----------
    jobs : list of dict
        See `benchmarks.jobs`.
    folder : Path
        Holds the cells; `results.json` and `table.md` are written there.
    write : Path, optional
        Markdown file whose table is replaced.
    note : str
        A line above the table.

    Returns
    -------
    int
        0, or 1 if a cell failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    failed = _compute(sorted(jobs, key=lambda job: (job["kind"] == "real", job.get("number", 0))), folder)
    files = [path for path in (cell_file(folder, job) for job in jobs) if path.exists()]
    cells = [json.loads(path.read_text()) for path in files]
    command = f"python -m benchmarks.quality {without_folders(sys.argv[1:])}"
    results = {"command": command, "cells": cells}
    table = "\n\n".join(part for part in (note, markdown(results)) if part)
    write_json(folder / "results.json", results)
    (folder / "table.md").write_text(table + "\n")
    print(table)
    if write is not None:
        _write(write, table, results, files)
    return int(failed > 0)


def _compute(jobs: list[dict[str, Any]], folder: Path) -> int:
    """Compute each missing cell in a process of its own; one that fails does not stop the others."""
    missing = [job for job in jobs if not cell_file(folder, job).exists()]
    print(f"{len(jobs)} cells, {len(jobs) - len(missing)} of them in {folder} already", file=sys.stderr)
    failed = 0
    for done, job in enumerate(missing, start=1):
        target = cell_file(folder, job)
        started = time.monotonic()
        ended = subprocess.run(
            [sys.executable, "-m", "benchmarks.cells", str(target.resolve())],
            input=json.dumps(job),
            text=True,
            cwd=ROOT,
            check=False,
        )
        failed += ended.returncode != 0
        outcome = "FAILED after" if ended.returncode else "in"
        print(f"[{done}/{len(missing)}] {target.stem} {outcome} {time.monotonic() - started:.1f} s", file=sys.stderr)
    return failed


def _write(document: Path, table: str, results: dict[str, Any], files: list[Path]) -> None:
    """Put table, pictures and JSON into the document's folder."""
    pictures = []
    for level in sorted({cell["level"] for cell in results["cells"] if cell["kind"] == "scene"}):
        drawn = {
            row_label([cell], 1): path.with_suffix(".npz")
            for cell, path in zip(results["cells"], files, strict=True)
            if cell["kind"] == "scene" and cell["level"] == level and cell["number"] == 0
        }
        target = document.with_name(f"{document.stem}_level{level}.png")
        draw_level(drawn, target, level)
        pictures.append(f"![All methods on one scene at level {level}]({target.name})")
    write_json(document.with_suffix(".json"), results)
    put_between(document, BEGIN, END, table, *pictures)


def _quick(folder: Path) -> int:
    """Compute every row once at a tiny size and write a copy of the document."""
    from restormer3d.checkpoint import save_weights
    from restormer3d.model import Restormer3D
    from restormer3d.settings import settings

    os.environ.setdefault("RESTORMER3D_ENGINE", "reference")  # compiling the kernels would take half of the minute
    config, weights, document = folder / "tiny.toml", folder / "tiny.safetensors", folder / "quality.md"
    config.write_text(_QUICK_CONFIG)
    save_weights(weights, Restormer3D(settings(weights="none", config_file=config).model))
    document.write_text((ROOT / "docs/quality.md").read_text())
    options = Options(2, 2, weights=str(weights), config=config, peer_command="cp {noisy} {output}")
    recording = ROOT / "src/restormer3d/data/fmi_mouse_gcamp_192x96x96.tif"
    chosen = rows((), options)
    jobs = [job for row in chosen for job in scene_jobs(row, (40, 32, 32), 1, (2,))]
    jobs += [real_job(row, f"{recording}:0:33:30:62:30:62") for row in chosen if row["method"] in _QUICK_REAL_METHODS]
    return fill_table(jobs, folder / "cells", document, _QUICK_NOTE)


if __name__ == "__main__":
    run_app(app)
