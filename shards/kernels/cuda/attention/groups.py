"""Query heads in whole groups, as attention libraries want them.

Shape letters: T rows, N a rank's query heads, K KV heads, G query heads to a KV head, H head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from shards.kernels.base import Pattern


@dataclass(frozen=True, slots=True)
class Groups:
    """Of `kv_heads` KV heads, each read by `size` query heads, some of which may stand empty.

    `places` is where each of a rank's query heads lies among all of them; None where a rank's
    groups are whole and they lie in order.
    """

    kv_heads: int
    size: int
    places: torch.Tensor | None

    @property
    def heads(self) -> int:
        return self.kv_heads * self.size

    def spread(self, q_TNH: torch.Tensor) -> torch.Tensor:
        """[T, K * G, H], zero where no head is."""
        if self.places is None:
            return q_TNH
        spread = q_TNH.new_zeros(q_TNH.shape[0], self.heads, q_TNH.shape[2])
        return spread.index_copy_(1, self.places, q_TNH)

    def collect(self, out: torch.Tensor) -> torch.Tensor:
        """The inverse of `spread`."""
        return out if self.places is None else out.index_select(1, self.places)


def groups_of(pattern: Pattern, device: torch.device) -> Groups:
    return _groups(pattern.kv_of_head, device)


@cache
def _groups(kv_of_head: tuple[int, ...], device: torch.device) -> Groups:
    kv_heads = kv_of_head[-1] + 1
    size = max(kv_of_head.count(kv) for kv in range(kv_heads))
    if len(kv_of_head) == kv_heads * size:
        return Groups(kv_heads, size, None)
    places = [kv * size + h - kv_of_head.index(kv) for h, kv in enumerate(kv_of_head)]
    return Groups(kv_heads, size, torch.tensor(places, device=device))
