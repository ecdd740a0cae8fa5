"""How the variance of noise grows with intensity: the photon transfer line, and what is usual among pixels."""

from __future__ import annotations

import numpy as np

_CLIPPED_BIN = 0.05  # a bin with more clipped samples than this has visibly lost variance
_TINY = 1e-30


def usual_variance(mean: np.ndarray, variance: np.ndarray, pairs: int) -> np.ndarray:
    """Replace the variance of every pixel by what is usual among pixels of its mean intensity.

    Unlike the straight line of `estimate_noise` it follows the bend that clipping at zero makes. Pixels whose variance
    is 0, such as a black border, count for nothing.

    Parameters
    ----------
    mean : numpy.ndarray
        Temporal mean, (H, W).
    variance : numpy.ndarray
        Half the mean squared difference of consecutive frames, (H, W).
    pairs : int
        Number of differences it was averaged over.

    Returns
    -------
    numpy.ndarray
        Noise variance, (H, W), above 0.
    """
    changes = variance > 0 if variance.any() else np.ones(variance.shape, bool)
    means, variances, _ = bins_by_mean(mean[changes], variance[changes], np.zeros(int(changes.sum())), pairs)
    return np.maximum(np.interp(mean, means, variances), max(1e-6 * variances.max(), _TINY))


def bins_by_mean(
    mean: np.ndarray,
    variance: np.ndarray,
    clipped: np.ndarray,
    pairs: int,
    sorted_by: np.ndarray | None = None,
    bins: int = 40,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return mean, typical variance and clipped fraction of pixels of like mean; each (bins,).

    The median over a bin drops active pixels. It is taken over groups of pixels large enough for their variance to
    be nearly symmetric: the squares themselves are so skewed that their median lies far below their mean.

    Parameters
    ----------
    mean, variance, clipped : numpy.ndarray
        Of every pixel, all of one shape.
    pairs : int
        Number of differences that the variance was averaged over.
    sorted_by : numpy.ndarray, optional
        What says which means are alike, such as the mean of other frames; by default the means, which then increase.
    bins : int
        At most.
    """
    order = np.argsort(mean if sorted_by is None else sorted_by, axis=None)
    per_group = min(order.size, -(-400 // pairs))
    groups = order.size // per_group
    order = order[: groups * per_group].reshape(groups, per_group)
    m, v, c = (image.ravel()[order].mean(axis=1) for image in (mean, variance, clipped))
    parts = np.array_split(np.arange(groups), max(1, min(bins, groups // 5)))
    return (
        np.array([m[part].mean() for part in parts]),
        np.array([np.median(v[part]) for part in parts]),
        np.array([c[part].mean() for part in parts]),
    )


def robust_line(
    mean: np.ndarray, variance: np.ndarray, clipped: np.ndarray, iterations: int = 30
) -> tuple[float, float]:
    """Fit variance = gain * mean + intercept with least absolute relative deviations; the gain is at least 0."""
    usable = clipped <= max(_CLIPPED_BIN, float(np.quantile(clipped, 0.5)))
    mean, variance = mean[usable], variance[usable]
    typical = float(np.median(variance))
    if np.ptp(mean) == 0:
        return 0.0, typical
    floor = max(_TINY, 1e-3 * typical)
    design = np.stack([mean, np.ones_like(mean)], axis=1)
    fitted, weights = np.maximum(variance, floor), np.ones_like(mean)
    gain, intercept = 0.0, typical
    for _ in range(iterations):
        scale = weights / fitted
        gain, intercept = np.linalg.lstsq(design * scale[:, None], variance * scale, rcond=None)[0]
        fitted = np.maximum(gain * mean + intercept, floor)
        weights = 1 / np.sqrt(np.maximum(np.abs(variance / fitted - 1), 1e-3))
    return (float(gain), float(intercept)) if gain > 0 else (0.0, typical)
