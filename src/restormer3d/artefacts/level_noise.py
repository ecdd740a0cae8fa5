"""Noise that all pixels of a frame share: the level of the detector's signal, or light in the room, fluctuates.

It is far weaker than the noise of a pixel, but no average over pixels takes it away. The mean of a frame tells it, and
so do light of the laser and activity of all tissue, which tissue has the more of the brighter it is. Only what pixels
have alike is taken away, as far as it differs from frame to frame as if drawn anew.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.fft
from scipy.stats import trim_mean

from restormer3d.artefacts.row_noise import white_part
from restormer3d.noise import estimate_noise
from restormer3d.normalization import temporal_mean
from restormer3d.views import each_frame

_LEAST_FRAMES, _LEAST_SIDE = 32, 32  # that tell of it
_BLOCK = 8  # pixels along each side of blocks, of which every other one tells of the level by itself
_OUTSIDE = 0.25  # of the pixels, the darkest and as many of the brightest, that do not count: cells are active
_STANDS_OUT = 2.0  # times the variance by noise of the pixels, that the one they share has,
_LEAST = 0.03  # and of a pixel's deviation: less costs next to nothing
_WHITE = 2.0  # times the power of the fourth quarter of all frequencies, that the second may have: activity has more
_ALIKE = (0.6, 1.4)  # of the change of the mean, that pixels without light have
_AROUND = 15  # frequencies, over which power is averaged


def level_noise(stack: Any) -> np.ndarray | None:
    """Estimate the noise that all pixels of each frame share.

    Two halves of the pixels tell of each frame's level: what they share at the upper half of all frequencies along time
    is more than noise of the pixels. What is stronger below, as activity that rises at once and decays, is left. How
    much more the bright ones have of it tells it from light that is multiplied.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        Recorded intensities, of one image.

    Returns
    -------
    numpy.ndarray or None
        Intensities to take away, (T,) float32; None if pixels share no more than twice what their noise explains, or
        three hundredths of it, if slower changes are stronger, or if dark pixels share less than bright ones; and of
        fewer than 32 frames or 32 pixels.
    """
    frames, height, width = stack.shape
    if frames < _LEAST_FRAMES or min(height, width) < _LEAST_SIDE:
        return None
    mean = temporal_mean(stack)
    first = (np.add.outer(np.arange(height) // _BLOCK, np.arange(width) // _BLOCK) % 2).astype(bool)
    image = mean - mean.mean()
    levels, slopes = np.empty((2, frames)), np.empty(frames)
    for t, frame in each_frame(stack):
        apart = frame - mean
        levels[:, t] = trim_mean(apart[first], _OUTSIDE), trim_mean(apart[~first], _OUTSIDE)
        slopes[t] = (apart * image).sum(dtype=np.float64)
    waves = np.asarray(scipy.fft.dct(levels - levels.mean(1, keepdims=True), norm="ortho"))
    fast, faster, slower = (slice(n * frames // 4, m * frames // 4) for n, m in ((2, 4), (3, 4), (1, 2)))
    products, own = waves[0] * waves[1], np.square(waves[0] - waves[1])[fast].mean() / 4
    shared = products[fast].mean()
    if not shared > max(_STANDS_OUT, _LEAST**2 * mean.size) * own:
        return None
    if products[slower].mean() > _WHITE * products[faster].mean():
        return None
    level = waves.mean(0)
    steeper = np.asarray(scipy.fft.dct(slopes, norm="ortho")) / max(
        float(np.square(image).sum(dtype=np.float64)), 1e-30
    )
    growth = (steeper * level)[fast].sum() / np.square(level)[fast].sum()  # per unit of light and of level
    alike = 1 - growth * (mean.mean(dtype=np.float64) - estimate_noise(stack).offset)
    if not _ALIKE[0] < alike < _ALIKE[1]:
        return None
    return white_part(level, shared, shared + own, (_AROUND,))
