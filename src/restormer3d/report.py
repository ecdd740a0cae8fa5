"""What a person checks before trusting a result: scores that need no ground truth, and a picture.

The noise of a frame is independent of the other frames. A method that never saw a frame can therefore be scored
on it: its mean squared error is the noise plus its own error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from restormer3d.noise import estimate_noise
from restormer3d.normalization import sample_frames
from restormer3d.views import SomeFrames

_STRIP_VALUES = 2**24  # most values of a strip of rows held at once


@dataclass(frozen=True)
class HeldOutScore:
    """How well held-out frames were predicted; squared units of the stack.

    Attributes
    ----------
    mse : float
        Mean squared error: the noise, the method's error, and what happens faster than two frames.
    standard_error : float
        Of `mse`.
    noise_variance : float
        Mean noise variance of the same frames, from their differences; the same for every method.
    per_frame : numpy.ndarray
        Mean squared error of every held-out frame, in order.
    """

    mse: float
    standard_error: float
    noise_variance: float
    per_frame: np.ndarray = field(repr=False)

    @property
    def in_noise_variances(self) -> float:
        """The error in units of the noise variance: 1 is what a perfect prediction gets."""
        return self.mse / self.noise_variance if self.noise_variance > 0 else float("nan")

    def minus(self, other: HeldOutScore) -> tuple[float, float]:
        """Difference of the errors on the same frames, and its standard error: negative if this one is better.

        The noise is the same for both and drops out: the difference is known far better than either error.
        """
        if self.per_frame.shape != other.per_frame.shape:
            raise ValueError(f"scores of {len(self.per_frame)} and {len(other.per_frame)} frames cannot be compared")
        difference = self.per_frame - other.per_frame
        return float(difference.mean()), _standard_error(difference)


def held_out_frame_error(stack: Any, denoise: Callable[[Any], Iterable[np.ndarray]], planes: int = 1) -> HeldOutScore:
    """Denoise the even frames alone, interpolate between them, and compare with the odd frames.

    Widths given in frames count even frames here: a filter of 12 frames of the stack is one of 6.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        Noisy intensities. An odd frame without a frame after it is left out.
    denoise : function
        Takes a stack and gives its denoised frames (H, W) in order: a generator, or an array.
    planes : int
        That the stack shows in turns: then all frames of every other turn are held out, and interpolated between
        frames of their own plane.

    Returns
    -------
    HeldOutScore

    Raises
    ------
    ValueError
        If the stack has fewer than three frames of a plane, or `denoise` gives too few or too many.
    """
    length = stack.shape[0]
    if length <= 2 * planes:
        raise ValueError(f"held-out frames need a stack of {2 * planes + 1} frames or more, got {length}")
    kept = np.flatnonzero(np.arange(length) // planes % 2 == 0)
    errors, near, far = [], [], []
    previous: dict[int, np.ndarray] = {}
    count = 0
    for count, frame in enumerate(denoise(SomeFrames(stack, kept)), start=1):
        if count > len(kept):
            continue
        current, t = np.asarray(frame, dtype=np.float64), int(kept[count - 1])
        if t >= 2 * planes:
            before, held_out, after = (f.astype(np.float64) for f in stack[t - 2 * planes : t + 1][::planes])
            errors.append(np.square(held_out - (previous[t % planes] + current) / 2).mean())
            near.append((np.square(held_out - before).mean() + np.square(after - held_out).mean()) / 4)
            far.append(np.square(after - before).mean() / 2)
        previous[t % planes] = current
    if count != len(kept):
        raise ValueError(f"denoise was given {len(kept)} frames and gave back {count}")
    per_frame = np.array(errors)
    return HeldOutScore(
        mse=float(per_frame.mean()),
        standard_error=_standard_error(per_frame),
        noise_variance=float(2 * np.mean(near) - np.mean(far)),  # signal grows with the interval and cancels
        per_frame=per_frame,
    )


def _standard_error(values: np.ndarray) -> float:
    """Of the mean of a series whose neighbors may be alike: from the means of about sqrt(n) runs of it."""
    runs = np.array_split(values, max(2, int(np.sqrt(len(values)))))
    means = np.array([run.mean() for run in runs if len(run)])
    return float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else float("nan")


def residual_whiteness(noisy: Any, denoised: Any) -> dict[str, float]:
    """Look for signal in what was taken away: residual = noisy - denoised.

    Parameters
    ----------
    noisy, denoised : stack of shape (T, H, W)
        Before and after.

    Returns
    -------
    dict of str to float
        ``x``, ``y``, ``t``: correlation of neighboring voxels of the residual, to be compared with that of the noise
        (`estimate_noise`; 0 for white noise). ``signal``: correlation of the residual with the denoised stack;
        ``activity``: the same after each pixel's mean over time is taken from both. A positive ``activity`` says that
        transients were taken away in part, a negative one that noise was left in.

    Raises
    ------
    ValueError
        If the shapes differ.
    """
    if tuple(noisy.shape) != tuple(denoised.shape):
        raise ValueError(f"noisy and denoised stacks differ in shape: {noisy.shape} and {denoised.shape}")
    products = dict.fromkeys("xyt", 0.0)
    squares = dict.fromkeys("xyt", 0.0)
    sums = np.zeros((5, *noisy.shape[1:]))  # of r, d, r d, r r, d d over time
    center = float(np.mean(noisy[0], dtype=np.float64))  # keeps the sums small
    previous = None
    for t in range(noisy.shape[0]):
        d = denoised[t].astype(np.float64) - center
        r = noisy[t].astype(np.float64) - center - d
        sums += np.stack([r, d, r * d, r * r, d * d])
        pairs = {"x": (r[:, 1:], r[:, :-1]), "y": (r[1:], r[:-1])} | ({} if previous is None else {"t": (r, previous)})
        for axis, (a, b) in pairs.items():
            products[axis] += float(np.vdot(a, b))
            squares[axis] += float(np.vdot(a, a) + np.vdot(b, b)) / 2
        previous = r
    found = {axis: _ratio(products[axis], squares[axis]) for axis in "xyt"}
    whole = sums.sum(axis=(1, 2)) / noisy[0].size
    per_pixel = (sums[2:] - np.stack([sums[0] * sums[1], sums[0] ** 2, sums[1] ** 2]) / noisy.shape[0]).sum(axis=(1, 2))
    overall = whole[2:] - np.array([whole[0] * whole[1], whole[0] ** 2, whole[1] ** 2]) / noisy.shape[0]
    for name, (rd, rr, dd) in {"signal": overall, "activity": per_pixel}.items():
        found[name] = _ratio(float(rd), float(np.sqrt(max(rr, 0.0) * max(dd, 0.0))))
    return found


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else float("nan")


def photon_transfer(stack: Any, bins: int = 20, max_frames: int = 300) -> dict[str, Any]:
    """Variance of frame differences against intensity: the line that shot noise draws, gone where noise is gone.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        Noisy or denoised intensities, T at least 2.
    bins : int
        Points of the curve; each holds as many pixels as any other.
    max_frames : int
        Pairs of frames that are read, evenly spaced.

    Returns
    -------
    dict
        ``intensity`` and ``variance``: lists of length `bins`, medians over pixels; ``gain``, ``offset`` and
        ``read_noise_variance`` of the line as in `estimate_noise`.
    """
    line = estimate_noise(stack)
    times = sample_frames(stack.shape[0] - 1, max_frames)
    total, squares = np.zeros(stack.shape[1:]), np.zeros(stack.shape[1:])
    for t in times:
        earlier, later = stack[t : t + 2].astype(np.float64)
        total += earlier
        squares += np.square(later - earlier) / 2
    parts = np.array_split(np.argsort(total, axis=None), min(bins, total.size))
    return {
        "intensity": [float(np.median(total.ravel()[part])) / len(times) for part in parts],
        "variance": [float(np.median(squares.ravel()[part])) / len(times) for part in parts],
        "gain": line.gain,
        "offset": line.offset,
        "read_noise_variance": line.read_noise_variance,
    }


def trace_picture(noisy: Any, denoised: Any, path: str | Path) -> None:
    """Draw a frame and a pixel's trace, noisy and denoised, into a PNG of 1000 x 800 pixels.

    The pixel is the one with the largest transient of the denoised stack (99th percentile over time less the
    median, averaged over 3 x 3 pixels), the frame the one of its peak. Both frames have one contrast.

    Parameters
    ----------
    noisy, denoised : stack of shape (T, H, W)
        Before and after.
    path : path
        File to write.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the picture needs matplotlib: pip install 'restormer3d[plots]'") from error
    y, x = _liveliest_pixel(denoised)
    spot = np.s_[:, y : y + 1, x : x + 1]
    traces = [np.asarray(stack[spot], dtype=np.float64).ravel() for stack in (noisy, denoised)]
    peak = int(traces[1].argmax())
    limits = np.percentile(denoised[peak], (0.5, 99.7))
    figure = Figure(figsize=(10, 8), dpi=100, layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(1.7, 1))
    for column, (name, stack) in enumerate({"noisy": noisy, "denoised": denoised}.items()):
        image = figure.add_subplot(grid[0, column])
        image.imshow(stack[peak], cmap="gray", vmin=limits[0], vmax=limits[1])
        image.plot(x, y, "o", markersize=14, markerfacecolor="none", markeredgecolor="tab:orange", markeredgewidth=2)
        image.set(title=f"{name}, frame {peak}", xlabel="x (pixels)", ylabel="y (pixels)")
    axes = figure.add_subplot(grid[1, :])
    axes.plot(traces[0], color="0.7", linewidth=0.8, label="noisy")
    axes.plot(traces[1], color="tab:orange", linewidth=2, label="denoised")
    axes.set(xlabel="frame", ylabel="intensity", title=f"the marked pixel (x = {x}, y = {y})")
    axes.margins(x=0)
    axes.legend(loc="upper right")
    figure.savefig(path)


def _liveliest_pixel(stack: Any, max_frames: int = 600) -> tuple[int, int]:
    """Return (y, x) of the largest transient, away from the border where there is room."""
    length, height, width = stack.shape
    frames = sample_frames(length, max_frames)
    rows = max(1, _STRIP_VALUES // (len(frames) * width))
    strips = []
    for top in range(0, height, rows):
        strip = np.concatenate([stack[t : t + 1, top : min(height, top + rows), 0:width] for t in frames])
        middle, high = np.percentile(strip.astype(np.float32), (50, 99), axis=0)
        strips.append(high - middle)
    padded = np.pad(np.concatenate(strips), 1, mode="edge")
    size = np.sum([padded[i : i + height, j : j + width] for i in range(3) for j in range(3)], axis=0)
    margin_y, margin_x = height // 10, width // 10
    inner = size[margin_y : height - margin_y, margin_x : width - margin_x]
    y, x = np.unravel_index(int(inner.argmax()), inner.shape)
    return int(y) + margin_y, int(x) + margin_x
