"""Scenes of other simulators: `python -m benchmarks.other_simulators` scores the default recipe on them.

`benchmarks.simulators` shares no code with the simulator that makes training data. The best filter is chosen with the
truth, for each score by itself.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
from cyclopts import App, Parameter

from benchmarks.cells import truth_score
from benchmarks.jobs import without_folders
from benchmarks.methods import METHODS
from benchmarks.simulators import SIMULATORS, Movie, recorded
from benchmarks.tables import publish
from restormer3d.denoising import array_and_record
from restormer3d.metrics import evaluate_stacks
from restormer3d.settings import settings
from restormer3d.stacks import open_stack, write_stack

BEGIN = "<!-- simulators table: begin (written by benchmarks.other_simulators --write; edit nothing here by hand) -->"
END = "<!-- simulators table: end -->"
PHOTONS = {1: 20.0, 2: 4.0, 3: 1.0}
"""Of a voxel in the mean, by noise level."""
FILTERS = (
    "gaussian-oracle",
    "gaussian-activity-oracle",
    "mean-gaussian-oracle",
    "svd-gaussian-oracle",
    "svd-gaussian-activity-oracle",
)

app = App(name="python -m benchmarks.other_simulators", help_format="plaintext")
_Many = Parameter(consume_multiple=True, negative="")


@app.default
def other_simulators(
    *,
    shape: Annotated[tuple[int, int, int], Parameter(negative="")] = (300, 128, 128),
    only: Annotated[tuple[str, ...], _Many] = tuple(SIMULATORS),
    levels: Annotated[tuple[int, ...], _Many] = (1, 2, 3),
    seed: int = 1,
    iterations: int = 0,
    write: Path | None = None,
) -> int:
    """Denoise a scene of each simulator at each noise level by filters and by the default recipe.

    Parameters
    ----------
    shape
        Frames, rows and columns of the scenes.
    only
        Simulators, by name.
    levels
        1, 2, 3: 20, 4 and 1 photons a voxel in the mean.
    seed
        Of the scenes and of their noise.
    iterations
        Of fine-tuning.
    write
        Markdown file whose table is replaced.
    """
    lines = [
        "| simulator | level | best filter | restormer3d | difference | amplitudes, best filter | restormer3d |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in only:
        movie = SIMULATORS[name](seed, shape)
        for level in levels:
            noisy, clean = recorded(movie.clean, PHOTONS[level], seed)
            by_filters = [_filtered(method, noisy, clean, movie) for method in FILTERS]
            denoised, _ = array_and_record(noisy, settings(iterations=iterations))
            ours = _scores(clean, denoised, movie)
            lines.append(_line(name, level, by_filters, ours))
            print(lines[-1], file=sys.stderr, flush=True)
    command = f"python -m benchmarks.other_simulators {without_folders(sys.argv[1:])}".strip()
    filters = ", ".join(dict.fromkeys(METHODS[method].label for method in FILTERS))
    origin = (
        f"Computed by `{command}`: stSNR / activity SNR in dB of a scene of {' x '.join(map(str, shape))} of each "
        f"simulator with seed {seed}, after {iterations} iterations of fine-tuning, and the median bias of events' "
        f"amplitudes. The best filter is the best of {filters}, all with widths chosen with the truth, for each score "
        "by itself; its amplitudes are those of the one with the best activity SNR."
    )
    publish(write, BEGIN, END, origin, "\n".join(lines))
    return 0


def _filtered(name: str, noisy: np.ndarray, clean: np.ndarray, movie: Movie) -> dict[str, float]:
    """Score a filter whose widths are chosen with the truth."""
    method = METHODS[name]
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "noisy.tif", Path(folder) / "filtered.tif"
        write_stack(source, [noisy], shape=noisy.shape, dtype=noisy.dtype)
        method.run(source, output, {}, truth_score(clean, method.oracle))
        with open_stack(output) as filtered:
            return _scores(clean, filtered[:], movie)


def _scores(clean: np.ndarray, denoised: np.ndarray, movie: Movie) -> dict[str, float]:
    return evaluate_stacks(clean, denoised, masks=movie.masks, frame_rate_hz=movie.frame_rate_hz)


def _line(name: str, level: int, by_filters: list[dict[str, float]], ours: dict[str, float]) -> str:
    """One row of the table."""
    scores = ("stsnr", "activity_snr")
    best = [max(found[score] for found in by_filters) for score in scores]
    own = [ours[score] for score in scores]
    strongest = max(by_filters, key=lambda found: found["activity_snr"])
    difference = " / ".join(f"{b - a:+.2f}" for a, b in zip(best, own, strict=True))
    both = [f"{pair[0]:.2f} / {pair[1]:.2f}" for pair in (best, own)]
    amplitudes = [f"{100 * found['event_amplitude_bias']:+.1f}%" for found in (strongest, ours)]
    return f"| {name} | {level} | {both[0]} | {both[1]} | {difference} | {amplitudes[0]} | {amplitudes[1]} |"


if __name__ == "__main__":
    sys.exit(app())
