"""The requests of a run, each a function of the seed and its number alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from deploy.bench.lengths import SHAREGPT_INPUT, SHAREGPT_OUTPUT, parse_lengths
from deploy.bench.settings import BadLoad, Settings

if TYPE_CHECKING:
    from headwise import GenerateOptions, ModelInfo

# What is drawn from one seed, each with random numbers of its own.
_PREFIX, _ARRIVALS, _WARMUP, _MEASURED = range(4)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request ready to be sent: `options` as the SDK's `stream` takes them."""

    index: int
    prompt: list[int]
    options: GenerateOptions


class Workload:
    """Prompts of random token ids within the model's vocabulary, end tokens left out.

    Every prompt begins with the same `prefix_len` ids; `input_len` counts what follows them. Raises
    `BadLoad` where no request would fit into the model's context; drawn lengths are cut to fit.
    """

    def __init__(self, settings: Settings, model: ModelInfo) -> None:
        self._settings = settings
        self._input = parse_lengths("--input-len", settings.input_len, SHAREGPT_INPUT)
        self._output = parse_lengths("--output-len", settings.output_len, SHAREGPT_OUTPUT)
        self._room = model.context - settings.prefix_len
        least = self._input.least + self._output.least
        if least > self._room:
            raise BadLoad(
                f"{settings.prefix_len} + {self._input.least} + {self._output.least} tokens of "
                f"prefix, input and output are more than the context of {model.name}, "
                f"{model.context}: lower --prefix-len, --input-len or --output-len"
            )
        self._ids = np.setdiff1d(np.arange(model.vocabulary), model.eos_token_ids)
        self._prefix = self._draw_ids(self._rng(_PREFIX), settings.prefix_len)

    def measured(self, index: int) -> Prepared:
        return self._prepare(_MEASURED, index)

    def warmup(self, index: int) -> Prepared:
        """Other prompts than the measured ones, after the same prefix."""
        return self._prepare(_WARMUP, index)

    def arrivals_rng(self) -> np.random.Generator:
        return self._rng(_ARRIVALS)

    def _prepare(self, purpose: int, index: int) -> Prepared:
        rng = self._rng(purpose, index)
        output = min(self._output.draw(rng), self._room - self._input.least)
        length = min(self._input.draw(rng), self._room - output)
        return Prepared(
            index,
            self._prefix + self._draw_ids(rng, length),
            {
                "max_tokens": output,
                "ignore_eos": self._settings.ignore_eos,
                "temperature": self._settings.temperature,
                "seed": int(rng.integers(2**32)),
                "timeout": self._settings.timeout_s,
            },
        )

    def _draw_ids(self, rng: np.random.Generator, count: int) -> list[int]:
        drawn: list[int] = self._ids[rng.integers(len(self._ids), size=count)].tolist()
        return drawn

    def _rng(self, purpose: int, index: int = 0) -> np.random.Generator:
        return np.random.default_rng([self._settings.seed, purpose, index])
