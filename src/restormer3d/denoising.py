"""One stack from noisy to denoised: what frames share that no cell does is taken away, the rest denoised."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any, get_args

import numpy as np
import torch

from restormer3d.arithmetic import forced_engine, torch_device
from restormer3d.artefacts import changing_noise as changing
from restormer3d.artefacts.movement import Followed, follow_movement
from restormer3d.artefacts.planes import find_planes, in_turns, one_plane, plane_images, with_one_image
from restormer3d.artefacts.set_aside import made_white, set_aside, without_electrical_noise
from restormer3d.artefacts.stimulus_light import steadied, unlit_frames
from restormer3d.artefacts.uneven_noise import EvenNoise, UnevenNoise, put_back, uneven_noise
from restormer3d.config import Method
from restormer3d.fitting import Denoised, by_filter, by_network
from restormer3d.progress import Progress, Say, silent
from restormer3d.settings import Pretrained, Settings
from restormer3d.spool import held, spooled
from restormer3d.stacks import (
    Rounding,
    TiffStack,
    WithoutMissing,
    check_stack,
    finished_frames,
    missing_again,
    too_coarse,
    without_missing,
)


def array_and_record(
    stack: Any,
    chosen: Settings,
    *,
    method: Method = "restormer3d",
    device: str = "auto",
    time_limit: float | None = None,
    pretrained: Pretrained | None = None,
    progress: Progress = silent,
    say: Say = silent,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Denoise a stack of shape (T, H, W) as :func:`restormer3d.workflow.denoise` does, with `chosen` settings.

    `pretrained` are the weights of `chosen`, if the caller has read them already.

    Returns
    -------
    tuple of numpy.ndarray and dict
        The denoised stack, of the same shape and dtype, and what was done, for a sidecar. Where its `level` is not 0,
        it was taken from every voxel before, and normalization and noise are those of the rest; where there is
        `uneven_noise` or `changing_noise`, of intensities divided by the deviation of their noise.
    """
    given = without_missing(stack, check_stack(stack, missing=True))
    seconds = None if time_limit is None else 60 * time_limit
    output = np.empty(stack.shape, stack.dtype)
    with forced_engine(chosen.engine):  # frames are computed as they are asked for
        result = start_denoising(given, chosen, method, torch_device(device), seconds, progress, say, pretrained)
        lost = Rounding()
        finished = finished_frames(result.frames, stack.shape, stack.dtype, lost)
        for t, frame in enumerate(finished if given is stack else missing_again(finished, stack)):
            output[t] = frame
    if coarse := too_coarse(lost.share(), stack.dtype):
        say(coarse)
    return output, result.record


def start_denoising(
    stack: Any,
    chosen: Settings,
    method: Method,
    device: torch.device,
    seconds: float | None,
    progress: Progress,
    say: Say,
    pretrained: Pretrained | None = None,
) -> Denoised:
    """Fit filters and network to a stack, and hand over its denoised frames, still to be computed.

    Parameters
    ----------
    stack : stack of shape (T, H, W)
        Noisy intensities, checked by `stacks.check_stack`; of those that lack some, `stacks.without_missing`.
    chosen : Settings
        Of the recipe; within `arithmetic.forced_engine` of its engine.
    method, pretrained, progress, say
        As for :func:`array_and_record`.
    device : torch.device
        Where to compute.
    seconds : float or None
        For all, frames included. Where they suffice for no network, the Gaussian filter stands in.

    Returns
    -------
    Denoised
        What was done, and the iterator that does the rest.
    """
    check_known("method", method, Method)
    started = time.monotonic()
    missing = stack.count if isinstance(stack, WithoutMissing) else 0
    if missing:
        say(f"{missing} voxels hold no value (NaN): frames are denoised as if they did, and they are left so")
    aside = set_aside(_readable(stack), chosen.inference, say)
    stack, light = aside.stack, aside.light
    denoise_one = partial(_denoise_one, chosen=chosen, method=method, device=device, pretrained=pretrained)
    planes = find_planes(stack, chosen.inference.planes)
    left = None if seconds is None else seconds - (time.monotonic() - started)
    if planes is None or planes.shared:
        images = None
        if planes is not None:
            say(f"the frames show {planes.count} images in turns, as of planes close to one another: kept apart")
            images = plane_images(stack, planes.count)
        denoised = denoise_one(stack, light, images, left, progress, say, drawn=aside.drawn)
    else:
        denoised = _plane_by_plane(denoise_one, stack, light, planes.count, left, progress, say)
    record = (
        denoised.record | aside.record | {"missing": missing, "planes": planes if planes is None else asdict(planes)}
    )
    return replace(denoised, frames=aside.put_back(denoised.frames), record=record)


def check_known(name: str, value: str, known: Any) -> None:
    """Refuse a setting `name` whose value is none of those of a `Literal`, before anything is computed."""
    if value not in get_args(known):
        raise ValueError(f"{name}: expected one of {', '.join(get_args(known))}, got {value!r}")


