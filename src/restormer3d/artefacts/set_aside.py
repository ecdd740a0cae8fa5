"""All that is set aside before a stack is denoised, in order, and put back afterwards, in reverse; or taken away."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial, reduce
from typing import Any, NamedTuple

import numpy as np

from restormer3d.artefacts import (
    borders,
    idle_frames,
    lost_voxels,
    noisy_rows,
    scan_lines,
    spikes,
    stimulus_light,
    temporal_correlation,
)
from restormer3d.artefacts.level_noise import level_noise
from restormer3d.artefacts.planes import find_planes, with_one_image
from restormer3d.artefacts.ripple import WithoutRipple, electrical_ripple
from restormer3d.artefacts.row_noise import WithoutRowNoise, row_noise
from restormer3d.config import InferenceConfig
from restormer3d.noise import NoiseEstimate, estimate_noise
from restormer3d.progress import Say, silent
from restormer3d.spool import held
from restormer3d.views import Lowered, far_level

_Frames = Iterator[np.ndarray]
_PutBack = Callable[[_Frames], _Frames]


class SetAside(NamedTuple):
    """A stack without what was set aside.

    Attributes
    ----------
    stack : stack of shape (T, H, W)
        What is left to denoise; it may have fewer frames.
    light : numpy.ndarray or None
        Light of a stimulus that was taken away from its rows, (T, H).
    record : dict
        What was set aside, for a sidecar: `level`, `idle_frames`, `filled_borders`, `constant_edges`,
        `lost_voxels`, `noisy_frames`, `spikes`, `line_shift`, `stimulus_light`.
    drawn : tuple of int
        Numbers of frames that were drawn towards others.
    undo : tuple of function
        Each puts one thing back into denoised frames, the last one first.
    """

    stack: Any
    light: np.ndarray | None
    record: dict[str, Any]
    drawn: tuple[int, ...]
    undo: tuple[_PutBack, ...]

    def put_back(self, frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """Put all of it back into denoised frames (H, W), as they come."""
        return reduce(lambda done, put_back: put_back(done), reversed(self.undo), frames)


def set_aside(stack: Any, parts: InferenceConfig, say: Say = silent) -> SetAside:
    """Set aside what `parts` asks for, and say what was found.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        As recorded, checked by `stacks.check_stack`.
    parts : InferenceConfig
        Of it `mend`, `stimulus_light` and `planes` count.
    say : function, optional
        Called with one line of text for the user.
    """
    record: dict[str, Any] = {"level": far_level(stack)}
    undo: list[_PutBack] = []
    if record["level"]:
        stack = Lowered(stack, record["level"])
        undo.append(partial(_raised, level=record["level"]))
    record |= {
        "idle_frames": 0,
        "filled_borders": 0,
        "constant_edges": None,
        "lost_voxels": 0,
        "noisy_frames": 0,
        "spikes": 0,
        "line_shift": 0.0,
    }
    drawn: tuple[int, ...] = ()
    if parts.mend:
        frames = stack.shape[0]
        stack = _without_idle(stack, parts, undo, say)
        record["idle_frames"] = frames - stack.shape[0]
        noise = estimate_noise(stack)
        stack, record["filled_borders"] = _without_borders(stack, noise, undo, say)
        stack, record["constant_edges"] = _without_constant_edges(stack, undo, say)
        noisy = noisy_rows.noisy_rows(stack, noise)
        stack, record["lost_voxels"] = _without_lost_voxels(stack, noise, noisy, undo, say)
        stack, drawn = _without_noise_of_rows(stack, noisy, parts, say)
        record["noisy_frames"] = len(drawn)
        stack, record["spikes"] = _without_spikes(stack, noise, say)
        stack, record["line_shift"] = _with_lines_aligned(stack, undo, say)
    light = None
    if parts.stimulus_light:
        stack, light = _without_light(stack, undo, say)
    record["stimulus_light"] = None
    if light is not None:
        largest = float(light.flat[np.abs(light).argmax()])
        record["stimulus_light"] = {"frames": int(light.any(1).sum()), "largest": largest}
    return SetAside(stack, light, record, drawn, tuple(undo))


def made_white(
    stack: Any, images: np.ndarray | None, parts: InferenceConfig, say: Say = silent
) -> tuple[Any, _PutBack, float]:
    """Make noise white that goes on from frame to frame, and say so.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        What :func:`set_aside` left, or one plane of it.
    images : numpy.ndarray or None
        Of planes that are shown in turns, (planes, H, W): what averages along time leaves no planes to tell apart.
    parts : InferenceConfig
        Of it `mend` counts.
    say : function, optional
        Called with one line of text for the user.

    Returns
    -------
    tuple of stack, function and float
        The stack, in memory or a temporary file where there is room; what averages its denoised frames again; and for
        a sidecar the largest correlation that its noise had along time, 0 if it is as it was.
    """
    found = temporal_correlation.temporal_correlation(stack) if parts.mend and images is None else None
    if found is None:
        return stack, iter, 0.0
    say(
        f"the noise of frames is correlated along time, by up to {found.largest:.2g}, as of a running average: it is "
        "made white before denoising, and denoised frames are averaged alike"
    )
    white = temporal_correlation.Whitened(stack, found.whitening)
    values = held(white)
    put_back = partial(temporal_correlation.put_back, whitening=found.whitening)
    return white if values is None else values, put_back, found.largest


def without_electrical_noise(
    stack: Any, images: np.ndarray | None, light: np.ndarray | None, parts: InferenceConfig, say: Say = silent
) -> tuple[Any, dict[str, float]]:
    """Take away what electrical ripple adds to frames, and what noise to all pixels or to rows, for good, and say so.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        What :func:`set_aside` left, or one plane of it.
    images : numpy.ndarray or None
        Of planes that are shown in turns, (planes, H, W).
    light : numpy.ndarray or None
        Of a stimulus, (T, H), that was taken from the stack. What the measurement of it has missed looks like noise
        that the pixels of a frame share: with light, none is taken away.
    parts : InferenceConfig
        Of it `mend` counts.
    say : function, optional
        Called with one line of text for the user.

    Returns
    -------
    tuple of stack and dict
        The stack without them, and for a sidecar the standard deviation of what they added to voxels, in intensities:
        `ripple`, `level_noise` and `row_noise`.
    """
    record = {"ripple": 0.0, "level_noise": 0.0, "row_noise": 0.0}
    if parts.mend and (ripple := electrical_ripple(with_one_image(stack, images))) is not None:
        record["ripple"] = ripple.deviation
        stack = WithoutRipple(stack, ripple)
        say(
            f"waves of electrical ripple are in the frames, {ripple.deviation:.3g} together (standard deviation): "
            "they are taken away"
        )
    if parts.mend and light is None and (level := level_noise(with_one_image(stack, images))) is not None:
        record["level_noise"] = float(level.std())
        stack = WithoutRowNoise(stack, np.repeat(level[:, None], stack.shape[1], axis=1))
        say(f"the pixels of a frame share noise, {level.std():.3g} (standard deviation): it is taken away")
    if parts.mend and (noise := row_noise(with_one_image(stack, images))) is not None:
        record["row_noise"] = float(noise.std())
        stack = WithoutRowNoise(stack, noise)
        say(f"the pixels of a row share noise, {noise.std():.3g} (standard deviation): it is taken away")
    return stack, record


def _raised(frames: _Frames, level: float) -> _Frames:
    return (np.add(frame, level, dtype=np.float64) for frame in frames)


def _without_idle(stack: Any, parts: InferenceConfig, undo: list[_PutBack], say: Say) -> Any:
    """Leave frames out that are blank, dark or repeat the one before."""
    shown = idle_frames.frames_shown(stack)
    others = idle_frames.without_idle(stack, shown)
    # Of planes in turns one may be blank: without it the others would be out of turn.
    if others is stack or others.shape[0] < 2 or find_planes(stack, parts.planes) is not None:
        return stack
    blank, idle = int((shown < 0).sum()), len(shown) - others.shape[0]
    say(f"{blank} frames are blank or dark, {idle - blank} repeat the one before: they are put back as they were")
    undo.append(partial(idle_frames.put_back, stack=stack, shown=shown))
    return others


def _without_borders(stack: Any, noise: NoiseEstimate, undo: list[_PutBack], say: Say) -> tuple[Any, int]:
    """Replace what registration has filled; in how many frames."""
    stack = borders.without_borders(stack, noise)
    if not isinstance(stack, borders.WithoutBorders):
        return stack, 0
    widest = ", ".join(map(str, stack.borders.widths.max(0)))
    say(
        f"registration has left borders of {stack.borders.fill:g}, up to {widest} pixels wide at the top, bottom, left "
        "and right: they are put back as they were"
    )
    undo.append(partial(borders.put_back, borders=stack.borders))
    return stack, int(stack.borders.widths.any(1).sum())


def _without_constant_edges(stack: Any, undo: list[_PutBack], say: Say) -> tuple[Any, list[int] | None]:
    """Leave out rows and columns that never change; how many at the top, bottom, left and right."""
    inside = borders.without_constant_edges(stack)
    if inside is stack:
        return stack, None
    rows, columns = inside.rows, inside.columns
    widths = [rows.start, stack.shape[1] - rows.stop, columns.start, stack.shape[2] - columns.stop]
    say(
        f"nothing ever changes in {', '.join(map(str, widths))} rows and columns at the top, bottom, left and right: "
        "they are put back as they were"
    )
    undo.append(partial(borders.put_edges_back, first=np.array(stack[0]), rows=rows, columns=columns))
    return inside, widths


def _without_lost_voxels(
    stack: Any, noise: NoiseEstimate, noisy: dict[int, np.ndarray], undo: list[_PutBack], say: Say
) -> tuple[Any, int]:
    """Replace voxels whose data were lost; how many."""
    stack = lost_voxels.without_lost_voxels(stack, noise, noisy)
    if not isinstance(stack, lost_voxels.WithoutLostVoxels):
        return stack, 0
    count = sum(int(lost.sum()) for lost in stack.lost.values())
    say(f"{count} voxels of {len(stack.lost)} frames are as if their data were lost: they are put back as they were")
    undo.append(partial(lost_voxels.put_back, recorded=stack))
    return stack, count


def _without_noise_of_rows(
    stack: Any, noisy: dict[int, np.ndarray], parts: InferenceConfig, say: Say
) -> tuple[Any, tuple[int, ...]]:
    """Draw rows that are far noisier than others towards frames around, for good; in which frames."""
    # Of planes in turns the frames around show something else.
    if not noisy or find_planes(stack, parts.planes) is not None:
        return stack, ()
    steady = noisy_rows.without_noise_of_rows(stack, noisy)
    if steady is stack:
        return stack, ()
    say(
        f"rows of {len(steady.kept)} frames are far noisier than others, and than their brightness explains: they are "
        "drawn towards the frames around. Of activity in these frames alone little is left"
    )
    return steady, tuple(steady.kept)


def _without_spikes(stack: Any, noise: NoiseEstimate, say: Say) -> tuple[Any, int]:
    """Replace voxels that a cosmic ray has hit, for good; how many."""
    stack = spikes.without_spikes(stack, noise)
    count = len(stack.values) if isinstance(stack, spikes.WithoutSpikes) else 0
    if count:
        say(f"{count} voxels are far brighter than all around, as if hit by a cosmic ray: they are replaced")
    return stack, count


def _with_lines_aligned(stack: Any, undo: list[_PutBack], say: Say) -> tuple[Any, float]:
    """Move every other line back to where those between are; by how many pixels."""
    shift = scan_lines.line_shift(stack)
    if not shift:
        return stack, 0.0
    say(
        f"every other line is displaced by {abs(shift):.2g} pixels, as of a bidirectional scan: lines are aligned "
        "before denoising, and displaced again afterwards"
    )
    undo.append(partial(scan_lines.put_back, shift=shift))
    return scan_lines.AlignedLines(stack, shift), shift


def _without_light(stack: Any, undo: list[_PutBack], say: Say) -> tuple[Any, np.ndarray | None]:
    """Take the light of a stimulus away; how much, (T, H)."""
    stack, light = stimulus_light.take_light_away(stack)
    if light is not None:
        say(
            f"rows of {light.any(1).sum()} frames are brighter or darker as a whole, up to {np.abs(light).max():.4g}: "
            "light of a stimulus, it seems, which is taken away before denoising and put back afterwards"
        )
        undo.append(partial(stimulus_light.put_back, light=light))
    return stack, light
