"""The inner loops of the CPU engine, unrolled over registers; Numba code calls them on flat float32 buffers.

A *tile* holds some rows of one frame for many channels: channel ``c``, row ``r``, column ``w`` lie at
``c * stride + r * pitch + w``. One column of zeros separates the rows, and the rest of a channel's stride is zero
too, so a 3x3x3 kernel runs over a tile as over one line, without special cases at its borders.
Arguments named ``i…`` are offsets in elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from restormer3d.ops.cpu.simd import LANES, REGISTERS, Emitter, vector_loop
from restormer3d.ops.reference import NORM_EPS

TILE_ROWS = 8 if REGISTERS == 32 else 4
"""Rows of a register tile of :func:`matrix_product`."""
SUM_ROWS = 12 if REGISTERS == 32 else 6
"""Rows of a register tile of :func:`sum_product`."""
SUM_COLUMNS = 2 * LANES
"""Columns of a register tile of :func:`sum_product`."""
BLOCK = 4
"""Rows of an image that one pass of the depth-wise convolution computes together."""


def _register_tile(rows: int, vectors: int, accumulate: bool) -> Any:
    """Emit ``c (+)= a @ b`` for ``rows`` rows and ``vectors * LANES`` columns of c."""

    def emit(
        e: Emitter, a: Any, ia: Any, lda: Any, b: Any, ib: Any, ldb: Any, c: Any, ic: Any, ldc: Any, depth: Any
    ) -> None:
        a_rows = [e.at(a, e.plus(ia, e.times(lda, m))) for m in range(rows)]
        sums = [[e.variable(e.constant(0.0)) for _ in range(vectors)] for _ in range(rows)]
        with e.loop(depth) as k:
            b_row = e.at(b, e.plus(ib, e.times(k, ldb)))
            columns = [e.load(e.at(b_row, v * LANES)) for v in range(vectors)]
            for m in range(rows):
                factor = e.broadcast(e.at(a_rows[m], k))
                for v in range(vectors):
                    e.set(sums[m][v], e.fma(factor, columns[v], e.get(sums[m][v])))
        for m in range(rows):
            c_row = e.at(c, e.plus(ic, e.times(ldc, m)))
            for v in range(vectors):
                target, value = e.at(c_row, v * LANES), e.get(sums[m][v])
                e.store(e.add(value, e.load(target)) if accumulate else value, target)

    return vector_loop(emit)


tile3 = _register_tile(TILE_ROWS, 3, False)
tile2 = _register_tile(TILE_ROWS, 2, False)
tile1 = _register_tile(TILE_ROWS, 1, False)
sum_tile = _register_tile(SUM_ROWS, 2, True)


def _depthwise(accumulate: bool) -> Any:
    def emit(
        e: Emitter, src: Any, i0: Any, i1: Any, i2: Any, pitch: Any, taps: Any, it: Any, dst: Any, io: Any,
        out_pitch: Any, rows: Any, width: Any,
    ) -> None:  # fmt: skip
        def plane_weights(t: int) -> list[Any]:
            return [e.broadcast(e.at(taps, e.plus(it, 9 * t + k))) for k in range(9)]

        def block(together: int, r: Any, w: Any, left: Any) -> None:
            column = e.plus(e.times(r, pitch), w)
            lines = [e.plus(column, e.times(pitch, row)) for row in range(together + 2)]
            out_column = e.at(dst, e.plus(io, e.plus(e.times(r, out_pitch), w)))
            targets = [e.at(out_column, e.times(out_pitch, row)) for row in range(together)]
            before = [e.load(target) if accumulate else e.constant(0.0) for target in targets]
            sums: list[Any] = list(before)
            for t in range(3):
                weights = plane_weights(t)  # 27 would leave no registers for sums
                for row in range(together + 2):
                    for shift in range(3):
                        value = e.load(e.at(e.at(planes[t], lines[row]), shift))
                        for h in range(max(0, row - together + 1), min(3, row + 1)):
                            sums[row - h] = e.fma(weights[3 * h + shift], value, sums[row - h])
            for total, old, target in zip(sums, before, targets, strict=True):
                e.store(e.first_lanes(left, total, old) if accumulate else total, target)

        planes = [e.at(src, i) for i in (i0, i1, i2)]
        start = e.times(rows, 0)
        for together in (2 * BLOCK, BLOCK) if REGISTERS == 32 else (BLOCK,):  # each sum waits for the one before it
            stop = e.multiple(rows, together)
            with e.loop(stop, start, together) as r, e.loop(width, step=LANES) as w:
                block(together, r, w, e.plus(width, e.times(w, -1)))
            start = stop

    return vector_loop(emit)


depthwise = _depthwise(accumulate=False)
"""Convolve one channel 3x3x3: ``(src, i0, i1, i2, pitch, taps, it, dst, io, out_pitch, rows, width)``.

