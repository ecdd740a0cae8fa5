"""Tensors in, tensors out: allocates results, chooses tiles, launches the Triton kernels and adds up partial sums.

No call waits for the device or depends on values, so everything here can be captured in a CUDA graph.
"""

# The type checker does not know how Triton launches a kernel, and Triton is missing on some systems.
# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from restormer3d.ops.cuda import attention as head_kernels
from restormer3d.ops.cuda import convolution, products
from restormer3d.ops.reference import NORM_EPS

_THREADS = 128
_RUN = 16  # frames that one program convolves: a long run loads few frames twice, a short one keeps all processors busy
_REGISTERS = (
    128  # a thread; the compiler would take more for the convolutions, and fewer threads would share a processor
)
_TILE = 4096  # values of a tile of LayerNorm, 32 in each of 128 threads
_CHUNK = 1024  # voxels of one partial sum of products
_CACHED_CHUNK = 256  # of one whose voxels are read twice: in the meantime they have to stay in the second-level cache
_ONE_STEP = 64  # channels that a program of a product holds of its voxels
_BACK_IN_ONE = 64  # channels of an input up to which one kernel goes back from a product with its LayerNorm
_ROWS = 32  # of a matrix, in a program at a time
_MANY = 2**17  # voxels, enough to keep a GPU busy with large tiles
_FUSED = {"enable_fp_fusion": True}  # products and sums in one instruction; from Triton 3.10 on not the default
# Of kernels that go back through a product: so few registers that three programs of 32 channels fit on a processor.
_BACKWARD = {"VOXELS": 64, "STEP": 16, "SUM_VOXELS": 32, "num_warps": 4, "num_stages": 3}
_LENGTH_EPS = 1e-12  # of torch.nn.functional.normalize

MOST_HEAD_CHANNELS = 64
"""Of a head whose attention a program can hold."""


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


