"""When the requests of an open loop are due."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def arrivals(rate: float, burstiness: float, rng: np.random.Generator) -> Iterator[float]:
    """Seconds after the start, without end, `rate` per second on average.

    The gaps are gamma distributed with shape `burstiness`: 1 is a Poisson process, less comes in
    bursts, more comes evenly. Their coefficient of variation is 1 / sqrt(burstiness).
    """
    due = 0.0
    while True:
        due += rng.gamma(burstiness, 1 / (rate * burstiness))
        yield due
