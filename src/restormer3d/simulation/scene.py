"""The clean recording as a lazy stack: `Scene` renders the frames that are asked for.

A scene is kept as factors (a static image, neuropil modes with their courses, small footprints with their traces),
a few megabytes for any number of frames, and is computed block by block: nothing of size (T, H, W) is ever held.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from restormer3d.simulation.parameters import SceneParameters
from restormer3d.simulation.structures import Footprint


@dataclass(frozen=True, eq=False)
class Scene:
    """A simulated clean recording: a lazy stack (T, H, W) of float32 in ADU that is rendered where it is sliced.

    Attributes
    ----------
    shape : tuple of int
        Frames, height, width.
    masks : ndarray, shape (H, W), uint16
        Outlines of the cell bodies at their mean position: 0 outside, n for ROI n.
    traces : ndarray, shape (n_rois, T), float32
        Each ROI's own fluorescence in ADU, averaged over its mask, without neuropil and neighbors.
    parameters : SceneParameters
        What the scene was drawn from.
    seed : int
        With the parameters and the shape it gives the same scene again.
    """

    shape: tuple[int, int, int]
    seed: int
    parameters: SceneParameters
    masks: np.ndarray
    traces: np.ndarray
    static: np.ndarray  # (H + 2 margin, W + 2 margin): the canvas
    modes: np.ndarray  # (K, canvas height, canvas width)
    courses: np.ndarray  # (K, T)
    footprints: list[Footprint]
    source_traces: np.ndarray  # (sources, T)
    shifts: np.ndarray | None  # (T, 2), pixels
    margin: int
    brightness: np.ndarray  # (T,), photobleaching
    dtype = np.dtype(np.float32)
    ndim = 3

    def __len__(self) -> int:
        """Return the number of frames."""
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        """Render `scene[t]`, `scene[a:b]` or `scene[a:b, y0:y1, x0:x1]`."""
        ranges, squeeze = parse_index(index, self.shape)
        times, rows, columns = ranges
        block = self._render(times, rows, columns)
        return block[0] if squeeze else block

    def _render(self, times: range, rows: range, columns: range) -> np.ndarray:
        if self.shifts is None:
            return self._render_canvas(times, rows.start, rows.stop, columns.start, columns.stop)
        wide = self._render_canvas(
            times, rows.start, rows.stop + 2 * self.margin, columns.start, columns.stop + 2 * self.margin
        )
        return np.stack(
            [
                shift_frame(frame, shift, self.margin, len(rows), len(columns))
                for frame, shift in zip(wide, self.shifts[times.start : times.stop], strict=True)
            ]
        )

    def _render_canvas(self, times: range, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """Frames of the region [top:bottom, left:right] of the canvas, (len(times), height, width)."""
        block = np.repeat(self.static[None, top:bottom, left:right], len(times), axis=0)
        # Element by element, not as a matrix product: its rounding would depend on the size of the block.
        for course, mode in zip(self.courses, self.modes, strict=True):
            block += course[times.start : times.stop, None, None] * mode[top:bottom, left:right]
        for footprint in self.footprints:
            y, x = footprint.top - top, footprint.left - left
            rows, columns = footprint.weights.shape
            y_end, x_end = y + rows, x + columns
            if y_end <= 0 or x_end <= 0 or y >= bottom - top or x >= right - left:
                continue
            weights: np.ndarray = footprint.weights[max(-y, 0) : bottom - top - y, max(-x, 0) : right - left - x]
            trace = self.source_traces[footprint.source, times.start : times.stop]
            block[:, max(y, 0) : y_end, max(x, 0) : x_end] += trace[:, None, None] * weights
        block *= self.brightness[times.start : times.stop, None, None]
        return np.maximum(block, 0, out=block)


def parse_index(index: Any, shape: tuple[int, int, int]) -> tuple[tuple[range, range, range], bool]:
    """Turn a stack index into one range per axis, and say whether a single frame was asked for.

    Raises
    ------
    IndexError
        If the frame does not exist, a step is not 1 or rows and columns are not slices.
    """
    parts: tuple[Any, ...] = (*index,) if isinstance(index, tuple) else (index,)
    if not 1 <= len(parts) <= 3 or not all(isinstance(part, slice) for part in parts[1:]):
        raise IndexError(f"expected stack[t], stack[a:b] or stack[a:b, y0:y1, x0:x1], got {index!r}")
    squeeze = not isinstance(parts[0], slice)
    first = frame_slice(int(parts[0]), shape[0]) if squeeze else parts[0]
    slices = (first, *parts[1:], *[slice(None)] * (3 - len(parts)))
    ranges = [range(*part.indices(length)) for part, length in zip(slices, shape, strict=True)]
    if any(axis.step != 1 for axis in ranges):
        raise IndexError(f"a stack is sliced with step 1, got {index!r}")
    return (ranges[0], ranges[1], ranges[2]), squeeze


def frame_slice(frame: int, frames: int) -> slice:
    """Return the slice of one frame; negative numbers count from the end."""
    if not -frames <= frame < frames:
        raise IndexError(f"frame {frame} of a stack of {frames} frames")
    return slice(frame % frames, frame % frames + 1)


def shift_frame(frame: np.ndarray, shift: np.ndarray, margin: int, height: int, width: int) -> np.ndarray:
    """Crop (height, width) out of a frame that is wider by `margin` on each side, moved by `shift` = (dy, dx).

    Between pixels a cubic (Catmull-Rom) is used along each axis.
    """
    for axis, (amount, length) in enumerate(zip(shift, (height, width), strict=True)):
        start = int(np.floor(-amount))
        f = -amount - start
        taps = (
            -0.5 * f + f**2 - 0.5 * f**3,
            1 - 2.5 * f**2 + 1.5 * f**3,
            0.5 * f + 2 * f**2 - 1.5 * f**3,
            -0.5 * f**2 + 0.5 * f**3,
        )
        first = margin + start - 1
        moved = np.zeros((height, frame.shape[1]) if axis == 0 else (height, width), np.float32)
        for k, tap in enumerate(taps):
            moved += np.float32(tap) * frame.take(range(first + k, first + k + length), axis)
        frame = moved
    return np.maximum(frame, 0)