@dataclass(frozen=True)
class _Tiling:
    rows: int
    lanes: int
    parts: int
    run: int

    @classmethod
    def of(cls, shape: torch.Size, most_rows: int) -> _Tiling:
        """Tile frames (…, T, H, W): whole warps, no more than the frame needs, and in small frames few rows a lane."""
        frames, height, width = shape[-3:]
        rows = min(most_rows, max(1, power_of_two(height) // 4))
        columns = -(-height // rows) * width
        lanes = min(_THREADS, max(32, power_of_two(columns)))
        return cls(rows, lanes, -(-columns // lanes) * -(-frames // _RUN), _RUN)

    @property
    def options(self) -> dict[str, int]:
        own = {"ROWS": self.rows, "LANES": self.lanes, "num_warps": self.lanes // 32, "maxnreg": _REGISTERS}
        return own | _FUSED


def depthwise(x: Tensor, taps: Tensor, *, with_squares: bool = False) -> tuple[Tensor, Tensor]:
    """Convolve (B, C, T, H, W) with taps (C, 1, 3, 3, 3); also return the sums of squares, (B, C)."""
    tiling = _Tiling.of(x.shape, 8)
    planes = x.shape[0] * x.shape[1]
    out = torch.empty_like(x)
    squares = x.new_empty((*x.shape[:2], tiling.parts if with_squares else 0))
    with torch.cuda.device_of(x):
        convolution.depthwise[(planes * tiling.parts,)](
            x, taps.contiguous(), out, squares, *x.shape[1:], tiling.parts, tiling.run,
            SQUARES=with_squares, **tiling.options,
        )  # fmt: skip
    return out, squares.sum(2) if with_squares else squares


def depthwise_backward(x: Tensor, grad: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the taps."""
    tiling = _Tiling.of(x.shape, 4)
    planes = x.shape[0] * x.shape[1]
    x_grad = torch.empty_like(x)
    sums = x.new_empty((*x.shape[:2], tiling.parts, 27))
    with torch.cuda.device_of(x):
        convolution.depthwise_backward[(planes * tiling.parts,)](
            x, grad, taps.contiguous(), x_grad, sums, *x.shape[1:], tiling.parts, tiling.run, **tiling.options
        )
    return x_grad, sums.sum((0, 2)).view_as(taps)


def gated_depthwise(x: Tensor, taps: Tensor) -> Tensor:
    """Convolve (B, 2h, T, H, W) and return gelu(first half) * second half, (B, h, T, H, W)."""
    tiling, hidden = _Tiling.of(x.shape, 4), x.shape[1] // 2
    gated = x.new_empty((len(x), hidden, *x.shape[2:]))
    with torch.cuda.device_of(x):
        convolution.gated_depthwise[(len(x) * hidden * tiling.parts,)](
            x, taps.contiguous(), gated, hidden, *x.shape[2:], tiling.parts, tiling.run, **tiling.options
        )
    return gated


def gated_depthwise_backward(x: Tensor, taps: Tensor, project_out: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Go back from ``grad`` (B, C, N) of `project_out` (C, h) times what :func:`gated_depthwise` returned.

    Returns the gradients of the convolved x (B, 2h, T, H, W) and of the projection. What was convolved is computed
    again by a kernel of its own: one that does all holds so many values that few of it fit on a processor.
    """
    convolved, (channels, hidden), size = depthwise(x, taps)[0], project_out.shape, x[0, 0].numel()
    chunk, tile = _chunk(size, _CACHED_CHUNK), min(64, max(16, power_of_two(channels)))
    chunks = -(-size // chunk)
    sums = x.new_empty((len(x) * chunks, channels, hidden))
    with torch.cuda.device_of(x):
        products.gate_backward[(-(-hidden // _ROWS), chunks, len(x))](
            convolved, grad, project_out.contiguous(), sums, 1.0, channels, hidden, size, chunk, **_FUSED,
            PRECISION=_precision(), CHANNELS=tile, BLOCKS=-(-channels // tile), ROWS=_ROWS, **_BACKWARD,
        )  # fmt: skip
    return convolved, sums.sum(0)


def normalized_product(matrix: Tensor, norm_weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return 1 / the standard deviation of x (B, C, N) over channels, (B, N), and ``matrix @ LayerNorm(x)``."""
    scale, in_one = x.new_empty((x.shape[0], x.shape[2])), x.shape[1] <= _ONE_STEP
    if not in_one:
        grid, options = _columns(x.shape)
        with torch.cuda.device_of(x):
            products.inverse_deviation[grid](x, scale, *x.shape[1:], EPS=NORM_EPS, **options)
    return scale, product(matrix, x, column_scale=norm_weight, voxel_scale=scale, normalize=in_one)


def normalized_product_backward(
    x: Tensor, scale: Tensor, hidden_grad: Tensor, matrix: Tensor, norm_weight: Tensor, residual: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Go back from ``hidden_grad`` (B, R, N) of :func:`normalized_product`.

    Returns the gradients of x, plus ``residual`` (B, C, N), of the matrix (R, C), and of LayerNorm's weight (C,).
    """
    batch, channels, size = x.shape
    if channels <= _BACK_IN_ONE:
        rows, chunk = len(matrix), _chunk(size, _CACHED_CHUNK)
        chunks = -(-size // chunk)
        x_grad, sums = torch.empty_like(x), x.new_empty((batch * chunks, rows, channels))
        tile = min(64, max(16, power_of_two(rows)))
        with torch.cuda.device_of(x):
            products.hidden_backward[(chunk // _BACKWARD["VOXELS"] + -(-rows // tile), chunks, batch)](
                x, scale, hidden_grad, matrix.contiguous(), norm_weight, residual, x_grad, sums, 1.0,
                channels, rows, size, chunk, **_FUSED,
                PRECISION=_precision(), CHANNELS=max(16, power_of_two(channels)), ROWS=tile, **_BACKWARD,
            )  # fmt: skip
        folded = sums.sum(0)
    else:
        # Of many channels there are few voxels: the rows of the matrix have to run side by side.
        folded = outer_products(hidden_grad, x, voxel_scale=scale, over_samples=True)
        grad, x_grad = product(matrix.mT, hidden_grad), torch.empty_like(x)
        grid, options = _columns(x.shape)
        with torch.cuda.device_of(x):
            products.normalize_backward[grid](x, scale, grad, norm_weight, residual, x_grad, channels, size, **options)
    matrix_grad, norm_grad = torch.empty_like(folded), torch.empty_like(norm_weight)
    rows = min(256, power_of_two(len(folded)))
    with torch.cuda.device_of(x):
        products.scaled_matrix_backward[(-(-channels // 16),)](
            folded, matrix.contiguous(), norm_weight, matrix_grad, norm_grad, *folded.shape, ROWS=rows, COLUMNS=16
        )
    return x_grad, matrix_grad, norm_grad


def _columns(shape: torch.Size) -> tuple[tuple[int, int], dict[str, int]]:
    channels = power_of_two(shape[1])
    voxels = min(128, max(8, _TILE // channels))
    return (-(-shape[2] // voxels), shape[0]), {"CHANNELS": channels, "VOXELS": voxels}


def product(
    matrix: Tensor,
    x: Tensor,
    *,
    column_scale: Tensor | None = None,
    voxel_scale: Tensor | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    heads: int = 1,
    normalize: bool = False,
) -> Tensor:
    """Return ``(matrix * column_scale) @ x * voxel_scale + residual``.

    Parameters
    ----------
    matrix
        (R, C), or (B * heads, R, C) for every sample and head.
    x
        (B, C, N), its samples with gaps between them if need be. With heads, queries and keys (B, 2C, N): the rows of
        a head are its queries and its keys.
    column_scale, voxel_scale
        (C,) and (B, N).
    residual, out
        (B, R, N); `residual` laid out like the result.
    heads
        That have a matrix of their own.
    normalize
        `voxel_scale` is 1 / the standard deviation of x over its channels, 64 at most, and is written instead of read.
    """
    batch, channels, size = x.shape
    rows, inner = matrix.shape[-2:]
    out = x.new_empty((batch, channels if heads > 1 else rows, size)) if out is None else out
    # Loading voxels once pays off if several tiles of rows need them.
    one_step = inner <= 32 or (inner <= _ONE_STEP and (rows > _ROWS or normalize))
    tile, voxels = min(_ROWS, max(16, power_of_two(rows))), 128 if batch * size >= _MANY else 64
    grid = (-(-size // voxels), 1 if one_step else -(-rows // tile), batch * heads)
    half = inner // 2 if heads > 1 else inner + rows
    with torch.cuda.device_of(x):
        products.product[grid](
            matrix, matrix if column_scale is None else column_scale, x, x if voxel_scale is None else voxel_scale,
            out if residual is None else residual, out, 1.0, rows, inner, size, heads, half, channels // 2 - half,
            matrix.stride(0) if matrix.dim() == 3 else 0, *matrix.stride()[-2:], x.stride(0), out.stride(0), half,
            **_FUSED, COLUMN_SCALE=column_scale is not None, VOXEL_SCALE=voxel_scale is not None,
            RESIDUAL=residual is not None, PRECISION=_precision(), ROWS=tile,
            INNER=max(16, power_of_two(inner)) if one_step else 32, VOXELS=voxels, ONE_STEP=one_step,
            NORMALIZE=normalize, EPS=NORM_EPS, num_stages=3 if voxels == 128 else 4,
        )  # fmt: skip
    return out


def outer_products(
    a: Tensor, b: Tensor, *, voxel_scale: Tensor | None = None, heads: int = 1, over_samples: bool = False
) -> Tensor:
    """Return ``a @ (b * voxel_scale).mT`` of every sample and head: (B, R, N) and (B, C, N) to (B * heads, R, C).

    With heads, R and C are those of a head. With ``over_samples`` the sum over samples as well: (R, C). The sum is cut
    into chunks that run side by side and are then added up.
    """
    batch, _, size = a.shape
    rows, columns = a.shape[1] // heads, b.shape[1] // heads
    chunk = _chunk(size)
    chunks = -(-size // chunk)
    sums = a.new_empty((batch * heads, chunks, rows, columns))
    tile = min(64, max(16, power_of_two(rows))), min(64, max(16, power_of_two(columns)))
    grid = (chunks, -(-rows // tile[0]) * -(-columns // tile[1]), batch * heads)
    with torch.cuda.device_of(a):
        products.outer[grid](
            a, b, a if voxel_scale is None else voxel_scale, sums, 1.0, rows, columns, size, heads, chunk,
            a.stride(0), b.stride(0), **_FUSED, VOXEL_SCALE=voxel_scale is not None, PRECISION=_precision(),
            ROWS=tile[0], COLUMNS=tile[1], VOXELS=32, num_warps=2 if max(tile) <= 32 else 4,
        )  # fmt: skip
    return sums.flatten(0, 1).sum(0) if over_samples else sums.sum(1)


def _chunk(size: int, most: int = _CHUNK) -> int:
    """Voxels of one partial sum over `size` of them: a power of two, and where there are few, less than `most`."""
    return min(most, max(64, power_of_two(size // 16)))


def _precision() -> str:
    """How factors are rounded: as the user chose, or to three TF32 terms that together are as exact as float32."""
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def attention_matrix(gram: Tensor, squares: Tensor, temperature: Tensor, project_out: Tensor) -> tuple[Tensor, Tensor]:
    """Return attention (B * heads, c, c), and the output projection times it (B, C, C).

    From `gram`, ``queries @ keys.T`` (B * heads, c, c), and squared lengths of queries, keys and values (B, 3C).
    """
    heads, size = temperature.numel(), gram.shape[-1]
    attention = torch.empty_like(gram)
    mixed = gram.new_empty((len(squares), *project_out.shape))
    with torch.cuda.device_of(gram):
        head_kernels.attention_matrix[(len(gram),)](
            gram, squares, temperature, project_out.contiguous(), attention, mixed, size, heads,
            EPS=_LENGTH_EPS, **_head_options(size),
        )  # fmt: skip
    return attention, mixed


def _head_options(size: int) -> dict[str, int]:
    return {"COUNT": max(16, power_of_two(size)), "num_warps": 4 if size <= 32 else 16}


def attention_backward(
    outer: Tensor,
    gram: Tensor,
    squares: Tensor,
    attention: Tensor,
    temperature: Tensor,
    project_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Go back from ``outer``, the gradient of the output times ``values.T`` (B, C, C).

    Returns the matrices (B * heads, 2c, 2c) that turn queries and keys into the gradients of both, and the gradients
    of temperature (heads,) and projection (C, C).
    """
    heads, size, batch = temperature.numel(), gram.shape[-1], len(outer)
    query_key = outer.new_empty((batch * heads, 2 * size, 2 * size))
    temperature_grad, project_grad = outer.new_empty((batch, heads)), torch.empty_like(outer)
    with torch.cuda.device_of(outer):
        head_kernels.attention_backward[(batch * heads,)](
            outer, gram, squares, attention, temperature, project_out.contiguous(),
            query_key, temperature_grad, project_grad, size, heads,
            EPS=_LENGTH_EPS, **_head_options(size),
        )  # fmt: skip
    return query_key, temperature_grad.sum(0), project_grad.sum(0)
