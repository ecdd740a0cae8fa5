"""When the strongest activity of a field is: courses in time, denoised once more by a small network.

Once footprints are denoised, each frame's projection onto them tells of the field's activity with the noise of one
pixel. Filters along time smooth it, and take away from the peaks of events; a network that has seen how indicators rise
and decay does not have to. A cell's events are in several of a field's courses, which therefore tell of one another.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from restormer3d.activity.fields import MOST, Fields, change_fields, misfit, trust
from restormer3d.activity.principal import leading_components
from restormer3d.activity.smoothing import smoothed
from restormer3d.arithmetic import float32_products
from restormer3d.unets import CourseNetwork

_LONG_STACKS = 48  # courses of a field at most, in stacks of so many frames for each:
_FRAMES_EACH = 5
_TURNS = 40  # passes to find how components have to be turned
_FAST = 21  # frames of a moving mean; what is left of it changes fast
_NOISE_LEFT = 0.1  # variance of a course's noise after some smoothing
_SURE_FRAMES = 95.0  # frames that tell how much a course varies to the variance of its noise; more do by their square
_MOST_LOST = 1.0  # deviations of noise, that an event may have lost: of light a hundred times as strong nothing is
_MOST_VARIED = 2.25  # times the variance of what was denoised
_SHARED = (1.2, 1.5)  # variance along a direction, relative to that of independent noise: own below, shared beyond
_USUAL_EXCESS = 1.5  # of noise, up to which it need not be explained
_MAYBE_NOISE = 4.0  # variance of a denoised course, in units of the noise's, up to which it may be noise
_AROUND_FRAME = 2.0  # deviation in frames of a Gaussian filter, over which it is looked at what was left out
_LEFT_EXCESS = 3.0  # energy of noise that it must exceed there, for part of it to be put back
_LARGEST_NOISE = 4.0  # deviations, of what denoising has left: what is beyond is light, or a cosmic ray
_LARGEST_CHANGE = 6.0  # deviations of the expected noise, that count of a difference of two recorded frames
_LARGEST_STEP = 4.0  # deviations of noise, of which a difference of two frames has 1.4; what is beyond is not noise
_NORMAL_MEDIAN = 0.4549364  # of the square of a normal number of variance 1


@torch.no_grad()
def denoise_courses(
    denoised: Tensor, noisy: Tensor, noise: Tensor, deviation: Tensor, network: CourseNetwork
) -> Tensor:
    """Denoise the courses of the strongest activity of denoised frames, field by field.

    Parameters
    ----------
    denoised, noisy : Tensor
        Frames (T, H, W) of the same intensities, up to an image that all frames share; at least two.
    noise : Tensor
        Drawn like that of the noisy frames, (T, H, W).
    deviation : Tensor
        Of the noise, (H, W).
    network : CourseNetwork
        On the device of the frames.

    Returns
    -------
    Tensor
        Frames (T, H, W) with the mean over time of `denoised`.
    """
    most = min(max(MOST, len(denoised) // _FRAMES_EACH), _LONG_STACKS)

    def change(fields: Fields) -> Tensor:
        footprints = sparse_footprints(fields.denoised, most)
        clear, recorded, drawn = (x.flatten(2) @ footprints for x in fields[:3])
        scale, excess = course_noise(clear, recorded, drawn)
        lines = [x / scale for x in (recorded, clear, strength_of(clear))]
        own = independent_noise(lines[0] - lines[1])
        weights = weights_of_others(lines[1]) * trust(excess) * own
        better = as_varied(apply_network(network, *lines, weights=weights), lines[0], own)
        far = misfit(*(x.mT for x in (lines[0], lines[1], better))).unsqueeze(1)
        better = lines[1] + (better - lines[1]) * trust(excess) * trust(far)
        apart = (fields.noisy - fields.denoised).flatten(2).square() @ footprints.square()
        better += what_is_left_out(lines[0] - better, lines[1], apart)
        by_course = (better - lines[1]) * scale
        by_course -= by_course.mean(1, keepdim=True)
        return (by_course @ footprints.mT).view_as(fields.denoised)

    return change_fields(denoised, noisy, noise, deviation, change)


def sparse_footprints(denoised: Tensor, most: int = MOST) -> Tensor:
    """Orthonormal footprints (fields, pixels, footprints) of the strongest activity in fields (fields, T, H, W).

    Principal components, `most` at most, turned among one another so that each has few bright pixels, by the sum of
    fourth powers (quartimax): a cell's events are then in one course, and neuropil in others. The bright pixels are
    positive.

    References
    ----------
    Neuhaus and Wrigley, "The quartimax method", British Journal of Statistical Psychology 1954.
    """
    _, components = leading_components(denoised.flatten(2), most)
    footprints = components.double()
    turn = torch.eye(footprints.shape[2], dtype=torch.float64, device=footprints.device).expand(len(footprints), -1, -1)
    for _ in range(_TURNS):
        # Not on a GPU, whose solver is made for larger matrices.
        left, _, right = torch.linalg.svd((footprints.mT @ (footprints @ turn).pow(3)).cpu())
        turn = (left @ right).to(footprints)
    turned = footprints @ turn
    return (turned * turned.pow(3).sum(1, keepdim=True).sign()).float()


def course_noise(denoised: Tensor, noisy: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Deviation of the noise of courses (fields, T, courses), and its variance relative to the expected one.

    Both (fields, 1, courses). By the median difference of frames of what denoising has left, that events have no part
    in, unless noise is weaker than what is left of them. Of courses that are far stronger than noise, and that alone,
    more is excess only as far as changes of the recorded one turn back in the next frame: those of signal go on. The
    deviation is never below the expected one.
    """
    expected = noise.square().mean(1, keepdim=True).clamp(min=1e-12)
    steps = (noisy - denoised).diff(dim=1).square().median(1, keepdim=True).values
    excess = steps / (2 * _NORMAL_MEDIAN) / expected
    limit = _LARGEST_CHANGE * expected.sqrt()
    changes = noisy.diff(dim=1).clamp(-limit, limit)
    white = -(changes[:, 1:] * changes[:, :-1]).sum(1, keepdim=True) / len(changes[0]) / expected
    white = white.clamp(min=_USUAL_EXCESS)
    excess -= far_from_noise(denoised / expected.sqrt()) * (excess - white).clamp(min=0)
    return (expected * excess.clamp(min=1)).sqrt(), excess


