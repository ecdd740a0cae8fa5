"""Triton kernels for what mixes channels: matrix products, LayerNorm, and the small matrices of attention.

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


@triton.jit
def _channel(number, half, gap):
    """Where a row lies in memory: from `half` on, `gap` rows further, as a head's keys are from its queries."""
    return number + tl.where(number >= half, gap, 0)


@triton.jit(do_not_specialize=["half", "gap", "heads"])
def product(
    matrix, column_scale, x, voxel_scale, residual, out, one, rows, inner, size, heads, half, gap,
    matrix_sample, matrix_row, matrix_column, x_sample, out_sample, head_rows,
    COLUMN_SCALE: tl.constexpr, VOXEL_SCALE: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, INNER: tl.constexpr, VOXELS: tl.constexpr, ONE_STEP: tl.constexpr,
):  # fmt: skip
    """Write matrix @ x, its voxels scaled, plus the residual; for every sample and head.

    With ONE_STEP a program loads its voxels once, INNER channels of them, for all rows of the matrix.
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
    if VOXEL_SCALE:
        scale = tl.load(voxel_scale + sample * size + voxel, mask=here, other=0.0)
    if ONE_STEP:
        source = x + (head_row + _channel(step, half, gap)).to(tl.int64)[:, None] * size
        values = tl.load(source, mask=(step < inner)[:, None] & here, other=0.0)
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
    a += sample * a_sample + ((head * rows + row).to(tl.int64) * size)[:, None]
    b += sample * b_sample + ((head * columns + column).to(tl.int64) * size)[:, None]
    first = tl.program_id(0) * chunk
    last = tl.minimum(first + chunk, size)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(first, last, VOXELS):
        voxel = start + tl.arange(0, VOXELS)
        here = (voxel < size)[None, :]
        left = tl.load(a + voxel[None, :], mask=(row < rows)[:, None] & here, other=0.0)
        right = tl.load(b + voxel[None, :], mask=(column < columns)[:, None] & here, other=0.0)
        if VOXEL_SCALE:
            right *= tl.load(voxel_scale + sample * size + voxel, mask=voxel < size, other=0.0)[None, :]
        total += tl.dot(left, tl.trans(right), input_precision=PRECISION) * one
    part = (block.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * rows
    to = sums + (part + row)[:, None] * columns + column[None, :]
    tl.store(to, total, mask=(row < rows)[:, None] & (column < columns)[None, :])


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
def inverse_deviation(x, out, channels, size, EPS: tl.constexpr, CHANNELS: tl.constexpr, VOXELS: tl.constexpr):
    """Write 1 / the standard deviation of x (B, C, N) over channels, (B, N)."""
    at, mask = _columns(channels, size, CHANNELS, VOXELS)
    _, scale = _center_and_scale(tl.load(x + at, mask=mask, other=0.0), mask, channels, EPS)
    voxel = tl.program_id(0) * VOXELS + tl.arange(0, VOXELS)[None, :]
    tl.store(out + tl.program_id(1).to(tl.int64) * size + voxel, scale, mask=voxel < size)


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


@triton.jit
def _square(pointer, size, COUNT: tl.constexpr):
    """Return offsets into a matrix (size, size) and which of them exist, (COUNT, COUNT)."""
    row, column = tl.arange(0, COUNT)[:, None], tl.arange(0, COUNT)[None, :]
    return pointer + row * size + column, (row < size) & (column < size)


@triton.jit
def _cosines(products, squares, size, heads, EPS: tl.constexpr, COUNT: tl.constexpr):
    """Return cosines of a head's queries and keys, and the inverse lengths of both, in float64."""
    sample, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    number = tl.arange(0, COUNT)
    lengths = squares + sample * (3 * heads * size) + head * size + number
    q = tl.load(lengths, mask=number < size, other=0.0).to(tl.float64)
    k = tl.load(lengths + heads * size, mask=number < size, other=0.0).to(tl.float64)
    inverse_q, inverse_k = 1.0 / tl.maximum(tl.sqrt(q), EPS), 1.0 / tl.maximum(tl.sqrt(k), EPS)
    at, mask = _square(products + tl.program_id(0) * size * size, size, COUNT)
    cosines = tl.load(at, mask=mask, other=0.0).to(tl.float64) * inverse_q[:, None] * inverse_k[None, :]
    return cosines, inverse_q, inverse_k, q, k


