"""Multi-head latent attention in its absorbed form, in plain PyTorch (arXiv:2405.04434).

A query's product with a key up-projected from the latent is that of the query, projected down by
the same matrix, with the latent itself: so all heads attend to one cached row of latent and rotated
channels, and their answers are projected up afterwards.

Shape letters: T tokens, N query heads, L latent, R rotated channels, V value_dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from shards.kernels.base import Latent, M
from shards.kernels.reference.elementwise import norm

Rotate = Callable[[torch.Tensor], torch.Tensor]


def absorb(
    queries_TQ: torch.Tensor, latents_TC: torch.Tensor, latent: Latent[M], rotate: Rotate
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries [T, N, L + R], and what is cached of each token, [T, 1, L + R].

    `queries_TQ` are whole heads [nope + R]; `latents_TC` the latent [L], before its norm, and the
    channels [R] to be rotated. `rotate` turns [T, heads, R].
    """
    heads, nope, width = latent.key_up.shape
    q_TNQ = torch.unflatten(queries_TQ, 1, (heads, -1))
    absorbed_TNL = torch.einsum("tnq,nql->tnl", q_TNQ[..., :nope], latent.key_up)
    q_TNC = torch.cat((absorbed_TNL, rotate(q_TNQ[..., nope:])), -1)
    normed_TL = norm(latents_TC[:, :width], latent.norm)
    turned_T1R = rotate(latents_TC[:, None, width:])
    return q_TNC, torch.cat((normed_TL[:, None], turned_T1R), -1)


def unfold(y_TNL: torch.Tensor, latent: Latent[M]) -> torch.Tensor:
    """Weighed latents to values: [T, N * V]."""
    return torch.einsum("tnl,nvl->tnv", y_TNL, latent.value_up).flatten(1)