def far_from_noise(denoised: Tensor) -> Tensor:
    """How far courses (fields, T, courses) in deviations of their noise are from it: 0 to 1, (fields, 1, courses).

    Weak ones may be directions of the noise itself, of which denoising has left the slow part.
    """
    return (1 - _MAYBE_NOISE / denoised.var(1, keepdim=True).clamp(min=1e-12)).clamp(min=0)


def what_is_left_out(left: Tensor, denoised: Tensor, apart: Tensor) -> Tensor:
    """What of the rest of strong courses exceeds, there and then, noise as the pixels have it one by one.

    Filters and network have learnt from events not much stronger than noise: of stronger ones, bursts of all tissue or
    light that lasts, they leave more than noise. All pixels of a footprint do the same then, and what they add up to is
    larger than the sum of their squares; of noise, which is also stronger in brighter frames, both are the same.

    Parameters
    ----------
    left, denoised : Tensor
        What denoising has left of courses (fields, T, courses), and the denoised ones, in deviations of the noise.
    apart : Tensor
        What it has left of pixels, squared and weighted by the squares of the footprints, (fields, T, courses).

    Returns
    -------
    Tensor
        To be added to the denoised ones, (fields, T, courses).
    """
    energy, of_noise = (smoothed(x, _AROUND_FRAME) for x in (left.square(), apart.clamp(min=1)))
    return far_from_noise(denoised) * (1 - _LEFT_EXCESS * of_noise / energy.clamp(min=1e-12)).clamp(min=0) * left