``i0, i1, i2`` are three successive planes of ``rows + 2`` rows in ``src``; ``dst`` gets ``rows``, a multiple of BLOCK.
The last vector of a row runs over into what follows; in a tile, it writes the next row's own values there.
"""
depthwise_add = _depthwise(accumulate=True)
"""As :func:`depthwise`, added to what ``dst`` holds."""


def _depthwise_weight_gradient(whole: bool) -> Any:
    def emit(
        e: Emitter, src: Any, i0: Any, i1: Any, i2: Any, pitch: Any, grad: Any, ig: Any, grad_pitch: Any, ahead: Any,
        out: Any, io: Any, rows: Any, width: Any,
    ) -> None:  # fmt: skip
        planes = [e.at(src, i) for i in (i0, i1, i2)]
        target = e.at(out, io)
        for together in [(0, 1, 2)] if REGISTERS == 32 else [(0,), (1,), (2,)]:  # as many sums as stay in registers
            _weight_gradient_of_planes(
                e, together, planes, pitch, e.at(grad, ig), grad_pitch, ahead if whole else None, target, rows, width
            )

    return vector_loop(emit)


def _weight_gradient_of_planes(
    e: Emitter,
    chosen: Sequence[int],
    planes: Any,
    pitch: Any,
    grad: Any,
    grad_pitch: Any,
    ahead: Any,
    target: Any,
    rows: Any,
    width: Any,
) -> None:
    slots = [9 * t + k for t in chosen for k in range(9)]
    sums = {k: e.variable(e.load(e.at(target, k * LANES))) for k in slots}

    def step(w: Any, row: Any, grads: dict[int, Any]) -> None:
        offset = e.plus(e.times(row, pitch), w)
        for t in chosen:
            for shift in range(3):
                value = e.load(e.at(planes[t], e.plus(offset, shift)))
                for h, g in grads.items():
                    slot = sums[9 * t + 3 * h + shift]
                    e.set(slot, e.fma(g, value, e.get(slot)))

    with e.loop(width, step=LANES) as w:
        left = e.plus(width, e.times(w, -1))

        def gradient(row: Any) -> Any:
            place = e.at(grad, e.plus(e.times(row, grad_pitch), w))
            value = e.load(place)
            if ahead is None:
                return e.first_lanes(left, value, e.constant(0.0))
            e.prefetch(e.at(place, ahead))
            return value  # a mask would take registers

        zero = e.times(w, 0)
        first, second = gradient(zero), gradient(e.plus(zero, 1))
        step(w, zero, {0: first})
        step(w, e.plus(zero, 1), {0: second, 1: first})
        before, last = e.variable(first), e.variable(second)
        with e.loop(rows, start=e.plus(zero, 2)) as row:
            newest = gradient(row)
            step(w, row, {0: newest, 1: e.get(last), 2: e.get(before)})
            e.set(before, e.get(last))
            e.set(last, newest)
        step(w, rows, {1: e.get(last), 2: e.get(before)})
        step(w, e.plus(rows, 1), {2: e.get(last)})
    for k in slots:
        e.store(e.get(sums[k]), e.at(target, k * LANES))


depthwise_weight_gradient = _depthwise_weight_gradient(whole=False)
"""Add ``sum grad[r, w] * plane_t[r + h, w + shift - 1]`` to the 27 vectors at ``out[io]``, lane by lane.