def _denoise_one(
    stack: Any,
    light: np.ndarray | None,
    images: np.ndarray | None,
    seconds: float | None,
    progress: Progress,
    say: Say,
    *,
    chosen: Settings,
    method: Method,
    device: torch.device,
    pretrained: Pretrained | None,
    drawn: tuple[int, ...] = (),
) -> Denoised:
    """Denoise a stack from which `light` (T, H) was taken; `images` and `drawn` as for :func:`fitting.by_network`."""
    started = time.monotonic()
    stack, as_averaged, correlation = made_white(stack, images, chosen.inference, say)
    stack, electrical = without_electrical_noise(stack, images, light, chosen.inference, say)
    mend, unlit = chosen.inference.mend, unlit_frames(light)
    if light is not None and images is None and (lit := steadied(stack, light)) is not stack:
        say(f"noise of that light is strong in {len(lit.kept)} frames: they are drawn towards those around")
        drawn, stack = tuple(sorted({*drawn, *lit.kept})), lit
        mend = False  # frames that were drawn have other noise
    fading = _changing_noise(stack, unlit, say) if mend and images is None else None
    if fading is not None:  # before frames are moved by parts of pixels, which takes noise away
        stack = changing.SteadyNoise(stack, fading)
    asked = chosen.inference.movement
    followed = Followed(stack, None, images)
    if asked != "none":
        followed = follow_movement(stack, images, jitter=asked == "all", seconds=seconds, progress=progress, say=say)
    stack, images = followed.stack, followed.images
    uneven = _uneven_noise(stack, unlit, images, say) if mend else None
    if uneven is not None:
        stack = EvenNoise(stack, uneven)
        images = None if images is None else uneven.made_even(images, stack.dtype)
    if method != "restormer3d":
        denoised = by_filter(stack, images, chosen, method, progress, say)
    else:
        left = None if seconds is None else seconds - (time.monotonic() - started) - followed.seconds
        denoised = by_network(stack, unlit, images, chosen, device, left, progress, say, pretrained, drawn)
    frames = denoised.frames if uneven is None else put_back(denoised.frames, uneven)
    frames = followed.put_back(frames)
    frames = frames if fading is None else changing.put_back(frames, fading)
    record = denoised.record | {
        "temporal_correlation": correlation,
        **electrical,
        "movement": None if followed.movement is None else followed.movement.record(),
        "uneven_noise": None if uneven is None else uneven.ratio,
        "changing_noise": None if fading is None else fading.ratio,
    }
    return replace(denoised, frames=as_averaged(frames), record=record)


def _uneven_noise(stack: Any, unlit: np.ndarray | None, images: np.ndarray | None, say: Say) -> UnevenNoise | None:
    """Noise that is to be made even."""
    uneven = uneven_noise(with_one_image(stack, images), unlit)
    if uneven is not None:
        say(
            f"noise is {uneven.ratio:.2g} times as strong in some places as in others, and intensities do not tell, as "
            "after a division by a flat field or in dF/F: it is made even before denoising, and put back afterwards"
        )
    return uneven


def _changing_noise(stack: Any, unlit: np.ndarray | None, say: Say) -> changing.ChangingNoise | None:
    """Noise along time that is to be made steady."""
    fading = changing.changing_noise(stack, unlit)
    if fading is not None:
        say(
            f"noise is {fading.ratio:.2g} times as strong at some times as at others, as of tissue that bleaches, or "
            "whose bleaching was made up for: it is made steady before denoising, and put back afterwards"
        )
    return fading


def _plane_by_plane(
    denoise_one: Callable[..., Denoised],
    stack: Any,
    light: np.ndarray | None,
    count: int,
    seconds: float | None,
    progress: Progress,
    say: Say,
) -> Denoised:
    """Denoise planes of different activity one after the other, in what is left of the time.

    `light` (T, H) is what was taken away.
    """
    say(f"the frames show {count} planes in turns, whose activity differs: each is denoised as a stack of its own")
    started = time.monotonic()
    planes = [one_plane(stack, number, count) for number in range(count)]
    changing = [number for number, plane in enumerate(planes) if not _is_constant(plane)]

    def advance(number: int, stage: str, done: int, total: int) -> None:
        progress(f"{stage}, plane {number + 1} of {count}", done, total)

    def tell(number: int, text: str) -> None:
        say(f"plane {number + 1} of {count}: {text}")

    each: list[Denoised] = []
    for number, plane in enumerate(planes):
        if number not in changing:
            tell(number, "every pixel of its frames is the same: it is left as it is")
            each.append(Denoised(iter(plane), {"constant": True}))
            continue
        of_plane = None if light is None else light[number::count]
        left = changing[changing.index(number) :]
        share = None if seconds is None else (seconds - (time.monotonic() - started)) / len(left)
        denoised = denoise_one(plane, of_plane, None, share, partial(advance, number), partial(tell, number))
        # Planes at work at the same time would each hold the memory of a stack.
        each.append(denoised if len(left) == 1 else replace(denoised, frames=_waiting(denoised.frames)))
    records = [denoised.record for denoised in each]
    changed = [record for record in records if record != {"constant": True}] or records
    common = {name: value for name, value in changed[0].items() if all(other.get(name) == value for other in changed)}
    notes = [record["instead_of_the_network"] for record in changed if "instead_of_the_network" in record]
    record = common | {"each_plane": records} | ({"instead_of_the_network": notes[0]} if notes else {})
    return Denoised(in_turns([denoised.frames for denoised in each]), record)


def _waiting(frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Compute all frames now, and give them back one by one."""
    return (frame for (frame,) in spooled([frames]))


def _is_constant(stack: Any) -> bool:
    """Whether all voxels are the same; of others, little more than the first frame is read."""
    first = stack[0].flat[0]
    return all((frame == first).all() for frame in stack)


def _readable(stack: Any) -> Any:
    """A file whose frames have to be decoded as an array, where there is room: each would be decoded many times."""
    if isinstance(stack, WithoutMissing):
        return replace(stack, stack=_readable(stack.stack))
    if not isinstance(stack, TiffStack) or stack.layout.data_offsets is not None:
        return stack
    values = held(stack)
    return stack if values is None else values
