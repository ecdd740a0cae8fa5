"""What is lost where denoised frames become whole numbers again: voxels out of range, and changes within one step.

A recording of few photons has noise of a step and more, which denoising takes away; what is left may be less than one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Rounding alone then limits the SNR of activity to 10 dB, about what denoising reaches in dim recordings: it doubles
# the error of the result. Below, it takes the smaller part.
_COARSE = 0.1

# Where even the hundredth of the pixels that changes most has a standard deviation over time of less than a tenth of
# that between pixels, there is nothing to see but an image: what is left of noise in it must not count as activity.
_CHANGING = 0.99
_STILL = 0.01


class Rounding:
    """Sums over the frames of a result of what its dtype can't hold; a few images in memory, whatever its length.

    Attributes
    ----------
    low, high : int
        Voxels more than half a step below and above the range of the dtype.
    """

    def __init__(self) -> None:
        self.low = self.high = 0
        self._frames = 0
        self._first = self._change = self._square = self._error = np.zeros(())

    def add(self, frame: NDArray[Any]) -> None:
        """Take in a frame that will be rounded, as it is before."""
        if frame.dtype.kind != "f":  # put back as it was recorded, or nothing to round
            return
        if not self._frames:
            self._first = frame.copy()
            self._change, self._square, self._error = np.zeros((3, *frame.shape))
        change = frame - self._first  # sums of squares of large intensities would lose the small differences
        self._change += change
        self._square += np.square(change, out=change)
        self._error += np.square(np.rint(frame) - frame)
        self._frames += 1

    def share(self) -> float:
        """Mean square of the rounding error over the variance that it disturbs.

        Returns
        -------
        float
            Over the variance in time of all pixels; where they stand still, over a hundredth of the variance between
            them. 0 where nothing was rounded, infinite where nothing differs.
        """
        error = self._error / max(1, self._frames)
        if not error.any():
            return 0.0
        mean = self._change / self._frames
        over_time = np.maximum(self._square / self._frames - mean**2, 0)
        still = _STILL * np.var(self._first + mean)
        disturbed = over_time.mean() if np.quantile(over_time, _CHANGING) > still else still
        return float(error.mean() / disturbed) if disturbed > 0 else float("inf")


def too_coarse(share: float, dtype: np.dtype) -> str:
    """What to tell of a result whose rounding has this :meth:`Rounding.share`; empty where it is harmless."""
    if share <= _COARSE:
        return ""
    return (
        f"the steps of {dtype} are coarser than what is left to tell apart without the noise: convert the recording to "
        "float32 before denoising, or multiply it by 100"
    )
