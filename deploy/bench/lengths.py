"""How many tokens prompts and answers have: a number, or a mix of log-normal distributions."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np

from deploy.bench.settings import BadLoad


@dataclass(frozen=True, slots=True)
class Part:
    """Log-normal: `median` tokens, `sigma` of the logarithm; 0 makes it a fixed length."""

    median: float
    sigma: float
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Lengths:
    """A mix of `parts`, whose weights add up to 1; a draw is from 1 to `most` tokens."""

    parts: tuple[Part, ...]
    most: int | None = None

    @property
    def least(self) -> int:
        """No draw is smaller, and a fixed length is all that is ever drawn."""
        (first, *others) = self.parts
        return 1 if others or first.sigma else int(first.median)

    def draw(self, rng: np.random.Generator) -> int:
        part = self.parts[rng.choice(len(self.parts), p=[part.weight for part in self.parts])]
        drawn = max(1, round(rng.lognormal(math.log(part.median), part.sigma)))
        return drawn if self.most is None else min(drawn, self.most)


# Like conversations with an assistant, in the manner of ShareGPT: questions of a line and pasted
# text, short answers and long ones. About 150 tokens in and 320 out on average, with long tails.
SHAREGPT_INPUT = Lengths((Part(22, 0.9, 0.65), Part(250, 1.0, 0.35)), most=1024)
SHAREGPT_OUTPUT = Lengths((Part(25, 0.9, 0.25), Part(330, 0.75, 0.75)), most=1024)

_LOGNORMAL = re.compile(r"lognormal:(?P<median>\d+(\.\d+)?),(?P<sigma>\d+(\.\d+)?)")


def parse_lengths(option: str, text: str, sharegpt: Lengths) -> Lengths:
    """`128`, `lognormal:MEDIAN,SIGMA` or `sharegpt`, which stands for the mix given. Raises
    `BadLoad` naming `option`."""
    if text == "sharegpt":
        return sharegpt
    if text.isascii() and text.isdigit() and int(text) > 0:
        return Lengths((Part(int(text), 0),))
    found = _LOGNORMAL.fullmatch(text)
    if found is None or float(found["median"]) < 1:
        raise BadLoad(
            f"{option}={text}: give a number of tokens from 1, lognormal:MEDIAN,SIGMA, or sharegpt"
        )
    return Lengths((Part(float(found["median"]), float(found["sigma"])),))
