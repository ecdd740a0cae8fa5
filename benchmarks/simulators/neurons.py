"""Neurons so near that they fill the field: grainy somata, dendrites that their signal fades along, and spines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter, gaussian_filter1d

from benchmarks.simulators.drawing import Field, entry, offsets, smooth_noise, spot, tube, walk
from benchmarks.simulators.movie import Source

FRAME_RATE_HZ = 60.0
STEPS = 8  # of simulated time in a frame
_WARM_UP = 60  # frames before the first one: transients are under way when the recording begins


class Neurons(NamedTuple):
    """Their light, the footprints (H, W) of somata, dendrites and spines, and where somata are, (H, W) of 0 to 1."""

    sources: list[Source]
    footprints: list[np.ndarray]
    occupied: np.ndarray


class _Soma(NamedTuple):
    center: np.ndarray
    radius: float


class _Branch(NamedTuple):
    """A dendrite: its path (n, 2), the radius and the share of the cell's trace (T,) at each point of it."""

    path: np.ndarray
    radii: np.ndarray
    reach: np.ndarray
    trace: np.ndarray


def neurons(rng: np.random.Generator, frames: int, field: Field, margin: int) -> Neurons:
    """Simulate three or four cells, if there is room, and dendrites of others that pass."""
    cells = Neurons([], [], np.zeros(field))
    somata = _placed(rng, field, margin)
    rates = [(rng.uniform(0.8, 1.8), rng.uniform(2, 5)) for _ in somata]
    traces = responses(rng, [_bursts(rng, frames, *rate, 0.025) for rate in rates], frames, 0.40)
    for soma, trace in zip(somata, traces, strict=True):
        body, nucleus, footprint = _drawn_soma(rng, soma, field)
        np.maximum(cells.occupied, body, out=cells.occupied)
        cells.footprints.append(footprint)
        cells.sources.extend([Source(footprint, 1 + trace), Source(0.4 * footprint * nucleus, 1 + _diffused(trace))])
    own = [branch for soma, trace in zip(somata, traces, strict=True) for branch in _own_branches(rng, soma, trace)]
    for branch in [*own, *_passing_branches(rng, frames, field)]:
        _add_dendrite(rng, cells, branch, field, margin)
    return cells


def responses(
    rng: np.random.Generator,
    trains: Sequence[np.ndarray],
    frames: int,
    amplitude: float,
    decay: float = 0.09,
    rise: float = 0.006,
) -> np.ndarray:
    """Changes of fluorescence relative to rest (n, frames) of spikes at seconds: few add up to more, many saturate."""
    time = np.arange(FRAME_RATE_HZ * STEPS) / (FRAME_RATE_HZ * STEPS)
    edges = (np.arange((_WARM_UP + frames) * STEPS + 1) / STEPS - _WARM_UP) / FRAME_RATE_HZ
    traces = np.zeros((len(trains), frames))
    for trace, spikes in zip(traces, trains, strict=True):
        counts = np.histogram(spikes, edges)[0]
        kernel = (1 - np.exp(-time / rise)) * np.exp(-time / (decay * rng.lognormal(0, 0.12)))
        size = amplitude * rng.lognormal(0, 0.2) / kernel.max()
        change = (size * np.convolve(counts, kernel)[: len(counts)]) ** 1.25
        change /= 1 + change / 4
        trace[:] = change[_WARM_UP * STEPS :].reshape(frames, STEPS).mean(1)
    return traces


def _bursts(rng: np.random.Generator, frames: int, rate_hz: float, mean_spikes: float, interval: float) -> np.ndarray:
    """Seconds of spikes that come in bursts, whose spikes are a mean `interval` apart."""
    seconds = frames / FRAME_RATE_HZ
    spikes = [np.empty(0)]
    for start in rng.uniform(-1, seconds, rng.poisson(rate_hz * (seconds + 1))):
        intervals = rng.exponential(interval, rng.geometric(1 / mean_spikes))
        spikes.append(start + np.cumsum([0, *intervals]))
    return np.concatenate(spikes)


def _diffused(trace: np.ndarray) -> np.ndarray:
    """Trace of what reaches the nucleus, later and slower."""
    return gaussian_filter1d(np.pad(trace, (6, 0))[: len(trace)], 6)


def _placed(rng: np.random.Generator, field: Field, margin: int) -> list[_Soma]:
    wanted, somata = rng.integers(3, 5), []
    for _ in range(3000):
        soma = _Soma(rng.uniform(margin + 4, np.subtract(field, margin + 4)), rng.uniform(14, 20))
        gaps = [np.hypot(*(soma.center - other.center)) / (soma.radius + other.radius) for other in somata]
        if len(somata) < wanted and all(gap > 1.25 for gap in gaps):
            somata.append(soma)
    return somata


