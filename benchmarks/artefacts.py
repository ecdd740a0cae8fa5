"""What recordings do beside noise: `python -m benchmarks.artefacts` adds one artefact at a time and scores the result.

The scene is of a simulator of its own, with other cells, events and noise than the one that makes training data.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
from cyclopts import App, Parameter
from scipy.ndimage import gaussian_filter, map_coordinates, shift, uniform_filter1d, zoom

from benchmarks.jobs import without_folders
from benchmarks.tables import publish
from restormer3d.denoising import array_and_record
from restormer3d.metrics import evaluate_stacks
from restormer3d.settings import settings

BEGIN = "<!-- artefact table: begin (written by benchmarks.artefacts --write; edit nothing here by hand) -->"
END = "<!-- artefact table: end -->"
_SEED = 9_300_000
_BORDER = 8  # pixels around the field that it may move to
_GAIN, _READ_NOISE = 100.0, 1000.0  # ADU per photon, ADU^2
_Recording = tuple[np.ndarray, np.ndarray]

app = App(name="python -m benchmarks.artefacts", help_format="plaintext")


def other_scene(shape: tuple[int, int, int], seed: int) -> np.ndarray:
    """Clean frames (T, H, W): dark-centered elliptic cells with rare events over a cloudy, slowly changing ground."""
    frames, height, width = shape
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    ground = np.full((height, width), 70.0)
    for size, strength in ((20, 25), (8, 12), (3, 6)):
        cloud = gaussian_filter(rng.standard_normal((height, width)), size)
        ground += cloud / cloud.std() * strength
    neuropil = gaussian_filter(rng.standard_normal(frames), 6)
    clean = np.maximum(ground, 8) * (1 + 0.05 * neuropil / neuropil.std())[:, None, None]
    t = np.arange(frames)
    for _ in range(height * width // 400):
        center_y, center_x, angle = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(0, np.pi)
        radii = rng.uniform(3, 6, 2)
        u = (x - center_x) * np.cos(angle) + (y - center_y) * np.sin(angle)
        v = (y - center_y) * np.cos(angle) - (x - center_x) * np.sin(angle)
        distance = np.hypot(u / radii[0], v / radii[1])
        footprint = (1 - 0.5 * np.exp(-((distance / 0.5) ** 2))) / (1 + np.exp((distance - 1) * 6))
        events = rng.poisson(rng.choice([0.003, 0.01, 0.04]), frames) * rng.uniform(0.5, 1.5, frames)
        response = np.exp(-t / rng.uniform(4, 25)) - np.exp(-t / rng.uniform(0.5, 3))
        course = np.convolve(events, response / response.max())[:frames]
        clean += (rng.uniform(10, 60) + rng.uniform(80, 250) * course)[:, None, None] * footprint
    return clean


@dataclass
class _Trial:
    """A scene to spoil: clean frames of the field and of what is around it, and chance."""

    shape: tuple[int, int, int]
    seed: int
    rng: np.random.Generator = field(init=False)
    wider: np.ndarray = field(init=False)
    clean: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed + 1)
        frames, height, width = self.shape
        self.wider = other_scene((frames, height + 2 * _BORDER, width + 2 * _BORDER), self.seed)
        self.clean = self.wider[:, _BORDER:-_BORDER, _BORDER:-_BORDER].copy()

    def recorded(self, clean: np.ndarray) -> np.ndarray:
        """Photons and read noise, in ADU."""
        photons = self.rng.poisson(np.maximum(clean, 0) / _GAIN)
        return _GAIN * photons + np.sqrt(_READ_NOISE) * self.rng.standard_normal(clean.shape)

    def both(self, clean: np.ndarray) -> _Recording:
        """Truth and recording of changed clean frames."""
        return clean, self.recorded(clean)

    def beside(self) -> np.ndarray:
        """Clean frames of another plane."""
        return other_scene(self.shape, self.seed + 2)

    def moved(self, shifts: np.ndarray) -> np.ndarray:
        """Clean frames whose field is displaced by rows and columns (T, 2)."""
        inside = slice(_BORDER, -_BORDER)
        return np.stack([shift(x, by, order=1)[inside, inside] for x, by in zip(self.wider, shifts, strict=True)])

    def warped(self, by: np.ndarray) -> np.ndarray:
        """Clean frames whose pixels are displaced by rows and columns, each by its own (T, 2, H, W)."""
        places = np.mgrid[: self.shape[1], : self.shape[2]] + _BORDER
        return np.stack([map_coordinates(x, places - d, order=1) for x, d in zip(self.wider, by, strict=True)])


def _wandering(s: _Trial, deviation: float, frames: float) -> np.ndarray:
    """Clean frames of a field that moves by some pixels, smoothly over some frames."""
    shifts = gaussian_filter(s.rng.standard_normal((s.shape[0], 2)), (frames, 0.0))
    return s.moved(deviation * shifts / shifts.std())


def _parts_move(s: _Trial) -> _Recording:
    """By a pixel, smoothly over some frames and a third of the field."""
    frames, height, width = s.shape
    by = gaussian_filter(s.rng.standard_normal((frames, 2, height, width)), (3, 0, height / 3, width / 3))
    return s.both(s.warped(by / by.std()))


def _scanned_meanwhile(s: _Trial) -> _Recording:
    """The field moves by 1.2 pixels within the time of some rows more or less than a frame has."""
    frames, height, width = s.shape
    by = gaussian_filter(s.rng.standard_normal((frames * height, 2)), (height, 0))
    by = (1.2 * by / by.std(0)).reshape(frames, height, 2).transpose(0, 2, 1)[..., None]
    return s.both(s.warped(np.broadcast_to(by, (frames, 2, height, width))))


def _with_lines_shifted(clean: np.ndarray, by: float) -> np.ndarray:
    clean = clean.copy()
    clean[:, 1::2] = shift(clean[:, 1::2], (0, 0, by), order=3, mode="grid-wrap")
    return clean


def _jumps(s: _Trial) -> _Recording:
    shifts = np.zeros((s.shape[0], 2))
    for t in s.rng.integers(0, s.shape[0] - 4, 6):
        shifts[t : t + 3] = s.rng.uniform(-4, 4, 2)
    return s.both(s.moved(shifts))


def _registered(s: _Trial) -> _Recording:
    recorded, pairs = s.recorded(s.clean), np.rint(3 * s.rng.standard_normal((s.shape[0], 2))).astype(int)
    inside = np.zeros(s.shape, bool)
    for frame, (y, x) in zip(inside, pairs, strict=True):
        frame[max(y, 0) : s.shape[1] + min(y, 0), max(x, 0) : s.shape[2] + min(x, 0)] = True
    return s.clean * inside, recorded * inside


def _interpolated(s: _Trial) -> _Recording:
    shifts = s.rng.uniform(-0.5, 0.5, (s.shape[0], 2))
    recorded = s.recorded(s.moved(-shifts))
    return s.clean, np.stack([shift(x, by, order=1, mode="nearest") for x, by in zip(recorded, shifts, strict=True)])


def _enlarged(s: _Trial) -> _Recording:
    small = s.clean[:, ::2, ::2]
    return tuple(np.stack([zoom(frame, 2, order=1) for frame in x]) for x in s.both(small))


def _running_mean(s: _Trial) -> _Recording:
    clean, recorded = s.both(s.clean)
    for t in range(1, len(clean)):
        for frames in (clean, recorded):
            frames[t] = (frames[t] + frames[t - 1]) / 2
    return clean, recorded


def _mean_of_three(s: _Trial) -> _Recording:
    clean, recorded = (uniform_filter1d(x, 3, axis=0) for x in s.both(s.clean))
    return clean, recorded


def _averaged(s: _Trial) -> _Recording:
    four = s.recorded(np.repeat(s.clean, 4, 0))
    return s.clean, four.reshape(s.shape[0], 4, *s.shape[1:]).mean(1)


def _one_axis(s: _Trial) -> _Recording:
    def smeared(frames: np.ndarray) -> np.ndarray:
        return np.concatenate([frames[:, :, :1], 0.7 * frames[:, :, 1:] + 0.3 * frames[:, :, :-1]], 2)

    return smeared(s.clean), smeared(s.recorded(s.clean))


def _hot(s: _Trial) -> _Recording:
    pixels = np.where(s.rng.random(s.shape[1:]) < 0.003, s.rng.uniform(500, 5000, s.shape[1:]), 0)
    return s.clean + pixels, s.recorded(s.clean) + pixels


def _ripple(s: _Trial) -> _Recording:
    time = np.arange(np.prod(s.shape)).reshape(s.shape)
    return s.clean, s.recorded(s.clean) + 25 * np.sin(0.813 * time)


def _hum(s: _Trial) -> np.ndarray:
    """Of the mains: 2.37 cycles in a frame."""
    frames, height, width = s.shape
    lines = np.arange(frames * height).reshape(frames, height, 1) + 0.7 * np.arange(width) / width
    return 20 * np.sin(2 * np.pi * 2.37 / height * lines)


def _several(s: _Trial) -> _Recording:
    """Movement, bleaching, displaced lines, cosmic rays, hum, noise that rows share, and an offset."""
    bleached = np.exp(-np.linspace(0, 1, s.shape[0]))[:, None, None]
    clean = _with_lines_shifted(_wandering(s, 1.5, 3.0) * bleached, 2.0)
    added = _hum(s) + 8 * s.rng.standard_normal((*s.shape[:2], 1)) + 4000 * (s.rng.random(s.shape) < 1e-4)
    return clean + 500, s.recorded(clean) + added + 500


def _light_on_movement(s: _Trial) -> _Recording:
    s.clean = _wandering(s, 1.5, 3.0)
    return _with_light(s, 300)


def _saturated(s: _Trial) -> _Recording:
    recorded = s.recorded(s.clean)
    most = np.quantile(recorded, 0.995)
    return np.minimum(s.clean, most), np.minimum(recorded, most)


def _vignette(s: _Trial) -> _Recording:
    y, x = np.mgrid[: s.shape[1], : s.shape[2]] - np.array(s.shape[1:])[:, None, None] / 2
    return s.both(s.clean * np.exp(-(y**2 + x**2) / 1200))


def _flat_field(s: _Trial) -> _Recording:
    clean, recorded = _vignette(s)
    light = clean.mean(0) / s.clean.mean(0)
    return clean / light, recorded / light


def _with_light(s: _Trial, light: float, rows: slice = slice(None), frames: int = 4) -> _Recording:
    lit = s.clean.copy()
    for first in (len(lit) // 4, 5 * len(lit) // 8):
        lit[first : first + frames, rows] += light
    return s.both(lit)


def _darkness(s: _Trial) -> _Recording:
    clean, recorded = s.both(s.clean)
    level = np.full((s.shape[0], 1, 1), 1000.0)
    for first in (s.shape[0] // 4, 5 * s.shape[0] // 8):
        level[first : first + 4] -= 300
    return clean + level, recorded + level


def _uneven_light(s: _Trial) -> _Recording:
    lit = s.clean.copy()
    lit[len(lit) // 2 : len(lit) // 2 + 4] += np.linspace(100, 500, s.shape[1])[:, None]
    return s.both(lit)


def _black_columns(s: _Trial, clean: np.ndarray, share: float = 0.25) -> _Recording:
    inside = np.arange(s.shape[2]) >= share * s.shape[2]
    return clean * inside, s.recorded(clean) * inside


def _dropped(s: _Trial) -> _Recording:
    present = np.ones((s.shape[0], 1, 1))
    present[s.shape[0] // 3 : s.shape[0] // 3 + 5] = 0
    return s.clean * present, s.recorded(s.clean) * present


def _lost_frame(s: _Trial) -> _Recording:
    clean, recorded = s.clean + 2000, s.recorded(s.clean) + 2000
    clean[len(clean) // 2], recorded[len(clean) // 2] = np.nan, 0
    return clean, recorded


def _broken_off(s: _Trial) -> _Recording:
    clean, recorded = s.clean + 2000, s.recorded(s.clean) + 2000
    clean[-1], recorded[-1, s.shape[1] // 2 :] = np.nan, 0
    return clean, recorded


def _slow_shutter(s: _Trial) -> _Recording:
    opening = np.where(np.arange(s.shape[0]) > 0, 1, 0.1)[:, None, None]
    clean, recorded = s.clean + 2000, s.recorded(s.clean * opening) + 2000
    clean[0] = np.nan
    return clean, recorded


def _spark(s: _Trial) -> _Recording:
    recorded = s.recorded(s.clean) + 2000
    recorded[s.shape[0] // 2, 10::20, 10::20] = 2**16 - 1
    return s.clean + 2000, recorded


def _some_repeated(s: _Trial) -> _Recording:
    own = s.rng.random(s.shape[0]) > 0.1
    shown = np.maximum.accumulate(np.where(own, np.arange(s.shape[0]), 0))
    return tuple(x[shown] for x in s.both(s.clean))


def _relative(s: _Trial) -> _Recording:
    clean, recorded = _vignette(s)
    rest = clean.mean(0)
    return 1000 * (clean - rest) / rest, 1000 * (recorded - rest) / rest


def _without_means(s: _Trial) -> _Recording:
    clean, recorded = s.both(s.clean)
    return clean - recorded.mean(0), recorded - recorded.mean(0)


def _bursts(s: _Trial) -> _Recording:
    tissue = gaussian_filter(s.rng.standard_normal(s.shape[1:]), 3)
    tissue = np.clip(1 + 0.3 * tissue / tissue.std(), 0, None)
    active = np.zeros((s.shape[0], 1, 1))
    for first in (len(s.clean) // 4, 5 * len(s.clean) // 8):
        active[first : first + 10] = 3
    return s.both(s.clean * (1 + active * tissue))


def _repeated(s: _Trial) -> _Recording:
    return tuple(np.repeat(x, 2, 0)[: s.shape[0]] for x in s.both(s.clean[::2]))


def _two_planes(s: _Trial) -> _Recording:
    clean = s.clean.copy()
    clean[1::2] = 0.5 * s.beside()[1::2]
    return s.both(clean)


def _two_close_planes(s: _Trial) -> _Recording:
    clean = s.clean.copy()
    beside = s.beside().mean(0)
    clean[1::2] += 0.3 * (beside - beside.mean())
    return s.both(clean)


def _two_close_planes_move(s: _Trial) -> _Recording:
    beside = other_scene((s.shape[0], *s.wider.shape[1:]), s.seed + 2).mean(0)
    s.wider[1::2] += 0.3 * (beside - beside.mean())
    return s.both(_wandering(s, 1.0, 3.0))


def _shifted_lines(s: _Trial, by: float = 2.0) -> _Recording:
    return s.both(_with_lines_shifted(s.clean, by))


def _drift_in_depth(s: _Trial) -> _Recording:
    share = np.linspace(0, 1, s.shape[0])[:, None, None]
    return s.both((1 - share) * s.clean + share * s.beside())


def _made_up_for(s: _Trial) -> _Recording:
    bleached = np.exp(-1.6 * np.linspace(0, 1, s.shape[0]))[:, None, None]
    return s.clean, s.recorded(s.clean * bleached) / bleached


def _few_photons(s: _Trial) -> _Recording:
    dim = 0.05 * s.clean
    return dim, s.rng.poisson(dim) + 2 * s.rng.standard_normal(s.shape)


def _many_photons(s: _Trial) -> _Recording:
    bright = 10 * s.clean
    return bright, s.rng.poisson(bright)


def _eight_bits(s: _Trial) -> _Recording:
    clean, recorded = s.both(s.clean)
    scale = 255 / np.quantile(recorded, 0.999)
    return np.clip(scale * clean, 0, 255), np.clip(np.rint(scale * recorded), 0, 255).astype(np.uint8)


def _noise_of_rows(s: _Trial) -> _Recording:
    return s.clean, s.recorded(s.clean) + 20 * s.rng.standard_normal((*s.shape[:2], 1))


def _noise_of_frames(s: _Trial) -> _Recording:
    return s.clean, s.recorded(s.clean) + 10 * s.rng.standard_normal((s.shape[0], 1, 1))


def _noisy_frames(s: _Trial) -> _Recording:
    clean, recorded = s.clean + 500, s.recorded(s.clean) + 500
    some = [s.shape[0] // 8, s.shape[0] // 8 + 1, s.shape[0] // 2, *range(3 * s.shape[0] // 4, 3 * s.shape[0] // 4 + 3)]
    recorded[some] = clean[some] + 5 * (recorded[some] - clean[some])
    return clean, recorded


def _garbled(s: _Trial) -> _Recording:
    clean, recorded = s.clean + 500, s.recorded(s.clean) + 500
    t, rows = s.shape[0] // 3, slice(s.shape[1] // 3, 2 * s.shape[1] // 3)
    clean[t], recorded[t, rows] = np.nan, s.rng.integers(0, 2**16, recorded[t, rows].shape)
    return clean, recorded


def _flicker(s: _Trial) -> _Recording:
    return s.both(s.clean * (1 + 0.05 * s.rng.standard_normal((s.shape[0], 1, 1))))


def _spikes(s: _Trial) -> _Recording:
    return s.clean, s.recorded(s.clean) + 4000 * (s.rng.random(s.shape) < 1e-4)


ARTEFACTS: dict[str, Callable[[_Trial], _Recording]] = {
    "none": lambda s: s.both(s.clean),
    "an offset of 2,000, uint16": lambda s: (s.clean + 2000, np.clip(s.recorded(s.clean) + 2000, 0, None)),
    "an offset of -500": lambda s: (s.clean - 500, s.recorded(s.clean) - 500),
    "negative noise cut at 0": lambda s: (s.clean, np.clip(s.recorded(s.clean), 0, None)),
    "scaled to 8 bits, clipped": _eight_bits,
    "clipped at a detector's limit": _saturated,
    "the field jitters by 0.7 pixels": lambda s: s.both(_wandering(s, 0.7, 1.0)),
    "the field jumps by up to 4 pixels": _jumps,
    "parts of the field move by themselves": _parts_move,
    "the field moves while it is scanned": _scanned_meanwhile,
    "registered by whole pixels, borders black": _registered,
    "registered with interpolation": _interpolated,
    "brightness flickers by 5 %": _flicker,
    "bleaching, to a fifth": lambda s: s.both(s.clean * np.exp(-1.6 * np.linspace(0, 1, len(s.clean)))[:, None, None]),
    "bleaching, to a fifth, made up for": _made_up_for,
    "noise that rows share": _noise_of_rows,
    "noise that frames share": _noise_of_frames,
    "noise five times as strong in six frames, offset 500": _noisy_frames,
    "electrical ripple": _ripple,
    "hum of the mains": lambda s: (s.clean, s.recorded(s.clean) + _hum(s)),
    "hot pixels": _hot,
    "cosmic rays": _spikes,
    "enlarged twofold by interpolation": _enlarged,
    "smeared along rows": _one_axis,
    "recursive average along time": _running_mean,
    "running mean of 3 frames": _mean_of_three,
    "means of 4 frames": _averaged,
    "vignetting": _vignette,
    "vignetting, divided by the flat field": _flat_field,
    "changes relative to the mean (dF/F), vignetting": _relative,
    "the mean of each pixel taken away": _without_means,
    "a quarter of all columns black": lambda s: _black_columns(s, s.clean),
    "15 % of all columns black, and the field moves": lambda s: _black_columns(s, _wandering(s, 1.5, 3.0), 0.15),
    "five dropped frames": _dropped,
    "one lost frame, offset 2,000": _lost_frame,
    "the last frame broken off, offset 2,000": _broken_off,
    "garbled data in a third of a frame, offset 500": _garbled,
    "a shutter that opens slowly, offset 2,000": _slow_shutter,
    "a spark, offset 2,000": _spark,
    "a tenth of all frames repeated": _some_repeated,
    "every frame twice": _repeated,
    "bursts of all tissue, three times as bright": _bursts,
    "two planes by turns": _two_planes,
    "two planes by turns, of the same activity": _two_close_planes,
    "two planes by turns, of the same activity, and the field moves": _two_close_planes_move,
    "every other line shifted by 2 pixels": _shifted_lines,
    "every other line shifted by half a pixel": lambda s: _shifted_lines(s, 0.5),
    "slow drift to another plane": _drift_in_depth,
    "few photons": _few_photons,
    "many photons": _many_photons,
    "light, 50 ADU in 8 frames": lambda s: _with_light(s, 50),
    "light, 300 ADU in 8 frames": lambda s: _with_light(s, 300),
    "light, 3,000 ADU in 8 frames": lambda s: _with_light(s, 3000),
    "light, 500 ADU in a third of the rows of 8 frames": lambda s: _with_light(
        s, 500, slice(s.shape[1] // 3, 2 * s.shape[1] // 3)
    ),
    "light, 100 to 500 ADU from the first to the last row of 4 frames": _uneven_light,
    "light, 300 ADU in 80 frames": lambda s: _with_light(s, 300, frames=40),
    "light, 300 ADU in 8 frames, and the field moves": _light_on_movement,
    "darker by 300 ADU in 8 frames, offset 1,000": _darkness,
    "seven of these at once, offset 500": _several,
}
"""From a trial to its truth and the recording of it, (T, H, W) both, by name; frames of NaN are not scored."""


def recording(name: str, shape: tuple[int, int, int]) -> _Recording:
    """Truth in floating point and recording in integers, (T, H, W) both, of an artefact."""
    clean, recorded = ARTEFACTS[name](_Trial(shape, _SEED))
    if recorded.dtype.kind != "u":
        kind = np.uint16 if recorded.min() >= 0 else np.int16
        recorded = np.clip(np.rint(recorded), np.iinfo(kind).min, np.iinfo(kind).max).astype(kind)
    return clean.astype(np.float32), recorded


@app.default
def artefacts(
    *,
    shape: Annotated[tuple[int, int, int], Parameter(negative="")] = (160, 80, 80),
    only: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative="")] = (),
    iterations: int = 0,
    write: Path | None = None,
) -> int:
    """Denoise a scene with one artefact at a time by the Gaussian filter and by the default recipe.

    Parameters
    ----------
    shape
        Frames, rows and columns of the scene.
    only
        Artefacts with any of these words in their name; by default all.
    iterations
        Of fine-tuning.
    write
        Markdown file whose table is replaced.
    """
    lines = ["| artefact | Gaussian filter | restormer3d | difference |", "|---|---|---|---|"]
    for name in ARTEFACTS:
        if only and not any(word in name for word in only):
            continue
        clean, noisy = recording(name, shape)
        chosen = settings(iterations=iterations)
        outputs = [array_and_record(noisy, chosen, method=method)[0] for method in ("gaussian", "restormer3d")]
        scored = np.isfinite(clean).all((1, 2))
        scores = [evaluate_stacks(clean[scored], output[scored]) for output in outputs]
        both = [(score["stsnr"], score["activity_snr"]) for score in scores]
        cells = [f"{a:.2f} / {b:.2f}" for a, b in both]
        change = " / ".join(f"{ours - filtered:+.2f}" for filtered, ours in zip(*both, strict=True))
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {change} |")
        print(lines[-1], file=sys.stderr, flush=True)
    command = f"python -m benchmarks.artefacts {without_folders(sys.argv[1:])}".strip()
    origin = (
        f"Computed by `{command}`: stSNR / activity SNR in dB of a scene of {' x '.join(map(str, shape))} with seed "
        f"{_SEED}, after {iterations} iterations of fine-tuning; the filter's widths are chosen by held-out frames."
    )
    publish(write, BEGIN, END, origin, "\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(app())
