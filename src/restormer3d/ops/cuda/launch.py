"""Tensors in, tensors out: allocates results, chooses tiles, launches the Triton kernels and adds up partial sums.

No call waits for the device or depends on values, so everything here can be captured in a CUDA graph.
"""

# The type checker does not know how Triton launches a kernel, and Triton is missing on some systems.
# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from restormer3d.ops.cuda import kernels
from restormer3d.ops.reference import NORM_EPS

_THREADS = 128
_RUN = 16  # frames that one program convolves: a long run loads few frames twice, a short one keeps all processors busy
_BACKWARD_RUN = 32  # longer, because each program ends by adding up 27 sums
_REGISTERS = (
    128  # a thread; the compiler would take more for the convolutions, and fewer threads would share a processor
)
_TILE = 4096  # values of a normalization tile, 32 in each of 128 threads
_CHUNK = 1024  # voxels of one partial matrix product


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


@dataclass(frozen=True)
class _Tiling:
    rows: int
    threads: int
    parts: int
    run: int

    @classmethod
    def of(cls, shape: torch.Size, run: int, most_rows: int) -> _Tiling:
        """Tile frames (…, T, H, W): whole warps, no wider than the frame needs."""
        frames, voxels = shape[-3], shape[-2] * shape[-1]
        threads = min(_THREADS, max(32, power_of_two(voxels)))
        rows = min(most_rows, power_of_two(-(-voxels // threads)))
        parts = -(-voxels // (rows * threads)) * -(-frames // run)
        return cls(rows, threads, parts, run)

    @property
    def options(self) -> dict[str, int]:
        return {"ROWS": self.rows, "THREADS": self.threads, "num_warps": self.threads // 32, "maxnreg": _REGISTERS}


def depthwise(x: Tensor, taps: Tensor, *, with_squares: bool = False) -> tuple[Tensor, Tensor]:
    """Convolve (B, C, T, H, W) with taps (C, 1, 3, 3, 3); also return the sums of squares, partial, (B, C, parts)."""
    tiling = _Tiling.of(x.shape, _RUN, 4)
    planes = x.shape[0] * x.shape[1]
    out = torch.empty_like(x)
    squares = x.new_empty((*x.shape[:2], tiling.parts if with_squares else 0))
    with torch.cuda.device_of(x):
        kernels.depthwise[(planes * tiling.parts,)](
            x, taps.contiguous(), out, squares, *x.shape[1:], tiling.parts, tiling.run,
            SQUARES=with_squares, **tiling.options,
        )  # fmt: skip
    return out, squares


def depthwise_backward(x: Tensor, grad: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the taps."""
    tiling = _Tiling.of(x.shape, _BACKWARD_RUN, 4)
    planes = x.shape[0] * x.shape[1]
    x_grad = torch.empty_like(x)
    sums = x.new_empty((*x.shape[:2], tiling.parts, 27))
    with torch.cuda.device_of(x):
        kernels.depthwise_backward[(planes * tiling.parts,)](
            x, grad, taps.contiguous(), x_grad, sums, *x.shape[1:], tiling.parts, tiling.run, **tiling.options
        )
    return x_grad, sums.sum((0, 2)).view_as(taps)


def gated_depthwise(x: Tensor, taps: Tensor) -> Tensor:
    """Convolve (B, 2h, T, H, W) and return gelu(first half) * second half, (B, h, T, H, W)."""
    gated = x.new_empty((x.shape[0], x.shape[1] // 2, *x.shape[2:]))
    _gate(x, taps, gated, None, None)
    return gated


def gated_depthwise_backward(x: Tensor, taps: Tensor, out_grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return what :func:`gated_depthwise` returned, and the gradient of the convolved x (B, 2h, T, H, W)."""
    gated, gate_grad = torch.empty_like(out_grad), torch.empty_like(x)
    _gate(x, taps, gated, out_grad, gate_grad)
    return gated, gate_grad


def _gate(x: Tensor, taps: Tensor, gated: Tensor, out_grad: Tensor | None, gate_grad: Tensor | None) -> None:
    tiling = _Tiling.of(x.shape, _RUN, 2)
    hidden = gated.shape[1]
    backward = out_grad is not None and gate_grad is not None
    with torch.cuda.device_of(x):
        kernels.gated_depthwise[(gated.shape[0] * hidden * tiling.parts,)](
            x, taps.contiguous(), gated, out_grad if backward else gated, gate_grad if backward else gated,
            hidden, *x.shape[2:], tiling.parts, tiling.run, GRADIENT=backward, **tiling.options,
        )  # fmt: skip


def normalize(x: Tensor) -> Tensor:
    """Divide (B, C, N) by its standard deviation over channels."""
    out = torch.empty_like(x)
    grid, options = _columns(x.shape)
    with torch.cuda.device_of(x):
        kernels.normalize[grid](x, out, *x.shape[1:], EPS=NORM_EPS, **options)
    return out


def normalize_backward(x: Tensor, grad: Tensor, residual: Tensor) -> Tensor:
    """Return the gradient of x from that of the normalized x, plus ``residual``; all (B, C, N)."""
    out = torch.empty_like(x)
    grid, options = _columns(x.shape)
    with torch.cuda.device_of(x):
        kernels.normalize_backward[grid](x, grad, residual, out, *x.shape[1:], EPS=NORM_EPS, **options)
    return out


def _columns(shape: torch.Size) -> tuple[tuple[int, int], dict[str, int]]:
    channels = power_of_two(shape[1])
    voxels = min(128, max(8, _TILE // channels))
    return (-(-shape[2] // voxels), shape[0]), {"CHANNELS": channels, "VOXELS": voxels}


def apply_matrix(matrix: Tensor, x: Tensor) -> Tensor:
    """Return ``matrix @ x``: (R, C) or (B, R, C), and (B, C, N), to (B, R, N)."""
    return torch.bmm(matrix.expand(x.shape[0], -1, -1), x)


def outer_products(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b.mT`` of every sample: (B, R, N) and (B, C, N) to (B, R, C).

    A product with few rows and columns and a very long sum would keep one multiprocessor busy and the others idle:
    the sum is cut into pieces that run side by side and are then added up.
    """
    whole = a.shape[2] - a.shape[2] % _CHUNK
    out = torch.bmm(a[..., whole:], b[..., whole:].mT)
    if whole:
        pieces = [_in_pieces(i[:, :whole]) @ _in_pieces(j[:, :whole]).mT for i, j in zip(a, b, strict=True)]
        out += torch.stack([piece.sum(0) for piece in pieces])
    return out


def _in_pieces(matrix: Tensor) -> Tensor:
    return matrix.unflatten(1, (-1, _CHUNK)).movedim(1, 0)
