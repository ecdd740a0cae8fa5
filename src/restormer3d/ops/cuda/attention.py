"""Triton kernels for the small matrices of attention, channels by channels: one program for every head of a sample."""

# The type checker sees tensors and classes where Triton's compiler sees pointers, scalars and loops.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportIndexIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl


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
