"""Stacks of which memory holds a part: `python -m benchmarks.large_stacks` takes small ones apart in two ways.

Some frames of the whole field are looked at together, or all frames of a tile of it; and, beside these, all voxels.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from benchmarks.jobs import without_folders
from benchmarks.tables import level_head, publish
from restormer3d.activity.tiles import part_shape, tile_places
from restormer3d.denoising import array_and_record
from restormer3d.metrics import evaluate_stacks
from restormer3d.settings import settings
from restormer3d.simulation import NoisyScene, noise_parameters, simulate_scene

BEGIN = "<!-- large stacks table: begin (written by benchmarks.large_stacks --write; edit nothing here by hand) -->"
END = "<!-- large stacks table: end -->"
_SEED = 9_500_000
SHAPES = ((1500, 96, 96), (120, 256, 256))
"""A long recording of a small field, and a short one of a large field."""
_FRAMES = (256, 16)  # of the whole field together: of 512 x 512 and 2048 x 2048 pixels, 67 million voxels are as many
_TILES = (64, 93)  # pixels a side of a square of as many voxels as may be looked at together; tiles come out evened

app = App(name="python -m benchmarks.large_stacks", help_format="plaintext")


@app.default
def large_stacks(
    *,
    levels: Annotated[tuple[int, ...], Parameter(consume_multiple=True, negative="")] = (1, 3),
    write: Path | None = None,
) -> int:
    """Denoise a long and a wide scene by the default recipe, not fine-tuned, in parts and as a whole.

    Parameters
    ----------
    levels
        Noise levels: 1, 2, 3.
    write
        Markdown file whose table is replaced.
    """
    lines = level_head("looked at together", levels)
    for shape, frames, side in zip(SHAPES, _FRAMES, _TILES, strict=True):
        scene = simulate_scene(shape, seed=_SEED)
        clean = scene[:]
        noisy = {level: NoisyScene(scene, *noise_parameters(level), seed=_SEED + level)[:] for level in levels}
        for part in (
            {"chunk_voxels": shape[0] * shape[1] * shape[2]},
            {"chunk_voxels": shape[0] * side**2},
            {"chunk_voxels": frames * shape[1] * shape[2], "tiles": False},
        ):
            chosen = settings(iterations=0)
            chosen = replace(chosen, inference=chosen.inference.model_copy(update=part))
            seen = part_shape(shape, chosen.inference)
            count = len(tile_places(shape, seen))
            cells = []
            for level in levels:
                started = time.monotonic()
                found = evaluate_stacks(clean, array_and_record(noisy[level], chosen)[0])
                seconds = time.monotonic() - started
                cells.append(f"{found['stsnr']:.2f} / {found['activity_snr']:.2f} ({seconds:.0f} s)")
            label = f"{' x '.join(map(str, seen))} of {' x '.join(map(str, shape))}"
            if seen == shape:
                label = f"**all of {' x '.join(map(str, shape))}**"
            elif count > 1:
                label += f", {count} tiles"
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
            print(lines[-1], file=sys.stderr, flush=True)
    command = f"python -m benchmarks.large_stacks {without_folders(sys.argv[1:])}".strip()
    origin = (
        f"Computed by `{command}`: stSNR / activity SNR in dB, and seconds of one run, of scenes with seed {_SEED}, "
        "not fine-tuned."
    )
    publish(write, BEGIN, END, origin, "\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(app())
