"""Triton kernels for what mixes channels: matrix products, and LayerNorm and the gate where they meet one.

Matrices are small, and what they are multiplied with is long: (rows, inner) @ (B, inner, N). LayerNorm's weight scales
the columns of a matrix and its divisor the voxels of the product, so that nothing normalized is ever stored.
Tensor cores round what they add up toward zero: over a long sum that is a bias of 1e-5. Products of 32 (of 64 where
that is all) are therefore summed there and added to the rest outside; `one`, which the compiler does not know to be 1,
keeps it from merging both.
"""

# The type checker sees tensors and classes where Triton's compiler sees pointers, scalars and loops.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportIndexIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false, reportPossiblyUnboundVariable=false

from __future__ import annotations

import triton
import triton.language as tl

from restormer3d.ops.cuda.convolution import below


@triton.jit
def _channel(number, half, gap):
    """Where a row lies in memory: from `half` on, `gap` rows further, as a head's keys are from its queries."""
    return number + tl.where(number >= half, gap, 0)


@triton.jit
def _columns(channels, size, CHANNELS: tl.constexpr, VOXELS: tl.constexpr):
    """Return offsets and mask of all channels of VOXELS voxels of one sample, (CHANNELS, VOXELS)."""
    channel = tl.arange(0, CHANNELS)[:, None]
    voxel = tl.program_id(0) * VOXELS + tl.arange(0, VOXELS)[None, :]
    sample = tl.program_id(1).to(tl.int64) * channels
    return (sample + channel) * size + voxel, (channel < channels) & (voxel < size)


@triton.jit
def _inverse_deviation(x, mask, channels, EPS: tl.constexpr):
    """Return 1 / the standard deviation over channels of x, (CHANNELS, VOXELS) to (1, VOXELS)."""
    centered = tl.where(mask, x - tl.sum(x, 0)[None, :] / channels, 0.0)
    variance = tl.sum(centered * centered, 0)[None, :] / channels
    return 1.0 / tl.sqrt_rn(variance + EPS)


