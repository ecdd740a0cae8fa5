"""Triton kernels of depth-wise 3x3x3 convolutions that march along time.

A program of a convolution owns LANES columns of one channel's frames, each of ROWS voxels below one another, and a run
of frames. It loads every frame once, each voxel with its left and right neighbour, so that a voxel serves three rows
out of registers, and adds it to the sums of three frames: the one before it, which is then complete, its own, and the
one after it. Sums that span programs are written as partial sums, so that adding them up gives the same bits every
time.
"""

# The type checker sees tensors and classes where Triton's compiler sees pointers, scalars and loops.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportIndexIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

_SIZES = ["frames", "height", "width", "parts", "run"]  # one compiled kernel serves all of them


@triton.jit
def _taps(pointer, REVERSE: tl.constexpr):
    """Load the 27 taps of a channel, to be kept in registers."""
    taps = ()
    for i in tl.static_range(27):
        taps += (tl.load(pointer + (26 - i if REVERSE else i)),)
    return taps


@triton.jit
def _place(frames, height, width, parts, run, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Return channel plane, first and last frame, and each lane's first row and its column (LANES,)."""
    program = tl.program_id(0)
    tiles = tl.cdiv(tl.cdiv(height, ROWS) * width, LANES)
    part = program % parts
    first = part // tiles * run
    lane = part % tiles * LANES + tl.arange(0, LANES)
    return (program // parts).to(tl.int64), first, tl.minimum(first + run, frames), lane // width * ROWS, lane % width


@triton.jit
def _window(frame, top, column, height, width, ROWS: tl.constexpr):
    """Load ROWS + 2 rows around the pointers `frame`, each voxel with both neighbours; zero outside the frame."""
    voxels = ()
    for j in tl.static_range(ROWS + 2):
        row = top + (j - 1)
        inside = (row >= 0) & (row < height)
        line = frame + (j - 1) * width
        voxels += (tl.load(line - 1, mask=inside & (column >= 1), other=0.0),)
        voxels += (tl.load(line, mask=inside, other=0.0),)
        voxels += (tl.load(line + 1, mask=inside & (column < width - 1), other=0.0),)
    return voxels


@triton.jit
def _rows(frame, top, height, width, also, ROWS: tl.constexpr):
    """Load the ROWS voxels at the pointers `frame`; zero outside the frame, or all of them unless `also`."""
    voxels, row = (), tl.where(also, top, height)
    for r in tl.static_range(ROWS):
        voxels += (tl.load(frame + r * width, mask=row + r < height, other=0.0),)
    return voxels


@triton.jit
def _store_rows(frame, values, top, height, width, complete, ROWS: tl.constexpr):
    """Store ROWS voxels at the pointers `frame`, if they are complete."""
    row = tl.where(complete, top, height)
    for r in tl.static_range(ROWS):
        tl.store(frame + r * width, values[r], mask=row + r < height)


@triton.jit
def _zeros(COUNT: tl.constexpr, LANES: tl.constexpr):
    """Return COUNT sums of nothing."""
    sums = ()
    for _ in tl.static_range(COUNT):
        sums += (tl.zeros((LANES,), tl.float32),)
    return sums


@triton.jit
def _add_taps(sums, voxels, taps, FRAME: tl.constexpr, ROWS: tl.constexpr):
    """Add a frame's share, through the nine taps from FRAME on, to the sums of ROWS voxels."""
    added = ()
    for r in tl.static_range(ROWS):
        total = sums[r]
        for k in tl.static_range(9):
            total += voxels[3 * r + k] * taps[FRAME + k]
        added += (total,)
    return added


@triton.jit(do_not_specialize=["channels", *_SIZES])
def depthwise(
    x, taps, out, squares, channels, frames, height, width, parts, run,
    SQUARES: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Convolve x (B*C, T, H, W); with SQUARES, also write each program's sum of squared results."""
    plane, first, last, top, column = _place(frames, height, width, parts, run, ROWS, LANES)
    size = tl.cast(height * width, tl.int64)
    at = top * width + column
    x += plane * (frames * size)
    out += plane * (frames * size)
    weights = _taps(taps + plane % channels * 27, False)
    nothing = _zeros(ROWS, LANES)
    before, here, total = nothing, nothing, tl.zeros((LANES,), tl.float32)
    start, stop = tl.maximum(first - 1, 0), tl.minimum(last + 1, frames)
    following = _window(x + start * size + at, top, column, height, width, ROWS)
    for s in range(start, stop):
        voxels = following  # the next ones are on their way while these are summed
        following = _window(x + tl.minimum(s + 1, stop - 1) * size + at, top, column, height, width, ROWS)
        before = _add_taps(before, voxels, weights, 18, ROWS)
        complete = s > first
        _store_rows(out + (s - 1) * size + at, before, top, height, width, complete, ROWS)
        if SQUARES:
            total += _squares(before, top, height, complete, ROWS)
        before = _add_taps(here, voxels, weights, 9, ROWS)
        here = _add_taps(nothing, voxels, weights, 0, ROWS)
    complete = last == frames  # the last frame has none after it that would complete it
    _store_rows(out + (frames - 1) * size + at, before, top, height, width, complete, ROWS)
    if SQUARES:
        total += _squares(before, top, height, complete, ROWS)
        tl.store(squares + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def _squares(values, top, height, complete, ROWS: tl.constexpr):
    """Add up the squares of ROWS voxels, if they are complete."""
    total, row = tl.zeros_like(values[0]), tl.where(complete, top, height)
    for r in tl.static_range(ROWS):
        total += tl.where(row + r < height, values[r] * values[r], 0.0)
    return total


@triton.jit(do_not_specialize=["channels", *_SIZES])
def depthwise_backward(
    x, grad, taps, x_grad, tap_sums, channels, frames, height, width, parts, run,
    ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Write the gradient of x (B*C, T, H, W), and each program's share of the gradient of the taps.

    Both want the same shifts of ``grad``: x_grad[p] sums taps[d] grad[p - d] and taps_grad[d] sums x[p] grad[p - d].
    """
    plane, first, last, top, column = _place(frames, height, width, parts, run, ROWS, LANES)
    size = tl.cast(height * width, tl.int64)
    at = top * width + column
    x += plane * (frames * size) + at
    grad += plane * (frames * size) + at
    x_grad += plane * (frames * size) + at
    weights = _taps(taps + plane % channels * 27, True)
    nothing = _zeros(ROWS, LANES)
    before, here, x_before, sums = nothing, nothing, nothing, _zeros(27, LANES)
    x_here = _rows(x, top, height, width, first == 0, ROWS)
    start, stop = tl.maximum(first - 1, 0), tl.minimum(last + 1, frames)
    x_after = _rows(x + (start + 1) * size, top, height, width, start + 1 < last, ROWS)
    following = _window(grad + start * size, top, column, height, width, ROWS)
    for s in range(start, stop):
        voxels = following  # the next ones are on their way while these are summed
        following = _window(grad + tl.minimum(s + 1, stop - 1) * size, top, column, height, width, ROWS)
        x_next = _rows(x + (s + 2) * size, top, height, width, s + 2 < last, ROWS)
        before = _add_taps(before, voxels, weights, 18, ROWS)
        _store_rows(x_grad + (s - 1) * size, before, top, height, width, s > first, ROWS)
        before = _add_taps(here, voxels, weights, 9, ROWS)
        here = _add_taps(nothing, voxels, weights, 0, ROWS)
        sums = _add_products(sums, voxels, x_before, x_here, x_after, ROWS)
        x_before, x_here, x_after = x_here, x_after, x_next
    _store_rows(x_grad + (frames - 1) * size, before, top, height, width, last == frames, ROWS)
    number = tl.arange(0, 32)
    # A frame of grad before x is a tap that looks back; what was added up is in the order of the reversed taps.
    tl.store(tap_sums + tl.program_id(0) * 27 + 26 - number, tl.sum(_side_by_side(sums, LANES), 0), mask=number < 27)


@triton.jit
def _add_products(sums, voxels, x_before, x_here, x_after, ROWS: tl.constexpr):
    """Add the products of x with the shifts of grad to the 27 sums, in the order of the reversed taps."""
    added = ()
    for frame in tl.static_range(3):
        x = x_after if frame == 0 else x_here if frame == 1 else x_before
        for k in tl.static_range(9):
            total = sums[9 * frame + k]
            for r in tl.static_range(ROWS):
                total += x[r] * voxels[3 * r + k]
            added += (total,)
    return added


@triton.jit
def _side_by_side(sums, LANES: tl.constexpr):
    """Put 27 tensors (LANES,) and five of zeros side by side, (LANES, 32): they can be added up in one go."""
    pairs = _joined(_joined(_joined(_joined(_joined(sums + _zeros(5, LANES), 16), 8), 4), 2), 1)
    return tl.reshape(pairs[0], (LANES, 32))


@triton.jit
def _joined(parts, HALF: tl.constexpr):
    """Join every tensor of the first half with its like in the second."""
    joined = ()
    for i in tl.static_range(HALF):
        joined += (tl.join(parts[i], parts[i + HALF]),)
    return joined


@triton.jit
def below(x):
    """Share of a normal distribution that lies below x: GELU is x times it."""
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _store_gated(frame, a, b, top, height, width, complete, ROWS: tl.constexpr):
    """Store gelu(a) * b of ROWS voxels at the pointers `frame`, if they are complete."""
    gated = ()
    for r in tl.static_range(ROWS):
        gated += (a[r] * below(a[r]) * b[r],)
    _store_rows(frame, gated, top, height, width, complete, ROWS)


@triton.jit(do_not_specialize=["hidden", *_SIZES])
def gated_depthwise(x, taps, gated, hidden, frames, height, width, parts, run, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Convolve both halves of x (B, 2h, T, H, W) and write gelu(first) * second (B, h, T, H, W)."""
    plane, first, last, top, column = _place(frames, height, width, parts, run, ROWS, LANES)
    size = tl.cast(height * width, tl.int64)
    at = top * width + column
    channel = plane % hidden
    value_offset = hidden * (frames * size)
    x += (plane + plane // hidden * hidden) * (frames * size) + at
    gated += plane * (frames * size) + at
    gate_taps = _taps(taps + channel * 27, False)
    value_taps = _taps(taps + (channel + hidden) * 27, False)
    nothing = _zeros(ROWS, LANES)
    a0, a1, b0, b1 = nothing, nothing, nothing, nothing
    start, stop = tl.maximum(first - 1, 0), tl.minimum(last + 1, frames)
    following = _window(x + start * size, top, column, height, width, ROWS)
    for s in range(start, stop):
        # One half's voxels are on their way while the other's are summed.
        voxels = following
        values = _window(x + s * size + value_offset, top, column, height, width, ROWS)
        a0 = _add_taps(a0, voxels, gate_taps, 18, ROWS)
        a1 = _add_taps(a1, voxels, gate_taps, 9, ROWS)
        a2 = _add_taps(nothing, voxels, gate_taps, 0, ROWS)
        following = _window(x + tl.minimum(s + 1, stop - 1) * size, top, column, height, width, ROWS)
        b0 = _add_taps(b0, values, value_taps, 18, ROWS)
        b1 = _add_taps(b1, values, value_taps, 9, ROWS)
        b2 = _add_taps(nothing, values, value_taps, 0, ROWS)
        _store_gated(gated + (s - 1) * size, a0, b0, top, height, width, s > first, ROWS)
        a0, a1, b0, b1 = a1, a2, b1, b2
    _store_gated(gated + (frames - 1) * size, a0, b0, top, height, width, last == frames, ROWS)
