"""What lies between ranks, and what a collective over it takes: the alpha-beta model.

A message of n bytes takes alpha + n / bandwidth. Over `world` ranks an all-reduce of n bytes takes

    ring      start + 2 (world - 1) alpha + 2 (world - 1) / world * n / bandwidth
    one-shot  start + alpha + (world - 1) * n / bandwidth

(Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication Operations in MPICH",
2005). In the one-shot form every rank reads all the others' vectors and sums them itself, which
needs memory that they can reach; small messages are faster that way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shards.cost.errors import CannotPredict


@dataclass(frozen=True, slots=True)
class Link:
    """`bandwidth` is bytes/s of one rank in one direction, by the standard or the data sheet;
    `share` of it is attained. `alpha_s` is lost at every hop, `start_s` once per collective:
    launch, and the barrier that tells that everyone has arrived."""

    name: str
    bandwidth: float
    alpha_s: float
    start_s: float
    one_shot: bool
    share: float = 0.8

    def all_reduce_s(self, world: int, nbytes: float) -> float:
        """Seconds from the last rank's arrival on; 0 for one rank. The faster form is taken."""
        if world == 1:
            return 0.0
        transfer = nbytes / (self.bandwidth * self.share)
        ring = self.start_s + 2 * (world - 1) * (self.alpha_s + transfer / world)
        if not self.one_shot:
            return ring
        return min(ring, self.start_s + self.alpha_s + (world - 1) * transfer)

    def gather_s(self, world: int, nbytes: float) -> float:
        """`nbytes` from all the other ranks together arrive at one; 0 for one rank."""
        if world == 1:
            return 0.0
        return self.start_s + self.alpha_s + nbytes / (self.bandwidth * self.share)


_GIGABIT = 1e9 / 8

LINKS: Mapping[str, Link] = {
    link.name: link
    for link in (
        # Half of the total bandwidth per GPU in the A100, H100 and HGX B200 datasheets. Latencies:
        # what NCCL takes for a few KB over 2 to 8 GPUs, fitted to gpt-fast's A100 table.
        Link("nvlink3", 300e9, 1e-6, 8e-6, one_shot=True),
        Link("nvlink4", 450e9, 1e-6, 8e-6, one_shot=True),
        Link("nvlink5", 900e9, 1e-6, 8e-6, one_shot=True),
        # Seven links of 64 GB/s to the other MI300X of a board (AMD Instinct MI300X data sheet).
        Link("infinity-fabric", 448e9, 2e-6, 10e-6, one_shot=True),
        # PCI Express 4.0 and 5.0, 16 lanes, 128b/130b. NCCL goes through host memory.
        Link("pcie4", 31.5e9, 4e-6, 10e-6, one_shot=False),
        Link("pcie5", 63e9, 4e-6, 10e-6, one_shot=False),
        # TCP sockets: a hop is two system calls, an interrupt and a wake-up.
        Link("ethernet-25", 25 * _GIGABIT, 30e-6, 10e-6, one_shot=False),
        Link("ethernet-100", 100 * _GIGABIT, 30e-6, 10e-6, one_shot=False),
        Link("ethernet-400", 400 * _GIGABIT, 30e-6, 10e-6, one_shot=False),
        # InfiniBand NDR, 4 lanes, one port per GPU, with GPUDirect RDMA.
        Link("infiniband-ndr", 400 * _GIGABIT, 4e-6, 10e-6, one_shot=False),
        # headwise's own all-reduce between processes of one host. `bandwidth` is that of reading
        # what another core has written; `headwise bench collectives` measures both.
        Link("shared-memory", 15e9, 1e-6, 2e-6, one_shot=True, share=1.0),
    )
}


def link(name: str) -> Link:
    """The one of that name; `CannotPredict` where there is none."""
    if name not in LINKS:
        raise CannotPredict(f"link {name}: known are {', '.join(LINKS)}")
    return LINKS[name]