@triton.jit(do_not_specialize=["half", "gap", "heads"])
def product(
    matrix, column_scale, x, voxel_scale, residual, out, one, rows, inner, size, heads, half, gap,
    matrix_sample, matrix_row, matrix_column, x_sample, out_sample, head_rows,
    COLUMN_SCALE: tl.constexpr, VOXEL_SCALE: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, INNER: tl.constexpr, VOXELS: tl.constexpr, ONE_STEP: tl.constexpr, NORMALIZE: tl.constexpr,
    EPS: tl.constexpr,
):  # fmt: skip
    """Write matrix @ x, its voxels scaled, plus the residual; for every sample and head.

    With ONE_STEP a program loads its voxels once, INNER channels of them, for all rows of the matrix. With NORMALIZE
    as well, it finds the scale, 1 / the standard deviation over channels, and writes it, too.
    """
    block, sample = tl.program_id(2), (tl.program_id(2) // heads).to(tl.int64)
    head_row = block % heads * head_rows
    voxel = tl.program_id(0) * VOXELS + tl.arange(0, VOXELS)[None, :]
    here = voxel < size
    matrix += block * matrix_sample
    x += sample * x_sample + voxel
    out += sample * out_sample + voxel
    residual += sample * out_sample + voxel
    step = tl.arange(0, INNER)
    if VOXEL_SCALE and not NORMALIZE:
        scale = tl.load(voxel_scale + sample * size + voxel, mask=here, other=0.0)
    if ONE_STEP:
        source = x + (head_row + _channel(step, half, gap)).to(tl.int64)[:, None] * size
        known = (step < inner)[:, None] & here
        values = tl.load(source, mask=known, other=0.0)
        if NORMALIZE:
            scale = _inverse_deviation(values, known, inner, EPS)
            tl.store(voxel_scale + sample * size + voxel, scale, mask=here)
        first, last = 0, rows
    else:
        first = tl.program_id(1) * ROWS
        last = first + ROWS
    for start in range(first, last, ROWS):
        row = start + tl.arange(0, ROWS)
        line = matrix + row[:, None] * matrix_row
        if ONE_STEP:
            mask = (row < rows)[:, None] & (step < inner)[None, :]
            weights = tl.load(line + step[None, :] * matrix_column, mask=mask, other=0.0)
            if COLUMN_SCALE:
                weights *= tl.load(column_scale + step, mask=step < inner, other=0.0)[None, :]
            total = tl.dot(weights, values, input_precision=PRECISION)
        else:
            total = tl.zeros((ROWS, VOXELS), tl.float32)
            for k in range(0, inner, INNER):
                number = k + step
                mask = (row < rows)[:, None] & (number < inner)[None, :]
                weights = tl.load(line + number[None, :] * matrix_column, mask=mask, other=0.0)
                if COLUMN_SCALE:
                    weights *= tl.load(column_scale + number, mask=number < inner, other=0.0)[None, :]
                source = x + (head_row + _channel(number, half, gap)).to(tl.int64)[:, None] * size
                piece = tl.load(source, mask=(number < inner)[:, None] & here, other=0.0)
                total += tl.dot(weights, piece, input_precision=PRECISION) * one
        if VOXEL_SCALE:
            total *= scale
        target = (head_row + _channel(row, half, gap)).to(tl.int64)[:, None] * size
        stored = (row < rows)[:, None] & here
        if RESIDUAL:
            total += tl.load(residual + target, mask=stored, other=0.0)
        tl.store(out + target, total, mask=stored)


@triton.jit
def _sum_of_products(
    a, b, voxel_scale, to, one, row, column, rows, columns, size, first, last,
    VOXEL_SCALE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, VOXELS: tl.constexpr,
):  # fmt: skip
    """Write a @ b.T over voxels from `first` to `last`, those of b scaled: some rows and columns of (R, C)."""
    a += (row.to(tl.int64) * size)[:, None]
    b += (column.to(tl.int64) * size)[:, None]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(first, last, VOXELS):
        voxel = start + tl.arange(0, VOXELS)
        here = (voxel < size)[None, :]
        left = tl.load(a + voxel[None, :], mask=(row < rows)[:, None] & here, other=0.0)
        right = tl.load(b + voxel[None, :], mask=(column < columns)[:, None] & here, other=0.0)
        if VOXEL_SCALE:
            right *= tl.load(voxel_scale + voxel, mask=voxel < size, other=0.0)[None, :]
        total += tl.dot(left, tl.trans(right), input_precision=PRECISION) * one
    tl.store(to + row[:, None] * columns + column[None, :], total, mask=inside)


@triton.jit(do_not_specialize=["heads"])
def outer(
    a, b, voxel_scale, sums, one, rows, columns, size, heads, chunk, a_sample, b_sample,
    VOXEL_SCALE: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, VOXELS: tl.constexpr,
):  # fmt: skip
    """Write a @ b.T over a chunk of voxels, those of b scaled: every head's share of `sums` (B*heads, chunks, R, C).

    A chunk is a multiple of VOXELS.
    """
    block, sample = tl.program_id(2), (tl.program_id(2) // heads).to(tl.int64)
    head = block % heads
    across = tl.cdiv(columns, COLUMNS)
    row = tl.program_id(1) // across * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) % across * COLUMNS + tl.arange(0, COLUMNS)
    a += sample * a_sample + (head * rows).to(tl.int64) * size
    b += sample * b_sample + (head * columns).to(tl.int64) * size
    first = tl.program_id(0) * chunk
    to = sums + (block.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * rows * columns
    _sum_of_products(
        a, b, voxel_scale + sample * size, to, one, row, column, rows, columns, size, first,
        tl.minimum(first + chunk, size), VOXEL_SCALE, PRECISION, ROWS, COLUMNS, VOXELS,
    )  # fmt: skip


@triton.jit
def inverse_deviation(x, out, channels, size, EPS: tl.constexpr, CHANNELS: tl.constexpr, VOXELS: tl.constexpr):
    """Write 1 / the standard deviation of x (B, C, N) over channels, (B, N)."""
    at, mask = _columns(channels, size, CHANNELS, VOXELS)
    scale = _inverse_deviation(tl.load(x + at, mask=mask, other=0.0), mask, channels, EPS)
    voxel = tl.program_id(0) * VOXELS + tl.arange(0, VOXELS)[None, :]
    tl.store(out + tl.program_id(1).to(tl.int64) * size + voxel, scale, mask=voxel < size)


@triton.jit
def _normalize_backward(x, grad, residual, scale, channels):
    """Return the gradient of x (CHANNELS, VOXELS) from that of the normalized x, plus the residual."""
    mean = tl.sum(x, 0)[None, :] / channels
    pull = tl.sum(grad * x, 0)[None, :] * scale * scale / channels
    return residual + scale * (grad - (x - mean) * pull)


@triton.jit
def normalize_backward(
    x, scale, grad, norm_weight, residual, out, channels, size, CHANNELS: tl.constexpr, VOXELS: tl.constexpr
):
    """Write the gradient of x from ``grad`` of its LayerNorm, plus ``residual``; all (B, C, N), ``scale`` (B, N)."""
    at, mask = _columns(channels, size, CHANNELS, VOXELS)
    channel = tl.arange(0, CHANNELS)[:, None]
    voxel = tl.program_id(0) * VOXELS + tl.arange(0, VOXELS)[None, :]
    factors = tl.load(scale + tl.program_id(1).to(tl.int64) * size + voxel, mask=voxel < size, other=0.0)
    weights = tl.load(norm_weight + channel, mask=channel < channels, other=0.0)
    values = tl.load(x + at, mask=mask, other=0.0)
    g = tl.load(grad + at, mask=mask, other=0.0) * weights
    passed = tl.load(residual + at, mask=mask, other=0.0)
    tl.store(out + at, _normalize_backward(values, g, passed, factors, channels), mask=mask)


@triton.jit
def hidden_backward(
    x, scale, hidden_grad, matrix, norm_weight, residual, x_grad, sums, one, channels, rows, size, chunk,
    PRECISION: tl.constexpr, CHANNELS: tl.constexpr, VOXELS: tl.constexpr, STEP: tl.constexpr,
    ROWS: tl.constexpr, SUM_VOXELS: tl.constexpr,
):  # fmt: skip
    """Go back from ``hidden_grad`` (B, R, N), the gradient of matrix @ LayerNorm(x), over a chunk of voxels.

    Some programs write the gradient of x plus ``residual``, of VOXELS each; the others ``sums`` of the products of
    ``hidden_grad`` with the normalized x, (B, chunks, R, C), of ROWS each. They are neighbors, and read at the same
    time what lies in the cache: memory is the limit, and a program for both would have too few registers.
    """
    sample = tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, CHANNELS)
    first = tl.program_id(1) * chunk
    x += sample * channels * size
    scale += sample * size
    hidden_grad += sample * rows * size
    parts = chunk // VOXELS
    if tl.program_id(0) < parts:
        voxel = first + tl.program_id(0) * VOXELS + tl.arange(0, VOXELS)[None, :]
        here = voxel < size
        g = tl.zeros((CHANNELS, VOXELS), tl.float32)
        for start in range(0, rows, STEP):
            row = start + tl.arange(0, STEP)
            known = (channel < channels)[:, None] & (row < rows)[None, :]
            weights = tl.load(matrix + row[None, :] * channels + channel[:, None], mask=known, other=0.0)
            source = hidden_grad + (row.to(tl.int64) * size)[:, None] + voxel
            piece = tl.load(source, mask=(row < rows)[:, None] & here, other=0.0)
            g += tl.dot(weights, piece, input_precision=PRECISION) * one
        mask = (channel < channels)[:, None] & here
        at = (channel.to(tl.int64) * size)[:, None] + voxel
        g *= tl.load(norm_weight + channel, mask=channel < channels, other=0.0)[:, None]
        factors = tl.load(scale + voxel, mask=here, other=0.0)
        values = tl.load(x + at, mask=mask, other=0.0)
        beside = sample * channels * size + at
        passed = tl.load(residual + beside, mask=mask, other=0.0)
        tl.store(x_grad + beside, _normalize_backward(values, g, passed, factors, channels), mask=mask)
    else:
        row = (tl.program_id(0) - parts) * ROWS + tl.arange(0, ROWS)
        to = sums + (sample * tl.num_programs(1) + tl.program_id(1)) * rows * channels
        _sum_of_products(
            hidden_grad, x, scale, to, one, row, channel, rows, channels, size, first, tl.minimum(first + chunk, size),
            True, PRECISION, ROWS, CHANNELS, SUM_VOXELS,
        )  # fmt: skip


@triton.jit
def scaled_matrix_backward(
    folded, matrix, norm_weight, matrix_grad, norm_grad, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Write the gradients of `matrix` (R, C) and `norm_weight` (C,) from that of their product, `folded`."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    scale = tl.load(norm_weight + column, mask=column < columns, other=0.0)
    total = tl.zeros((1, COLUMNS), tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        at, mask = row * columns + column, (row < rows) & (column < columns)
        grad = tl.load(folded + at, mask=mask, other=0.0)
        total += tl.sum(grad * tl.load(matrix + at, mask=mask, other=0.0), 0)[None, :]
        tl.store(matrix_grad + at, grad * scale, mask=mask)
    tl.store(norm_grad + column, total, mask=column < columns)


@triton.jit
def gate_backward(
    convolved, grad, project_out, sums, one, channels, hidden, size, chunk,
    PRECISION: tl.constexpr, CHANNELS: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr,
    VOXELS: tl.constexpr, STEP: tl.constexpr, SUM_VOXELS: tl.constexpr,
):  # fmt: skip
    """Go back from ``grad`` (B, C, N) of project_out @ (gelu(a) * b), over a chunk of voxels and ROWS of a and b.

    ``convolved``, a and b (B, 2, h, N), is replaced by its gradient; ``sums`` (B, chunks, C, h) are those of the
    products of ``grad`` with gelu(a) * b. They come first: what they have read is in the cache when it is read again.
    """
    sample = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    gate = convolved + 2 * sample * hidden * size + (row.to(tl.int64) * size)[:, None]
    inside, offset = (row < hidden)[:, None], tl.cast(hidden, tl.int64) * size
    grad += sample * channels * size
    first = tl.program_id(1) * chunk
    last = tl.minimum(first + chunk, size)
    to = sums + (sample * tl.num_programs(1) + tl.program_id(1)) * channels * hidden + row[:, None]
    for block in tl.static_range(BLOCKS):
        channel = block * CHANNELS + tl.arange(0, CHANNELS)
        total = tl.zeros((ROWS, CHANNELS), tl.float32)
        for start in range(first, last, SUM_VOXELS):
            voxel = start + tl.arange(0, SUM_VOXELS)[None, :]
            here = voxel < size
            a = tl.load(gate + voxel, mask=inside & here, other=0.0)
            b = tl.load(gate + offset + voxel, mask=inside & here, other=0.0)
            source = grad + (channel.to(tl.int64) * size)[:, None] + voxel
            passed = tl.load(source, mask=(channel < channels)[:, None] & here, other=0.0)
            total += tl.dot(a * below(a) * b, tl.trans(passed), input_precision=PRECISION) * one
        tl.store(to + channel[None, :] * hidden, total, mask=inside & (channel < channels)[None, :])
    tl.debug_barrier()  # what one thread replaces below, another one may still have to read
    for start in range(first, last, VOXELS):
        voxel = start + tl.arange(0, VOXELS)[None, :]
        here = voxel < size
        g = tl.zeros((ROWS, VOXELS), tl.float32)
        for k in range(0, channels, STEP):
            number = k + tl.arange(0, STEP)
            known = inside & (number < channels)[None, :]
            weights = tl.load(project_out + number[None, :] * hidden + row[:, None], mask=known, other=0.0)
            source = grad + (number.to(tl.int64) * size)[:, None] + voxel
            passed = tl.load(source, mask=(number < channels)[:, None] & here, other=0.0)
            g += tl.dot(weights, passed, input_precision=PRECISION) * one
        a = tl.load(gate + voxel, mask=inside & here, other=0.0)
        b = tl.load(gate + offset + voxel, mask=inside & here, other=0.0)
        share = below(a)
        slope = share + a * tl.exp(-0.5 * a * a) * 0.3989422804014327
        tl.store(gate + voxel, g * b * slope, mask=inside & here)
        tl.store(gate + offset + voxel, g * a * share, mask=inside & here)
