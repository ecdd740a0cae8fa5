"""One picture for each noise level: a frame and three pixels' traces of scene 0, a row for each method."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np

_TRACE_RANGE = 0.4  # how far the axis of a trace reaches beyond the clean trace, as a share of its range


def draw_level(cells: dict[str, Path], target: Path, level: int) -> None:
    """Draw the clean scene and what each method made of it.

    Parameters
    ----------
    cells : dict of str to Path
        Label of each row and the .npz file that its cell left.
    target : Path
        PNG to write.
    level : int
        Noise level, for the title.
    """
    from matplotlib.figure import Figure
    from PIL import Image

    pictures: dict[str, Any] = {label: np.load(path) for label, path in cells.items() if path.exists()}
    if not pictures:
        print(f"{target.name}: not drawn, for no cell of level {level} left a picture", file=sys.stderr)
        return
    first = list(pictures.values())[-1]
    rows = {"clean": (first["clean_frame"], first["clean_traces"])}
    for label, picture in pictures.items():
        if np.array_equal(picture["pixels"], first["pixels"]):
            rows[label] = picture["frame"], picture["traces"]
        else:
            print(f"{target.name}: {label} is left out: {cells[label].name} holds other pixels", file=sys.stderr)
    limits = np.percentile(first["clean_frame"], (0.5, 99.7))
    figure = Figure(figsize=(13, 1.25 * len(rows) + 0.5), dpi=75, layout="constrained")
    axes = figure.subplots(len(rows), 4, width_ratios=(1, 2.6, 2.6, 2.6), squeeze=False)
    for (label, (frame, traces)), line in zip(rows.items(), axes, strict=True):
        line[0].imshow(frame, cmap="gray", vmin=limits[0], vmax=limits[1])
        line[0].set(xticks=[], yticks=[])
        line[1].set_title(label.replace("**", "").replace("`", ""), fontsize=9, loc="left")
        for axis, trace, clean in zip(line[1:], traces, first["clean_traces"], strict=True):
            _draw_trace(axis, trace, clean)
    for axis, (y, x) in zip(axes[0, 1:], first["pixels"], strict=True):
        axis.set_title(f"pixel x = {x}, y = {y}", fontsize=9, loc="right")
        axes[0, 0].plot(x, y, "o", markersize=6, markerfacecolor="none", markeredgecolor="tab:orange")
    axes[0, 0].set_title(f"frame {int(first['number'])}", fontsize=9)
    for axis in axes[-1, 1:]:
        axis.tick_params(labelbottom=True)
        axis.set_xlabel("frame", fontsize=8)
    figure.suptitle(f"Level {level}: the clean scene in black, each method in orange (ADU)", fontsize=10)
    drawn = io.BytesIO()
    figure.savefig(drawn)
    Image.open(drawn).convert("RGB").quantize(64).save(target, optimize=True)


def _draw_trace(axis: Any, trace: np.ndarray, clean: np.ndarray) -> None:
    margin = _TRACE_RANGE * float(np.ptp(clean))
    axis.plot(trace, color="tab:orange", linewidth=1)
    axis.plot(clean, color="black", linewidth=0.8)
    axis.set_ylim(float(clean.min()) - margin, float(clean.max()) + margin)
    axis.margins(x=0)
    axis.tick_params(labelsize=7, labelbottom=False)
