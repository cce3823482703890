"""Headwise itself, in this process, without a server."""

from __future__ import annotations

import statistics
from collections import defaultdict

from cluster.driver import Driver
from deploy.bench.peers.contender import Decode, Prefill, Workload
from deploy.bench.suite.probe import Probe
from shards.contract import PhaseSeconds


class HeadwiseContender:
    """A started engine's driver."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._phases: defaultdict[Workload, list[dict[str, float]]] = defaultdict(list)

    def tokens_per_s(self, workload: Workload, seed: int) -> float:
        probe = Probe(self._driver, seed)
        match workload:
            case Prefill(tokens):
                return tokens / probe.prefill_s(tokens)
            case Decode(streams, prompt, tokens):
                found = probe.decode(streams, prompt, tokens)
                spent = {
                    name: getattr(found.phases, name) / found.tokens
                    for name in PhaseSeconds.__struct_fields__
                }
                self._phases[workload].append({**spent, "step": found.step_s})
                return found.tokens_per_s

    def phases_s(self) -> dict[Workload, dict[str, float]]:
        """Where a decode step of each workload went, medians: rank 0's phases, their total, and the
        whole step as the driver sees it."""
        return {
            workload: {name: statistics.median(run[name] for run in runs) for name in runs[0]}
            for workload, runs in self._phases.items()
        }
