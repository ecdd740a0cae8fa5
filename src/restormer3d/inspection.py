"""What a stack is before anything is done to it, in numbers and in lines of text."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from restormer3d.activity.tiles import tile_places, tile_shape
from restormer3d.artefacts.changing_noise import SteadyNoise, changing_noise
from restormer3d.artefacts.movement import field_movement
from restormer3d.artefacts.planes import find_planes, of_one_image
from restormer3d.artefacts.set_aside import made_white, set_aside, without_electrical_noise
from restormer3d.artefacts.stimulus_light import steadied, unlit_frames
from restormer3d.artefacts.uneven_noise import uneven_noise
from restormer3d.inference import window_size
from restormer3d.noise import blind_spot_extent, estimate_noise
from restormer3d.normalization import estimate_normalization, sampled_percentiles
from restormer3d.settings import settings, training_plan
from restormer3d.stacks import check_stack, open_stack, without_missing


def inspect(path: str | Path) -> dict[str, Any]:
    """What a stack is, what its noise is like, and what `denoise` would do with it.

    Parameters
    ----------
    path : path
        A TIFF file.

    Returns
    -------
    dict
        File, shape, dtype, axes, size, percentiles, normalization, missing voxels, planes recorded in turns, frames
        that are blank, dark or repeats, frames whose borders registration has filled, rows and columns that never
        change, voxels whose data were lost, frames far noisier than others, voxels that a cosmic ray has hit, how far
        every other line is displaced, frames lit by a stimulus, how far noise goes on from frame to frame, what
        electrical ripple and noise of frames and rows add, how the field moves, how uneven noise is, noise (photon
        transfer, correlation) and blind spot.

    Raises
    ------
    StackError
        If the file is not a stack that can be denoised.
    """
    with open_stack(path) as stack:
        check = check_stack(stack, missing=True)
        given = without_missing(stack, check)
        parts = settings().inference
        aside = set_aside(given, parts)
        light, level = aside.light, aside.record["level"]
        planes = find_planes(aside.stack)
        alone = planes is None or not planes.shared
        seen, correlation = of_one_image(aside.stack, planes), 0.0
        if alone:
            seen, _, correlation = made_white(seen, None, parts)
        lit = light
        if light is not None and planes is not None and not planes.shared:
            lit = light[:: planes.count]
        seen, electrical = without_electrical_noise(seen, None, lit, parts)
        before = seen
        if lit is not None and alone:
            seen = steadied(seen, lit)
        moving = field_movement(seen, jitter=False)
        fading = uneven = None
        if seen is before:  # frames that were drawn towards others have other noise
            fading = changing_noise(seen, unlit_frames(lit)) if alone else None
            uneven = uneven_noise(seen if fading is None else SteadyNoise(seen, fading), unlit_frames(lit))
        noise = estimate_noise(seen, frames=unlit_frames(lit))
        range_of = estimate_normalization(seen)
        percentiles = (0.5, 50.0, 99.5)
        values = sampled_percentiles(given, percentiles)
        return {
            "file": str(path),
            "shape": stack.shape,
            "dtype": str(stack.dtype),
            "axes": stack.axes,
            "note": stack.note,
            "megabytes": stack.nbytes / 1e6,
            "minimum": check.minimum,
            "maximum": check.maximum,
            "percentiles": dict(zip(percentiles, values, strict=True)),
            "normalization": {"low": range_of.low + level, "high": range_of.high + level},
            "missing": check.missing,
            "planes": None if planes is None else asdict(planes),
            "idle_frames": aside.record["idle_frames"],
            "filled_borders": aside.record["filled_borders"],
            "constant_edges": aside.record["constant_edges"],
            "lost_voxels": aside.record["lost_voxels"],
            "noisy_frames": aside.record["noisy_frames"],
            "spikes": aside.record["spikes"],
            "line_shift": aside.record["line_shift"],
            "lit_frames": 0 if light is None else int(light.any(1).sum()),
            "temporal_correlation": correlation,
            **electrical,
            "movement": None if moving is None else moving.record(),
            "uneven_noise": None if uneven is None else uneven.ratio,
            "changing_noise": None if fading is None else fading.ratio,
            "noise": asdict(noise) | {"offset": noise.offset + level},
            "blind_spot": blind_spot_extent(noise),
        }


def describe(facts: dict[str, Any]) -> str:
    """Say in lines of text what :func:`inspect` found and what `denoise` would do by default."""
    noise, extent = facts["noise"], facts["blind_spot"]
    chosen = settings()
    photons = noise["photons_per_pixel"]
    wide = " x ".join(str(2 * reach + 1) for reach in extent)
    seen = {axis: f"{noise['correlation'][axis][0]:.2f}" for axis in "xyt"}
    frames, height, width = facts["shape"]
    tile = tile_shape(facts["shape"], chosen.inference)
    window = " x ".join(map(str, window_size(tile, chosen.inference)))
    tiles = len(tile_places(facts["shape"], tile))
    in_tiles = f"in {tiles} tiles of {tile[1]} x {tile[2]} pixels, " * (tiles > 1)
    rows = {
        "file": facts["file"],
        "stack": f"{frames} frames of {height} x {width}, {facts['dtype']}, axes {facts['axes']}",
        "note": facts["note"],
        "size": f"{facts['megabytes']:.1f} MB of voxels",
        "intensities": f"{_shown(facts['minimum'])} to {_shown(facts['maximum'])}; percentiles "
        + ", ".join(f"{p:g} %: {_shown(value)}" for p, value in facts["percentiles"].items()),
        "missing": f"{facts['missing']} voxels hold no value (NaN): they stay so" * bool(facts["missing"]),
        "light": f"rows of {facts['lit_frames']} frames are brighter or darker as a whole, as if lit by a stimulus"
        * bool(facts["lit_frames"]),
        "idle": f"{facts['idle_frames']} frames are blank, dark or repeat the one before: they stay as they are"
        * bool(facts["idle_frames"]),
        "borders": f"filled by registration in {facts['filled_borders']} frames: they stay as they are"
        * bool(facts["filled_borders"]),
        "edges": "{}, {}, {} and {} rows and columns at the top, bottom, left and right never change: they stay".format(
            *facts["constant_edges"] or [0] * 4
        )
        * bool(facts["constant_edges"]),
        "lost": f"{facts['lost_voxels']} voxels are as if their data were lost: they stay as they are"
        * bool(facts["lost_voxels"]),
        "noisy frames": f"rows of {facts['noisy_frames']} are far noisier than others: drawn towards those around"
        * bool(facts["noisy_frames"]),
        "spikes": f"{facts['spikes']} voxels are as if hit by a cosmic ray: they are replaced" * bool(facts["spikes"]),
        "lines": f"every other one is displaced by {abs(facts['line_shift']):.2g} pixels: aligned, and put back"
        * bool(facts["line_shift"]),
        "planes": _planes_in_words(facts["planes"]),
        "averaging": f"noise goes on along time, correlated by {facts['temporal_correlation']:.2g}: made white"
        * bool(facts["temporal_correlation"]),
        "ripple": f"electrical waves of {facts['ripple']:.3g} (standard deviation): they are taken away"
        * bool(facts["ripple"]),
        "level noise": f"pixels of a frame share {facts['level_noise']:.3g} (standard deviation): it is taken away"
        * bool(facts["level_noise"]),
        "row noise": f"pixels of a row share {facts['row_noise']:.3g} of it (standard deviation): it is taken away"
        * bool(facts["row_noise"]),
        "movement": _movement_in_words(facts["movement"]),
        "uneven noise": f"{facts['uneven_noise'] or 1:.2g} times as strong in some places as in others: made even"
        * bool(facts["uneven_noise"]),
        "changing noise": f"{facts['changing_noise'] or 1:.2g} times as strong at some times as at others: made steady"
        * bool(facts["changing_noise"]),
        "gain": f"{noise['gain']:.4g} per photon (photon transfer, from differences of frames)",
        "read noise": f"{noise['read_noise_variance'] ** 0.5:.4g} (standard deviation); "
        f"offset {_shown(noise['offset'])}",
        "photons": "not known: the noise does not grow with the signal"
        if photons is None
        else f"{photons:.3g} per pixel and frame (median)",
        "noise at lag 1": f"x {seen['x']}, y {seen['y']}, t {seen['t']} (correlation; 0 is white)",
        "blind spot": f"{wide} voxels (frames x rows x columns)" + " because neighbors are correlated" * any(extent),
        "denoise would": f"normalize to {' .. '.join(map(_shown, facts['normalization'].values()))}, run "
        f"{training_plan(chosen)} {in_tiles}in windows of {window} with "
        f"{chosen.inference.overlap_t:.0%} overlap, and write {facts['dtype']} of the same shape",
    }
    return "\n".join(f"{name:>15}: {text}" for name, text in rows.items() if text)


def _shown(intensity: float) -> str:
    """All digits before the point: of large ones the last may be the signal."""
    return f"{intensity:.{10 if abs(intensity) >= 1e5 else 5}g}"


def _movement_in_words(movement: dict[str, Any] | None) -> str:
    if movement is None:
        return ""
    followed = "frames follow it" if any(movement["followed_up_to"]) else "jitter that no frame around foretells"
    bent = ", parts of it {:.2g} and {:.2g} against one another".format(*movement["non_rigid"])
    moves = "{:.2g} pixels along y, {:.2g} along x (standard deviation)".format(*movement["deviation"])
    return f"{moves}{bent * any(movement['non_rigid'])}: {followed}"


def _planes_in_words(planes: dict[str, Any] | None) -> str:
    if planes is None:
        return ""
    alike = "close to one another" if planes["shared"] else "of different activity, denoised apart"
    return f"{planes['count']} in turns, frame by frame, {alike}"
