"""Planes recorded in turns: `python -m benchmarks.planes FILE` shows what it brings to tell them apart.

Without truth: the frames of every other turn are denoised alone, and the others, interpolated between frames of their
own plane, compared with what was recorded.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from cyclopts import App

from benchmarks.jobs import read_recording, real_job, run_app, without_folders
from benchmarks.tables import publish, recording_name
from restormer3d.artefacts.planes import find_planes, in_turns, one_plane
from restormer3d.config import Method
from restormer3d.denoising import array_and_record
from restormer3d.report import held_out_frame_error
from restormer3d.settings import Settings, settings

BEGIN = "<!-- planes table: begin (written by benchmarks.planes --write; edit nothing here by hand) -->"
END = "<!-- planes table: end -->"

app = App(name="python -m benchmarks.planes", help_format="plaintext")


@app.default
def planes(*recordings: str, iterations: int = 0, write: Path | None = None) -> int:
    """Score filters and the default recipe with the planes of recordings as one stack, and told apart.

    Parameters
    ----------
    recordings
        FILE, FILE:T0:T1 or FILE:T0:T1:Y0:Y1:X0:X1, which show planes in turns.
    iterations
        Of fine-tuning.
    write
        Markdown file whose table is replaced.
    """
    tables = [_table(real_job({}, text), iterations) for text in recordings]
    command = f"python -m benchmarks.planes {without_folders(sys.argv[1:])}".strip()
    note = (
        f"Computed by `{command}`: the frames of every other turn are denoised alone and the others, interpolated "
        "between frames of their own plane, compared with what was recorded; 1 would be a perfect prediction of frames "
        "whose signal does not change. Differences are taken frame by frame, ± their standard error; "
        f"{iterations} iterations of fine-tuning."
    )
    publish(write, BEGIN, END, note, *tables)
    return 0


def _table(job: dict[str, Any], iterations: int) -> str:
    recording = read_recording(job)
    found = find_planes(recording)
    if found is None:
        raise ValueError(f"{job['recording']}: expected a recording of several planes, found one")
    scores = {}
    for label, denoise in _rows(found.count, iterations).items():
        scores[label] = held_out_frame_error(recording, denoise, found.count)
        print(f"{label}: {scores[label].in_noise_variances:.4f}", file=sys.stderr, flush=True)
    *_, ours = scores.values()
    activity = "the same activity" if found.shared else "activity of their own"
    lines = [f"{recording_name(job)}: {found.count} planes in turns, with {activity}", ""]
    lines += ["| | held-out error / noise variance | above the last row, % of the noise variance |", "|---|---|---|"]
    for label, score in scores.items():
        above, error = (100 * value / ours.noise_variance for value in score.minus(ours))
        text = "–" if score is ours else f"{above:+.2f} ± {error:.2f}"
        lines.append(f"| {label} | {score.in_noise_variances:.4f} | {text} |")
    return "\n".join(lines)


def _rows(count: int, iterations: int) -> dict[str, Callable[[Any], Iterable[np.ndarray]]]:
    """What denoises the kept turns, by row; the default recipe last."""
    one, several = (settings(iterations=iterations, planes=number) for number in (1, count))
    rows: dict[str, Callable[[Any], Iterable[np.ndarray]]] = {}
    names: dict[Method, str] = {"gaussian": "Gaussian, widths by held-out frames", "svd": "SVD + small Gaussian"}
    for method, name in names.items():
        rows[f"{name}, of all frames"] = partial(_denoised, chosen=one, method=method)
        rows[f"{name}, of each plane"] = partial(_each_plane, chosen=one, method=method, count=count)
        rows[f"{name} (`--planes {count}`)"] = partial(_denoised, chosen=several, method=method)
    rows["Restormer3D, default, as one stack (`--planes 1`)"] = partial(_denoised, chosen=one)
    rows["Restormer3D, default, each plane as a stack of its own"] = partial(_each_plane, chosen=one, count=count)
    rows[f"**Restormer3D, default** (`--planes {count}`)"] = partial(_denoised, chosen=several)
    return rows


def _denoised(stack: Any, chosen: Settings, method: Method = "restormer3d") -> np.ndarray:
    return array_and_record(stack[:], chosen, method=method)[0]


def _each_plane(stack: Any, chosen: Settings, count: int, method: Method = "restormer3d") -> Iterable[np.ndarray]:
    return in_turns([iter(_denoised(one_plane(stack, number, count), chosen, method)) for number in range(count)])


if __name__ == "__main__":
    run_app(app)