def _drawn_soma(rng: np.random.Generator, soma: _Soma, field: Field) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the body and its nucleus are, and their light: grainy, with organelles as holes."""
    y, x = offsets(soma.center, field)
    gap, angle, apex = np.hypot(y, x), np.arctan2(y, x), rng.uniform(0, 2 * np.pi)
    waves = [size * np.cos(lobes * angle + rng.uniform(0, 2 * np.pi)) for lobes, size in ((3, 0.04), (7, 0.02))]
    elongation = 0.14 * np.cos(2 * (angle - apex)) + 0.10 * np.maximum(np.cos(angle - apex), 0) ** 6
    outline = soma.radius * (1 + elongation + sum(waves))
    body = np.clip((outline - gap) / 1.6 + 0.5, 0, 1)
    nucleus = np.clip((0.62 * outline - gap) / 2.2 + 0.5, 0, 1)
    grain = smooth_noise(rng, field, 1.3)
    holes = np.minimum(22 * gaussian_filter((rng.random(field) < 0.01).astype(float), 1.6), 2)
    cytoplasm = np.maximum(1 + 0.11 * grain - 0.35 * holes, 0.3)
    light = body * (cytoplasm * (1 - nucleus) + (0.22 + 0.035 * grain) * nucleus)
    return body, nucleus, rng.uniform(0.9, 1.9) * gaussian_filter(light, 1)


def _own_branches(rng: np.random.Generator, soma: _Soma, trace: np.ndarray) -> Iterator[_Branch]:
    """Dendrites that leave a soma, get thinner, and that its signal reaches less and less."""
    for _ in range(rng.integers(1, 4)):
        heading, length = rng.uniform(0, 2 * np.pi), int(rng.integers(60, 130))
        start = soma.center + 0.85 * soma.radius * np.array([np.sin(heading), np.cos(heading)])
        path = walk(start, heading, 0.0092 * smooth_noise(rng, (length,), 12))
        radii = rng.uniform(2.2, 3.6) * np.linspace(1, 0.55, length) * _caliber(rng, length)
        yield _Branch(path, np.maximum(radii, 1), np.exp(-np.arange(length) / rng.uniform(90, 260)), trace)


def _passing_branches(rng: np.random.Generator, frames: int, field: Field) -> Iterator[_Branch]:
    """Dendrites of cells outside of the field, which cross it."""
    trains = [_bursts(rng, frames, 1.2, 3, 0.03) for _ in range(rng.integers(3, 6))]
    length = int(1.4 * max(field))
    for trace in responses(rng, trains, frames, 0.42):
        start, heading = entry(rng, field, margin=0)
        path = walk(start, heading + rng.normal(0, 0.4), 0.0069 * smooth_noise(rng, (length,), 12))
        radii = rng.uniform(1.6, 2.8) * _caliber(rng, length)
        yield _Branch(path, np.maximum(radii, 1), np.ones(length), trace)


def _caliber(rng: np.random.Generator, length: int) -> np.ndarray:
    return 1 + 0.08 * smooth_noise(rng, (length,), 4)


def _add_dendrite(rng: np.random.Generator, cells: Neurons, branch: _Branch, field: Field, margin: int) -> None:
    """Add a dendrite, events that stay in a part of it, and its spines."""
    frames, length = len(branch.trace), len(branch.path)
    profile, index = tube(branch.path, branch.radii, field)
    brightness = rng.uniform(0.55, 1.25)
    visible = profile * (1 - 0.9 * cells.occupied)
    footprint = 1.15 * brightness * gaussian_filter(visible, rng.uniform(0.8, 1.9))
    cells.footprints.append(footprint)
    cells.sources.append(Source(footprint, np.ones(frames)))
    cells.sources.append(Source(footprint * branch.reach[index], branch.trace))
    seconds = frames / FRAME_RATE_HZ
    trains = [rng.uniform(0, seconds, rng.poisson(0.7 * seconds)) for _ in range(2)]
    for trace in responses(rng, trains, frames, 0.65, decay=0.12):
        away = (index - rng.integers(length)) / rng.uniform(8, 22)
        cells.sources.append(Source(footprint * np.exp(-(away**2) / 2), trace))
    _add_spines(rng, cells, branch, brightness, margin)


def _add_spines(rng: np.random.Generator, cells: Neurons, branch: _Branch, brightness: float, margin: int) -> None:
    """Add spines whose traces are synapses of their own and a part of their dendrite's."""
    frames, (height, width) = len(branch.trace), cells.occupied.shape
    for place, head in _spine_heads(rng, branch):
        if _is_free(head, cells.occupied, margin):
            spine = brightness * _drawn_spine(rng, branch.path[place], head, (height, width))
            own = _synaptic_trace(rng, frames)
            cells.footprints.append(spine)
            cells.sources.append(Source(spine, 1 + 0.6 * branch.reach[place] * branch.trace + own))


def _spine_heads(rng: np.random.Generator, branch: _Branch) -> Iterator[tuple[int, np.ndarray]]:
    """Where on the path a spine is, and where its head is, on either side."""
    length, place = len(branch.path), int(rng.integers(2, 7))
    while place < length - 3:
        y, x = branch.path[place + 2] - branch.path[place - 2]
        aside = rng.choice([-1, 1]) * np.array([x, -y]) / np.hypot(y, x)
        yield place, branch.path[place] + aside * (branch.radii[place] + rng.uniform(1.8, 4.2))
        place += int(rng.integers(6, 16))


def _is_free(head: np.ndarray, occupied: np.ndarray, margin: int) -> bool:
    """Whether a spine's head is in the field, or nearly, and not before a soma."""
    if not ((head > margin - 2) & (head < np.subtract(occupied.shape, margin - 2))).all():
        return False
    y, x = head.astype(int)
    return bool(occupied[y, x] < 0.2)


def _drawn_spine(rng: np.random.Generator, base: np.ndarray, head: np.ndarray, field: Field) -> np.ndarray:
    """A round head on a thin neck."""
    drawn = rng.uniform(0.45, 1.1) * spot(head, rng.uniform(0.9, 1.5), field)
    for share in np.linspace(0.1, 0.9, 5):
        drawn = np.maximum(drawn, 0.5 * spot(base + share * (head - base), 0.8, field))
    return drawn


def _synaptic_trace(rng: np.random.Generator, frames: int) -> np.ndarray:
    seconds = frames / FRAME_RATE_HZ
    events = rng.uniform(-1, seconds, rng.poisson(rng.gamma(1.2, 0.6) * (seconds + 1)))
    return responses(rng, [events], frames, 0.9, decay=0.11)[0]