@triton.jit
def attention_matrix(
    products, squares, temperature, project_out, attention, mixed, size, heads,
    EPS: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Write a head's attention, and its columns of the output projection times that.

    From ``queries @ keys.T`` (B, heads, c, c) and the squared lengths of queries, keys and values (B, 3C) to
    ``attention`` (B, heads, c, c) and ``mixed`` (B, C, C).
    """
    sample, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    cosines, _, _, _, _ = _cosines(products, squares, size, heads, EPS, COUNT)
    at, mask = _square(attention + tl.program_id(0) * size * size, size, COUNT)
    logits = tl.where(mask, cosines * tl.load(temperature + head).to(tl.float64), -1e300)
    powers = tl.where(mask, tl.exp(logits - tl.max(logits, 1)[:, None]), 0.0)
    share = (powers / tl.maximum(tl.sum(powers, 1), 1e-300)[:, None]).to(tl.float32)
    tl.store(at, share, mask=mask)
    channels = heads * size
    number = tl.arange(0, COUNT)[None, :]
    column = head * size + number
    for start in range(0, channels, COUNT):
        row = start + tl.arange(0, COUNT)[:, None]
        mask = (row < channels) & (number < size)
        weights = tl.load(project_out + row * channels + column, mask=mask, other=0.0)
        to = mixed + (sample * channels + row).to(tl.int64) * channels + column
        tl.store(to, tl.dot(weights, share, input_precision="ieee"), mask=mask)


@triton.jit
def attention_backward(
    outer, products, squares, attention, temperature, project_out, query_key, temperature_grad, project_grad,
    size, heads, EPS: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Go back from ``outer``, the gradient of the output times ``values.T`` (B, C, C), through a head's attention.

    Writes the matrix ``query_key`` (B, heads, 2c, 2c) that turns queries and keys into the gradients of both, and
    every sample's share of the gradients of temperature (B, heads) and projection (B, C, C).
    """
    sample, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    channels = heads * size
    number = tl.arange(0, COUNT)[None, :]
    column = head * size + number
    at, mask = _square(attention + tl.program_id(0) * size * size, size, COUNT)
    share = tl.load(at, mask=mask, other=0.0)
    attention_grad = tl.zeros((COUNT, COUNT), tl.float32)
    for start in range(0, channels, COUNT):
        row = start + tl.arange(0, COUNT)[:, None]
        inside = (row < channels) & (number < size)
        weights = tl.load(project_out + row * channels + column, mask=inside, other=0.0)
        to = (sample * channels + row).to(tl.int64) * channels + column
        grad = tl.load(outer + to, mask=inside, other=0.0)
        attention_grad += tl.dot(tl.trans(weights), grad, input_precision="ieee")
        tl.store(project_grad + to, tl.dot(grad, tl.trans(share), input_precision="ieee"), mask=inside)
    cosines, inverse_q, inverse_k, q, k = _cosines(products, squares, size, heads, EPS, COUNT)
    share, grad = share.to(tl.float64), attention_grad.to(tl.float64)
    logits_grad = share * (grad - tl.sum(grad * share, 1)[:, None])
    tl.store(temperature_grad + tl.program_id(0), tl.sum(tl.sum(logits_grad * cosines, 1), 0).to(tl.float32))
    cosines_grad = logits_grad * tl.load(temperature + head).to(tl.float64)
    pull = cosines_grad * cosines
    own_q = tl.where(q > EPS * EPS, -tl.sum(pull, 1) * inverse_q * inverse_q, 0.0)
    own_k = tl.where(k > EPS * EPS, -tl.sum(pull, 0) * inverse_k * inverse_k, 0.0)
    passed = (cosines_grad * inverse_q[:, None] * inverse_k[None, :]).to(tl.float32)
    row = tl.arange(0, COUNT)[:, None]
    to = query_key + tl.program_id(0) * (4 * size * size) + row * (2 * size) + number
    diagonal = (row == number).to(tl.float64)
    tl.store(to, (diagonal * own_q[:, None]).to(tl.float32), mask=mask)
    tl.store(to + size, passed, mask=mask)
    # The same two blocks below, the first one transposed.
    to = query_key + tl.program_id(0) * (4 * size * size) + (size + number) * (2 * size) + row
    tl.store(to, passed, mask=mask)
    to = query_key + tl.program_id(0) * (4 * size * size) + (size + row) * (2 * size) + size + number
    tl.store(to, (diagonal * own_k[:, None]).to(tl.float32), mask=mask)