def independent_noise(left: Tensor) -> Tensor:
    """Whether each course of a field has noise of its own: from 1 to 0, (fields, 1, 1).

    Flicker and electrical ripple are in many courses at once, and then one must not tell of another. `left` is what
    denoising has left of courses (fields, T, courses), in deviations of their noise. The variance of its differences of
    frames along their principal directions is compared with the most that independent noise has in so many courses and
    frames. What a few frames share, such as the edges of light that lasts, counts little.

    References
    ----------
    Marchenko and Pastur, "Distribution of eigenvalues for some sets of random matrices", Mathematics of the
    USSR-Sbornik 1967.
    """
    steps = left.diff(dim=1).clamp(-_LARGEST_STEP, _LARGEST_STEP).double()
    _, directions = torch.linalg.eigh(steps.mT @ steps)
    along = (steps @ directions).clamp(-_LARGEST_STEP, _LARGEST_STEP)
    variance = along.square().mean(1).amax(1) / 2
    most = (1 + math.sqrt(steps.shape[2] / steps.shape[1])) ** 2
    return ((_SHARED[1] - variance / most) / (_SHARED[1] - _SHARED[0])).clamp(0, 1).to(left)[:, None, None]


def strength_of(denoised: Tensor) -> Tensor:
    """How strong the activity of a frame is: the norm over all courses (fields, T, courses), the same for each."""
    return denoised.norm(dim=2, keepdim=True).expand_as(denoised)


def weights_of_others(denoised: Tensor) -> Tensor:
    """Weights of the others in an estimate of each of the courses (fields, T, courses), (fields, courses, courses).

    Row k holds the weights of the other courses in the linear estimate of the fast changes of course k that has the
    least squared error, by the covariance of the denoised ones, in deviations of the noise.
    """
    fast = fast_changes(denoised).mT.double()
    covariance = fast @ fast.mT / fast.shape[2]
    each = torch.eye(covariance.shape[1], dtype=torch.float64, device=covariance.device)
    weights = torch.linalg.solve(covariance + _NOISE_LEFT * each, covariance)
    return (weights * (1 - each)).to(denoised)


def fast_changes(x: Tensor) -> Tensor:
    """What a moving mean leaves of courses (fields, T, courses)."""
    padded = F.pad(x.mT, (_FAST // 2, _FAST // 2), mode="replicate")
    return x - F.avg_pool1d(padded, _FAST, 1).mT


def as_varied(denoised: Tensor, noisy: Tensor, own: Tensor | float = 1.0) -> Tensor:
    """Let fast changes of denoised courses vary as much as those of the true ones must.

    Estimates of least error vary less than what they estimate: where noise hides a part of the events, all come out too
    low, by a part of the noise. How much the true courses vary is known from what the noisy ones do beyond their noise,
    in a short recording less well. To vary as much takes back about half of what events have lost, for a fraction of
    the error that it would cost to have them right.

    Parameters
    ----------
    denoised, noisy : Tensor
        Courses (fields, T, courses) in deviations of the noise.
    own : Tensor or float
        How far that noise is each course's own, from 0 to 1, (fields, 1, 1); how strong shared noise is, is not known.

    References
    ----------
    Louis, "Estimating a population of parameter values using Bayes and empirical Bayes methods", Journal of the
    American Statistical Association 1984.
    """
    changes = fast_changes(denoised)
    varied = changes.square().mean(1, keepdim=True)
    left = fast_changes((noisy - denoised).clamp(-_LARGEST_NOISE, _LARGEST_NOISE))
    known = (changes + left).square().mean(1, keepdim=True) - (1 - 1 / _FAST)
    unsure = (_SURE_FRAMES / denoised.shape[1]) ** 2
    factor = ((known + unsure) / (varied + unsure)).clamp(1, _MOST_VARIED).sqrt()
    return denoised + own * ((factor - 1) * changes).clamp(-_MOST_LOST, _MOST_LOST)


def apply_network(network: CourseNetwork, noisy: Tensor, denoised: Tensor, strength: Tensor, weights: Tensor) -> Tensor:
    """Denoise courses (fields, T, courses) in deviations of their noise; `weights` are those of the others."""
    frames = denoised.shape[1]
    padded = [F.pad(x.mT, (0, -frames % 4), mode="replicate") for x in (noisy, denoised, strength)]
    with float32_products("fp32"):
        return network(*padded, weights)[..., :frames].mT
