"""What a load is: the options of `headwise bench serve`, checked, and part of its report."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from shards.errors import HeadwiseError

DEFAULT_CONCURRENCY = 8
DEFAULT_REQUESTS = 100


class BadLoad(HeadwiseError):
    """A load that cannot be meant, or that the server cannot take."""


class Settings(BaseModel):
    """One run. `rate` makes it an open loop, in which `concurrency` is a limit, else None; without
    `rate` the loop is closed. It ends after `requests`, or sends nothing new after `duration_s`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests: int | None = Field(default=None, ge=1)
    duration_s: float | None = Field(default=None, gt=0)
    concurrency: int | None = Field(default=None, ge=1)
    rate: float | None = Field(default=None, gt=0)
    burstiness: float = Field(default=1.0, gt=0)
    input_len: str = "128"
    output_len: str = "64"
    prefix_len: int = Field(default=0, ge=0)
    ignore_eos: bool = True
    temperature: float = Field(default=0.0, ge=0)
    seed: int = Field(default=0, ge=0)
    warmup: int = Field(default=1, ge=0)
    timeout_s: float | None = Field(default=None, gt=0)
    slo_ttft_ms: float | None = Field(default=None, gt=0)
    slo_tpot_ms: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.rate is None and self.burstiness != 1:
            raise ValueError("burstiness shapes the arrivals of an open loop: give a rate with it")
        return self

    def completed(self) -> Settings:
        """The same with the defaults that depend on what was given."""
        chosen: dict[str, int] = {}
        if self.rate is None and self.concurrency is None:
            chosen["concurrency"] = DEFAULT_CONCURRENCY
        if self.requests is None and self.duration_s is None:
            chosen["requests"] = DEFAULT_REQUESTS
        return self.model_copy(update=chosen)
