"""The Triton kernels: depth-wise 3x3x3 convolutions that march along time, and LayerNorm over channels.

A program of a convolution owns a tile of one channel's frames, ROWS x THREADS voxels in storage order, and a run of
frames. It loads every frame once with its nine shifts (eight of them come out of the cache) and adds it to the sums
of three frames: the one before it, which is then complete, its own, and the one after it.
Sums that span programs are written as partial sums, so that adding them up gives the same bits every time.
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
def _place(frames, height, width, parts, run, ROWS: tl.constexpr, THREADS: tl.constexpr):
    """Return channel plane, first and last frame, and where the voxels lie in a frame (ROWS, THREADS)."""
    program, tiles = tl.program_id(0), tl.cdiv(height * width, ROWS * THREADS)
    part = program % parts
    first = part // tiles * run
    rows = tl.arange(0, ROWS)[:, None] * THREADS
    at = part % tiles * (ROWS * THREADS) + rows + tl.arange(0, THREADS)[None, :]
    # Shifted loads can not be vectors, so neighbouring voxels belong to neighbouring threads, not to one thread.
    return program // parts, first, tl.minimum(first + run, frames), tl.max_contiguous(at, (1, 1))


@triton.jit
def _inside(at, height, width):
    """Return which voxels have their row above, themselves and their row below inside the frame; columns likewise."""
    row, column = at // width, at % width
    rows = ((row >= 1) & (row <= height), row < height, row < height - 1)
    return rows, (column >= 1, column >= 0, column < width - 1)


@triton.jit
def _nine(center, rows, columns, width):
    """Load the nine voxels around pointers, row by row, zero outside the frame."""
    lines = (center - width, center, center + width)
    nine = ()
    for k in tl.static_range(9):
        mask = rows[k // 3] if k % 3 == 1 else rows[k // 3] & columns[k % 3]
        nine += (tl.load(lines[k // 3] + (k % 3 - 1), mask=mask, other=0.0),)
    return nine


@triton.jit
def _add_frame(before, here, center, taps, rows, columns, width):
    """Add one frame to the sums of the frames before it, at it and after it."""
    after = tl.zeros_like(here)
    nine = _nine(center, rows, columns, width)
    for k in tl.static_range(9):
        before += nine[k] * taps[18 + k]
        here += nine[k] * taps[9 + k]
        after += nine[k] * taps[k]
    return before, here, after


@triton.jit(do_not_specialize=["channels", *_SIZES])
def depthwise(
    x, taps, out, squares, channels, frames, height, width, parts, run,
    SQUARES: tl.constexpr, ROWS: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Convolve x (B*C, T, H, W); with SQUARES, also write each program's sum of squared results."""
    plane, first, last, at = _place(frames, height, width, parts, run, ROWS, THREADS)
    size = tl.cast(height * width, tl.int64)
    rows, columns = _inside(at, height, width)
    x += plane * (frames * size)
    out += plane * (frames * size)
    weights = _taps(taps + plane % channels * 27, False)
    before = tl.zeros((ROWS, THREADS), tl.float32)
    here = tl.zeros((ROWS, THREADS), tl.float32)
    total = tl.zeros((ROWS, THREADS), tl.float32)
    for s in range(tl.maximum(first - 1, 0), tl.minimum(last + 1, frames)):
        before, here, after = _add_frame(before, here, x + s * size + at, weights, rows, columns, width)
        complete = rows[1] & (s > first)
        tl.store(out + (s - 1) * size + at, before, mask=complete)
        if SQUARES:
            total += tl.where(complete, before * before, 0.0)
        before, here = here, after
    complete = rows[1] & (last == frames)  # the last frame has none after it that would complete it
    tl.store(out + (frames - 1) * size + at, before, mask=complete)
    if SQUARES:
        total += tl.where(complete, before * before, 0.0)
        tl.store(squares + tl.program_id(0), tl.sum(tl.sum(total, 0), 0))


