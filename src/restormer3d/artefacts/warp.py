"""Displacement that varies smoothly over the field, and frames that are moved along it.

Along each axis it is a sum of patterns with a weight each, in pixels: the first moves the whole field (rigid movement),
two stretch or shear it, three bend it. Rows that are scanned one after the other while the field moves, and tissue that
gives way on one side, are displaced like that.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import map_coordinates, shift

PATTERNS = 6
"""Of displacement along an axis; the first alone is rigid movement."""

_AT_REST = 0.02  # pixels, below which a frame stays as it is
_ROUNDS = 4  # of finding where a pixel was displaced from


def patterns(v: np.ndarray, u: np.ndarray, count: int = PATTERNS) -> np.ndarray:
    """Products of Legendre's polynomials, up to the second degree, whose mean square over the field is 1.

    Parameters
    ----------
    v, u : numpy.ndarray
        Places along rows and columns, -1 and 1 at the field's borders, that broadcast.
    count : int
        Of the patterns, at most :data:`PATTERNS`.

    Returns
    -------
    numpy.ndarray
        (count, ...).
    """
    bent_v, bent_u = (5**0.5 / 2 * (3 * place**2 - 1) for place in (v, u))
    all_of_them = [
        np.ones_like(v * u),
        3**0.5 * v + 0 * u,
        0 * v + 3**0.5 * u,
        bent_v + 0 * u,
        3 * v * u,
        bent_u + 0 * v,
    ]
    return np.stack(all_of_them[:count])


def farthest(weights: np.ndarray) -> np.ndarray:
    """Pixels along y and x that any place of the field is displaced by, at most, (..., 2); weights (..., 2, K)."""
    places = np.linspace(-1, 1, 5)
    everywhere = patterns(places[:, None], places, weights.shape[-1]).reshape(weights.shape[-1], -1)
    return np.abs(weights @ everywhere).max(axis=-1)


def within(weights: np.ndarray, most: np.ndarray) -> np.ndarray:
    """Weights (..., 2, K), made smaller where they displace a place by more pixels along y and x than `most` (2,)."""
    return weights * np.minimum(1, most / np.maximum(farthest(weights), most))[..., None]


def displaced_from(weights: np.ndarray, shape: tuple[int, ...], field: tuple[int, ...], *, back: bool) -> np.ndarray:
    """Where pixels of a moved frame come from, (2, h, w) rows and columns.

    Parameters
    ----------
    weights : numpy.ndarray
        Of the displacement's patterns along y and x, pixels, (2, K): K is 1, rigid movement, or :data:`PATTERNS`.
    shape : tuple of int
        Rows and columns of frames, that of the field or with margins around it, as many on either side.
    field : tuple of int
        Rows and columns of the field.
    back : bool
        Whether frames are moved back, to where the field is at rest.
    """
    rows, columns = np.mgrid[: shape[0], : shape[1]].astype(np.float64)
    if weights.shape[1] == 1:
        by = weights[:, :1, None]
        return np.stack([rows, columns]) + (by if back else -by)
    if not back:
        return np.stack([rows, columns]) - _displacement(weights, rows[:, :1], columns[:1], shape, field)
    found = np.stack([rows, columns])
    for _ in range(_ROUNDS):
        found = np.stack([rows, columns]) + _displacement(weights, found[0], found[1], shape, field)
    return found


def moved(frame: np.ndarray, weights: np.ndarray, field: tuple[int, ...], *, back: bool = False) -> np.ndarray:
    """Move a frame by cubic splines; beyond its border it goes on as in a mirror.

    Arguments as for :func:`displaced_from`, of `frame` (h, w).
    """
    dtype = np.result_type(frame, np.float32)
    if farthest(weights).max() < _AT_REST:
        return frame
    if weights.shape[1] == 1:
        return shift(frame, -weights[:, 0] if back else weights[:, 0], output=dtype, order=3, mode="mirror")
    places = displaced_from(weights, frame.shape, field, back=back)
    return map_coordinates(frame, places, output=dtype, order=3, mode="mirror")


def _displacement(
    weights: np.ndarray, rows: np.ndarray, columns: np.ndarray, shape: tuple[int, ...], field: tuple[int, ...]
) -> np.ndarray:
    """Along y and x, (2, ...), at rows and columns of a frame; beyond the field as at its border."""
    v, u = (
        np.clip((2 * place - (outer - 1)) / (side - 1), -1, 1)
        for place, outer, side in zip((rows, columns), shape, field, strict=True)
    )
    # As polynomials in v whose coefficients are polynomials in u: less to compute than each pattern by itself.
    constant, down, along, bent_v, twisted, bent_u = (weight[:, None, None] for weight in weights.T)
    of_u = constant - 5**0.5 / 2 * (bent_v + bent_u) + u * (3**0.5 * along + u * (1.5 * 5**0.5 * bent_u))
    return of_u + v * (3**0.5 * down + 3 * twisted * u + v * (1.5 * 5**0.5 * bent_v))
