"""Fields that jitter: `python -m benchmarks.movement FILE` shows what it brings to follow them.

Without truth: the even frames are denoised alone, and those around an odd one compared with it: as they are, and moved
to where the odd one shows the field. Nobody foretells jitter, so the first error punishes whoever follows it; the
second asks for what is seen there.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cyclopts import App
from scipy.ndimage import gaussian_filter, shift

from benchmarks.jobs import read_recording, real_job, run_app, without_folders
from benchmarks.tables import publish, recording_name
from restormer3d.config import Method
from restormer3d.denoising import array_and_record
from restormer3d.report import held_out_frame_error
from restormer3d.settings import settings

BEGIN = "<!-- movement table: begin (written by benchmarks.movement --write; edit nothing here by hand) -->"
END = "<!-- movement table: end -->"
_BORDER = 8  # pixels that are not scored: no frame shows all of them
_ROUNDS = 4  # of regression on slopes

app = App(name="python -m benchmarks.movement", help_format="plaintext")


@dataclass(frozen=True)
class _Score:
    label: str
    as_it_is: np.ndarray  # squared error of each odd frame
    moved: np.ndarray


@app.default
def movement(*recordings: str, iterations: int = 0, write: Path | None = None) -> int:
    """Score filters and the default recipe on recordings, without and with movement followed.

    Parameters
    ----------
    recordings
        FILE, FILE:T0:T1 or FILE:T0:T1:Y0:Y1:X0:X1, whose field moves.
    iterations
        Of fine-tuning.
    write
        Markdown file whose table is replaced.
    """
    tables = [_table(real_job({}, text), iterations) for text in recordings]
    command = f"python -m benchmarks.movement {without_folders(sys.argv[1:])}".strip()
    note = (
        f"Computed by `{command}`: the even frames are denoised alone, and the mean of the two around an odd one is "
        "compared with what was recorded, in units of the noise's variance: once as it is, and once with either of the "
        f"two moved to where the odd frame shows the field. {_BORDER} pixels along the border are not scored. "
        "Differences are taken frame by frame, ± their standard error; "
        f"{iterations} iterations of fine-tuning."
    )
    publish(write, BEGIN, END, note, *tables)
    return 0


def _table(job: dict[str, Any], iterations: int) -> str:
    recording = read_recording(job)
    noise = held_out_frame_error(recording, lambda frames: frames[:]).noise_variance
    scores = []
    methods: dict[Method, str] = {
        "gaussian": "Gaussian, widths by held-out frames",
        "svd": "SVD + small Gaussian",
        "restormer3d": "Restormer3D, default",
    }
    for method, name in methods.items():
        for follow in ("none", "smooth", "all"):
            chosen = settings(iterations=iterations, movement=follow)
            denoised = array_and_record(recording[::2], chosen, method=method)[0]
            scores.append(_scored(f"{name}, `--movement {follow}`", recording, denoised))
            means = [error.mean() / noise for error in (scores[-1].as_it_is, scores[-1].moved)]
            print(f"{scores[-1].label}: {means[0]:.4f} {means[1]:.4f}", file=sys.stderr, flush=True)
    last = scores[-1]
    lines = [f"{recording_name(job)}", ""]
    lines += ["| | as it is | above the last row, % | moved | above the last row, % |", "|---|---|---|---|---|"]
    for score in scores:
        cells = []
        for error, least in ((score.as_it_is, last.as_it_is), (score.moved, last.moved)):
            above = 100 * (error - least) / noise
            text = f"{above.mean():+.2f} ± {above.std(ddof=1) / np.sqrt(len(above)):.2f}"
            cells += [f"{error.mean() / noise:.4f}", "–" if score is last else text]
        lines.append(f"| {score.label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _scored(label: str, recording: np.ndarray, denoised: np.ndarray) -> _Score:
    """Errors of the odd frames that have a denoised one (T / 2, H, W) before and after them."""
    inside = slice(_BORDER, -_BORDER), slice(_BORDER, -_BORDER)
    errors: list[list[float]] = []
    for number in range(len(denoised) - 1):
        held_out = recording[2 * number + 1].astype(np.float64)
        around = [frame.astype(np.float64) for frame in denoised[number : number + 2]]
        moved = [_moved_onto(frame, held_out) for frame in around]
        errors.append([np.square(held_out - np.mean(pair, axis=0))[inside].mean() for pair in (around, moved)])
    as_it_is, moved_errors = np.array(errors).T
    return _Score(label, as_it_is, moved_errors)


def _moved_onto(frame: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Move a denoised frame (H, W) to where a noisy one shows the field."""
    by, inside = np.zeros(2), slice(_BORDER, -_BORDER)
    for _ in range(_ROUNDS):
        moved = shift(frame, by, order=3, mode="mirror")
        slopes = [-slope[inside, inside].ravel() for slope in np.gradient(gaussian_filter(moved, 0.7))]
        patterns = np.stack([*slopes, moved[inside, inside].ravel(), np.ones(slopes[0].size)], axis=1)
        by = by + np.linalg.lstsq(patterns, (seen - moved)[inside, inside].ravel(), rcond=None)[0][:2]
        by = np.clip(by, -_BORDER, _BORDER)
    return shift(frame, by, order=3, mode="mirror")


if __name__ == "__main__":
    run_app(app)