@triton.jit(do_not_specialize=["channels", *_SIZES])
def depthwise_backward(
    x, grad, taps, x_grad, tap_sums, channels, frames, height, width, parts, run,
    ROWS: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Write the gradient of x (B*C, T, H, W), and each program's share of the gradient of the taps.

    Both want the same shifts of ``grad``: x_grad[p] sums taps[d] grad[p - d] and taps_grad[d] sums x[p] grad[p - d].
    """
    plane, first, last, at = _place(frames, height, width, parts, run, ROWS, THREADS)
    size = tl.cast(height * width, tl.int64)
    rows, columns = _inside(at, height, width)
    x += plane * (frames * size)
    grad += plane * (frames * size)
    x_grad += plane * (frames * size)
    weights = _taps(taps + plane % channels * 27, True)
    sums = ()
    for _ in tl.static_range(27):
        sums += (tl.zeros((THREADS,), tl.float32),)
    before = tl.zeros((ROWS, THREADS), tl.float32)
    here = tl.zeros((ROWS, THREADS), tl.float32)
    x_before = tl.zeros((ROWS, THREADS), tl.float32)
    x_here = tl.load(x + at, mask=rows[1] & (first == 0), other=0.0)
    for s in range(tl.maximum(first - 1, 0), tl.minimum(last + 1, frames)):
        x_after = tl.load(x + (s + 1) * size + at, mask=rows[1] & (s + 1 < last), other=0.0)
        after = tl.zeros((ROWS, THREADS), tl.float32)
        nine = _nine(grad + s * size + at, rows, columns, width)
        old, sums = sums, ()
        for k in tl.static_range(9):
            g = nine[k]
            before += g * weights[18 + k]
            here += g * weights[9 + k]
            after += g * weights[k]
            sums += (old[3 * k] + tl.sum(g * x_before, 0),)
            sums += (old[3 * k + 1] + tl.sum(g * x_here, 0),)
            sums += (old[3 * k + 2] + tl.sum(g * x_after, 0),)
        tl.store(x_grad + (s - 1) * size + at, before, mask=rows[1] & (s > first))
        before, here = here, after
        x_before, x_here = x_here, x_after
    tl.store(x_grad + (frames - 1) * size + at, before, mask=rows[1] & (last == frames))
    for k in tl.static_range(9):
        for frame in tl.static_range(3):  # a frame of grad before x is a tap that looks back
            tl.store(tap_sums + tl.program_id(0) * 27 + frame * 9 + 8 - k, tl.sum(sums[3 * k + frame], 0))


@triton.jit
def _write_gate(a, b, gated, out_grad, gate_grad, at, value_offset, complete, GRADIENT: tl.constexpr):
    """Write gelu(a) * b, and with GRADIENT what comes back to a and to b."""
    below = 0.5 * (1.0 + tl.erf(a * 0.7071067811865476))
    tl.store(gated + at, a * below * b, mask=complete)
    if GRADIENT:
        slope = below + a * tl.exp(-0.5 * a * a) * 0.3989422804014327
        g = tl.load(out_grad + at, mask=complete, other=0.0)
        tl.store(gate_grad + at, g * b * slope, mask=complete)
        tl.store(gate_grad + value_offset + at, g * a * below, mask=complete)


@triton.jit(do_not_specialize=["hidden", *_SIZES])
def gated_depthwise(
    x, taps, gated, out_grad, gate_grad, hidden, frames, height, width, parts, run,
    GRADIENT: tl.constexpr, ROWS: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Convolve both halves of x (B, 2h, T, H, W) and write gelu(first) * second (B, h, T, H, W).

    With GRADIENT, also turn ``out_grad`` (B, h, …) into ``gate_grad`` (B, 2h, …), that of both convolved halves.
    """
    plane, first, last, at = _place(frames, height, width, parts, run, ROWS, THREADS)
    size = tl.cast(height * width, tl.int64)
    rows, columns = _inside(at, height, width)
    channel = plane % hidden
    gate_plane = plane + plane // hidden * hidden
    value_offset = hidden * (frames * size)
    x += gate_plane * (frames * size)
    gate_grad += gate_plane * (frames * size)
    gated += plane * (frames * size)
    out_grad += plane * (frames * size)
    gate_taps = _taps(taps + channel * 27, False)
    value_taps = _taps(taps + (channel + hidden) * 27, False)
    a0 = tl.zeros((ROWS, THREADS), tl.float32)
    a1 = tl.zeros((ROWS, THREADS), tl.float32)
    b0 = tl.zeros((ROWS, THREADS), tl.float32)
    b1 = tl.zeros((ROWS, THREADS), tl.float32)
    for s in range(tl.maximum(first - 1, 0), tl.minimum(last + 1, frames)):
        frame = x + s * size + at
        a0, a1, a2 = _add_frame(a0, a1, frame, gate_taps, rows, columns, width)
        b0, b1, b2 = _add_frame(b0, b1, frame + value_offset, value_taps, rows, columns, width)
        complete = rows[1] & (s > first)
        _write_gate(a0, b0, gated, out_grad, gate_grad, (s - 1) * size + at, value_offset, complete, GRADIENT)
        a0, a1, b0, b1 = a1, a2, b1, b2
    complete = rows[1] & (last == frames)
    _write_gate(a0, b0, gated, out_grad, gate_grad, (frames - 1) * size + at, value_offset, complete, GRADIENT)


@triton.jit
def _columns(channels, size, CHANNELS: tl.constexpr, VOXELS: tl.constexpr):
    """Return offsets and mask of all channels of VOXELS voxels of one sample, (CHANNELS, VOXELS)."""
    channel = tl.arange(0, CHANNELS)[:, None]
    voxel = tl.program_id(0) * VOXELS + tl.arange(0, VOXELS)[None, :]
    sample = tl.program_id(1).to(tl.int64) * channels
    return (sample + channel) * size + voxel, (channel < channels) & (voxel < size)


@triton.jit
def _center_and_scale(x, mask, channels, EPS: tl.constexpr):
    """Return x without its mean over channels, and 1 / standard deviation (1, VOXELS)."""
    centered = tl.where(mask, x - tl.sum(x, 0)[None, :] / channels, 0.0)
    variance = tl.sum(centered * centered, 0)[None, :] / channels
    return centered, 1.0 / tl.sqrt_rn(variance + EPS)


@triton.jit
def normalize(x, out, channels, size, EPS: tl.constexpr, CHANNELS: tl.constexpr, VOXELS: tl.constexpr):
    """Divide x (B, C, N) by its standard deviation over channels."""
    at, mask = _columns(channels, size, CHANNELS, VOXELS)
    values = tl.load(x + at, mask=mask, other=0.0)
    _, scale = _center_and_scale(values, mask, channels, EPS)
    tl.store(out + at, values * scale, mask=mask)


@triton.jit
def normalize_backward(
    x, grad, residual, out, channels, size, EPS: tl.constexpr, CHANNELS: tl.constexpr, VOXELS: tl.constexpr
):
    """Write the gradient of x from ``grad`` of the normalized x, plus ``residual``; all (B, C, N)."""
    at, mask = _columns(channels, size, CHANNELS, VOXELS)
    values = tl.load(x + at, mask=mask, other=0.0)
    g = tl.load(grad + at, mask=mask, other=0.0)
    centered, scale = _center_and_scale(values, mask, channels, EPS)
    pull = tl.sum(g * values, 0)[None, :] * scale * scale / channels
    passed = tl.load(residual + at, mask=mask, other=0.0)
    tl.store(out + at, passed + scale * (g - centered * pull), mask=mask)