``(src, i0, i1, i2, pitch, grad, ig, grad_pitch, ahead, out, io, rows, width)``; at least two rows.
"""
depthwise_weight_gradient_whole = _depthwise_weight_gradient(whole=True)
"""The same where rows are whole vectors; prefetches what lies ``ahead`` in the gradient."""


# Phi(x) - 1/2 = x P(u) with u = 2 (x / 5.2)^2 - 1, error 1.4e-7; d/dx gelu(x) - 1/2 = x Q(v) likewise to 5.6, 4e-7.
PHI = (
    1.359499930e-01,
    -6.774366748e-02,
    5.002452135e-02,
    -3.992981956e-02,
    3.198995929e-02,
    -2.472362960e-02,
    1.795478687e-02,
    -1.250512093e-02,
    8.559967783e-03,
    -4.789039128e-03,
    1.800122665e-03,
    -1.221493550e-03,
    1.268511027e-03,
    -4.812771782e-04,
)
SLOPE = (
    1.264166420e-01,
    -6.428230506e-02,
    5.180796038e-02,
    -5.097242499e-02,
    5.668487833e-02,
    -6.488230217e-02,
    7.162958534e-02,
    -7.375117439e-02,
    6.661072049e-02,
    -5.165327563e-02,
    4.266033533e-02,
    -3.816175857e-02,
    2.042312420e-02,
    -2.595318053e-03,
    4.184615156e-03,
    -8.000635962e-03,
    3.167118523e-03,
)


def _odd(e: Emitter, x: Any, limit: float, coefficients: tuple[float, ...]) -> Any:
    """Return 1/2 + x times the polynomial in the scaled square of x."""
    x = e.clamp(x, limit)
    u = e.fma(e.multiply(x, x), e.constant(2 / limit**2), e.constant(-1.0))
    return e.fma(x, e.polynomial(u, coefficients), e.constant(0.5))


@vector_loop
def gate(e: Emitter, pair: Any, i: Any, stride: Any, out: Any, io: Any, columns: Any) -> None:
    """Write ``gelu(a) * b``, a and b being two channels that lie ``stride`` apart."""
    with e.loop(columns, step=LANES) as j:
        position = e.at(pair, e.plus(i, j))
        x, y = e.load(position), e.load(e.at(position, stride))
        e.store(e.multiply(e.multiply(x, y), _odd(e, x, 5.2, PHI)), e.at(out, e.plus(io, j)))


@vector_loop
def gate_backward(e: Emitter, pair: Any, i: Any, stride: Any, grad: Any, ig: Any, columns: Any) -> None:
    """Replace a and b by their gradients, and the gradient of ``gelu(a) * b`` by that product."""
    with e.loop(columns, step=LANES) as j:
        first, target = e.at(pair, e.plus(i, j)), e.at(grad, e.plus(ig, j))
        second = e.at(first, stride)
        x, y, g = e.load(first), e.load(second), e.load(target)
        gelu = e.multiply(x, _odd(e, x, 5.2, PHI))
        e.store(e.multiply(e.multiply(g, y), _odd(e, x, 5.6, SLOPE)), first)
        e.store(e.multiply(g, gelu), second)
        e.store(e.multiply(gelu, y), target)


@vector_loop
def normalize(e: Emitter, x: Any, stride: Any, channels: Any, columns: Any, statistics: Any) -> None:
    """Divide every column of x by its standard deviation over channels; keep the new means, then the factors."""
    share = e.reciprocal(channels)
    with e.loop(columns, step=LANES) as i:
        column = e.at(x, i)
        total = e.variable(e.constant(0.0))
        with e.loop(channels) as c:
            e.set(total, e.add(e.get(total), e.load(e.at(column, e.times(c, stride)))))
        mean = e.multiply(e.get(total), share)
        e.set(total, e.constant(0.0))
        with e.loop(channels) as c:
            deviation = e.subtract(e.load(e.at(column, e.times(c, stride))), mean)
            e.set(total, e.fma(deviation, deviation, e.get(total)))
        variance = e.fma(e.get(total), share, e.constant(NORM_EPS))
        factor = e.divide(e.constant(1.0), e.square_root(variance))
        with e.loop(channels) as c:
            pointer = e.at(column, e.times(c, stride))
            e.store(e.multiply(e.load(pointer), factor), pointer)
        e.store(e.multiply(mean, factor), e.at(statistics, i))
        e.store(factor, e.at(statistics, e.plus(columns, i)))


@vector_loop
def normalize_backward(
    e: Emitter, x: Any, grad: Any, stride: Any, channels: Any, columns: Any, statistics: Any
) -> None:
    """Turn the gradient of what :func:`normalize` returned into the gradient of what it was given, in place."""
    share = e.reciprocal(channels)
    with e.loop(columns, step=LANES) as i:
        x_column, grad_column = e.at(x, i), e.at(grad, i)
        total = e.variable(e.constant(0.0))
        with e.loop(channels) as c:
            offset = e.times(c, stride)
            e.set(total, e.fma(e.load(e.at(x_column, offset)), e.load(e.at(grad_column, offset)), e.get(total)))
        slope = e.multiply(e.get(total), share)
        mean, factor = e.load(e.at(statistics, i)), e.load(e.at(statistics, e.plus(columns, i)))
        with e.loop(channels) as c:
            offset = e.times(c, stride)
            deviation = e.subtract(e.load(e.at(x_column, offset)), mean)
            pointer = e.at(grad_column, offset)
            e.store(e.multiply(e.subtract(e.load(pointer), e.multiply(deviation, slope)), factor), pointer)


@vector_loop
def clear(e: Emitter, x: Any, i: Any, count: Any) -> None:
    """Set ``count`` floats to zero."""
    for lanes, k in e.spans(count):
        e.store(e.constant(0.0, lanes), e.at(x, e.plus(i, k)))


@vector_loop
def load_rows(e: Emitter, src: Any, i: Any, dst: Any, io: Any, rows: Any, width: Any, ahead: Any) -> None:
    """Copy successive rows of an image into a tile, a zero before each; prefetch what lies ``ahead``."""
    with e.loop(rows) as r:
        source, target = e.at(src, e.plus(i, e.times(r, width))), e.at(dst, e.plus(io, e.times(r, e.plus(width, 1))))
        e.store(e.constant(0.0, 1), target)
        for lanes, w in e.spans(width):
            if lanes == LANES:
                e.prefetch(e.at(e.at(source, w), ahead))
            e.store(e.load(e.at(source, w), lanes), e.at(e.at(target, 1), w))


@vector_loop
def store_rows(e: Emitter, src: Any, i: Any, dst: Any, io: Any, rows: Any, width: Any) -> None:
    """Copy rows of a tile to successive rows of an image."""
    with e.loop(rows) as r:
        source, target = e.at(src, e.plus(i, e.times(r, e.plus(width, 1)))), e.at(dst, e.plus(io, e.times(r, width)))
        for lanes, w in e.spans(width):
            e.store(e.load(e.at(e.at(source, 1), w), lanes), e.at(target, w))


@vector_loop
def store_row_sums(e: Emitter, src: Any, i: Any, add: Any, dst: Any, io: Any, rows: Any, width: Any) -> None:
    """Write rows of a tile plus the same rows of the image ``add``."""
    with e.loop(rows) as r:
        source, position = e.at(src, e.plus(i, e.times(r, e.plus(width, 1)))), e.plus(io, e.times(r, width))
        for lanes, w in e.spans(width):
            other = e.load(e.at(e.at(add, position), w), lanes)
            e.store(e.add(e.load(e.at(e.at(source, 1), w), lanes), other), e.at(e.at(dst, position), w))


@vector_loop
def add_squares(e: Emitter, x: Any, i: Any, columns: Any, out: Any, io: Any) -> None:
    """Add the sum of squares to ``out[io]``."""
    total = e.variable(e.constant(0.0))
    with e.loop(columns, step=LANES) as j:
        value = e.load(e.at(x, e.plus(i, j)))
        e.set(total, e.fma(value, value, e.get(total)))
    target = e.at(out, io)
    e.store(e.add(e.sum_lanes(e.get(total)), e.load(target, 1)), target)


@vector_loop
def add_multiple(e: Emitter, x: Any, factors: Any, k: Any, out: Any, i: Any, columns: Any) -> None:
    """Add ``factors[k] * x`` to ``out``, both from offset i on."""
    factor = e.broadcast(e.at(factors, k))
    with e.loop(columns, step=LANES) as j:
        target = e.at(out, e.plus(i, j))
        e.store(e.fma(factor, e.load(e.at(x, e.plus(i, j))), e.load(target)), target)


@vector_loop
def transpose(e: Emitter, x: Any, ix: Any, stride: Any, out: Any, io: Any, out_stride: Any) -> None:
    """Write the transpose of a block of LANES channels and LANES columns."""
    rows = [e.load(e.at(x, e.plus(ix, e.times(stride, c)))) for c in range(LANES)]
    width = 1
    while width < LANES:
        for c in range(LANES):
            if not c & width:
                rows[c], rows[c + width] = e.interleave(rows[c], rows[c + width], width)
        width *= 2
    for c in range(LANES):
        e.store(rows[c], e.at(out, e.plus(io, e.times(out_stride, c))))
