"""The small matrices of attention over channels: from Gram matrix and lengths to attention, and back.

They are C x C at most, so float64 costs nothing and keeps the gradients exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_EPS = 1e-12  # of torch.nn.functional.normalize


def attention_matrices(products: Tensor, squares: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return cosines of queries and keys, attention, and the inverse lengths of queries and of keys.

    Parameters
    ----------
    products
        ``queries @ keys.T`` of every head, (B, heads, c, c).
    squares
        Squared lengths of queries and keys, (B, 2, heads, c).
    temperature
        (heads, 1, 1).
    """
    inverse = 1 / squares.sqrt().clamp_min(_EPS)
    cosines = products * inverse[:, 0, :, :, None] * inverse[:, 1, :, None, :]
    attention = (cosines * temperature.double().view(1, -1, 1, 1)).softmax(-1)
    return cosines, attention, inverse[:, 0], inverse[:, 1]


def mix_heads(matrix: Tensor, blocks: Tensor) -> Tensor:
    """Return ``matrix @ block_diagonal(blocks)``: (…, R, C) and (B, heads, c, c) to (B, R, C)."""
    split = matrix.unflatten(-1, blocks.shape[1:3]).movedim(-2, -3)  # (…, heads, R, c)
    return (split @ blocks).movedim(-3, -2).flatten(-2)


@dataclass(frozen=True)
class AttentionGradients:
    """What flows back through projection, softmax and normalization.

    ``products`` (B, heads, c, c) is the gradient of ``queries @ keys.T``; ``own`` (B, 2C) multiplies each query and
    key channel itself, because of its length; ``mixed`` (B, C, C) is what was applied to the values.
    """

    products: Tensor
    own: Tensor
    mixed: Tensor
    temperature: Tensor
    project_out: Tensor

    def query_key_matrix(self) -> Tensor:
        """Return the matrix (B, 2C, 2C) that turns queries and keys into the gradients of both."""
        batch, heads, size = self.products.shape[:3]
        matrix = torch.diag_embed(self.own)
        blocks = matrix.view(batch, 2, heads, size, 2, heads, size)
        blocks[:, 0, :, :, 1].diagonal(dim1=1, dim2=3).copy_(self.products.movedim(1, -1))
        blocks[:, 1, :, :, 0].diagonal(dim1=1, dim2=3).copy_(self.products.mT.movedim(1, -1))
        return matrix


def attention_gradients(
    outer: Tensor, products: Tensor, squares: Tensor, temperature: Tensor, project_out: Tensor
) -> AttentionGradients:
    """Go back from ``outer``, the gradient of the output times ``values.T`` (B, C, C)."""
    outer, project_out = outer.double(), project_out.double()
    cosines, attention, inverse_q, inverse_k = attention_matrices(products, squares, temperature)
    heads = products.shape[1:3]
    columns = outer.unflatten(2, heads).movedim(2, 1)  # (B, heads, C, c)
    projection = project_out.unflatten(1, heads).movedim(1, 0)  # (heads, C, c)
    attention_grad = projection.mT @ columns
    logits_grad = attention * (attention_grad - (attention_grad * attention).sum(-1, keepdim=True))
    cosines_grad = logits_grad * temperature.double().view(1, -1, 1, 1)
    pull = cosines_grad * cosines
    own = -torch.stack([pull.sum(-1) * inverse_q**2, pull.sum(-2) * inverse_k**2], 1)
    return AttentionGradients(
        products=cosines_grad * inverse_q[..., :, None] * inverse_k[..., None, :],
        own=(own * (squares > _EPS**2)).flatten(1),
        mixed=mix_heads(project_out, attention),
        temperature=(logits_grad * cosines).sum((0, 2, 3)),
        project_out=mix_heads(outer, attention.mT).sum(0),
    )
