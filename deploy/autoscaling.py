"""How many replicas of a model there should be, by what each of them says of its load.

Serve asks the policy for a number, and does the rest: bounds, delays and the actors. Requests do
not travel through Serve, so its own count of them says nothing here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

ONGOING = "ongoing_requests"
KV_USE = "kv_utilization"


class Autoscaling(BaseModel):
    """Between `min_replicas` and `max_replicas`, as many as keep each one's running and waiting
    samples at `target_ongoing_requests` and its KV cache filled to `target_kv_utilization`.

    A wish for more has to last for `upscale_delay_s`, one for fewer for `downscale_delay_s`; what
    counts is the mean of the last `look_back_s`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_replicas: Annotated[int, Field(ge=1)] = 1
    max_replicas: Annotated[int, Field(ge=1)]
    target_ongoing_requests: Annotated[float, Field(gt=0)] = 16
    target_kv_utilization: Annotated[float, Field(gt=0, le=1)] = 0.8
    upscale_delay_s: Annotated[float, Field(ge=0)] = 10
    downscale_delay_s: Annotated[float, Field(ge=0)] = 300
    look_back_s: Annotated[float, Field(gt=0)] = 15

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Autoscaling:
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas={self.max_replicas} is below min_replicas={self.min_replicas}: "
                "raise the one or lower the other"
            )
        return self

    def for_serve(self) -> dict[str, Any]:
        """The deployment's `autoscaling_config`."""
        return {
            "min_replicas": self.min_replicas,
            "max_replicas": self.max_replicas,
            "upscale_delay_s": self.upscale_delay_s,
            "downscale_delay_s": self.downscale_delay_s,
            "look_back_period_s": self.look_back_s,
            "policy": {
                "policy_function": f"{Policy.__module__}:{Policy.__qualname__}",
                "policy_kwargs": {
                    "target_ongoing_requests": self.target_ongoing_requests,
                    "target_kv_utilization": self.target_kv_utilization,
                },
            },
        }


class Policy:
    """What Serve calls with its `AutoscalingContext`."""

    def __init__(self, *, target_ongoing_requests: float, target_kv_utilization: float) -> None:
        self._targets = {ONGOING: target_ongoing_requests, KV_USE: target_kv_utilization}

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The wish, and the policy's memory, which it has none of."""
        now = context.target_num_replicas
        return wanted_replicas(now, context.aggregated_metrics or {}, self._targets), {}


def wanted_replicas(
    now: int, metrics: Mapping[str, Mapping[Any, float]], targets: Mapping[str, float]
) -> int:
    """As many as bring the sum of each metric over all replicas down to its target for each.

    `metrics`: name -> replica -> value. Replicas that have not said anything yet, since they have
    just started, count as they were before the decision: `now` stands where nobody has.
    """
    wishes = [
        math.ceil(sum(metrics[name].values()) / target)
        for name, target in targets.items()
        if metrics.get(name)
    ]
    return max(1, *wishes) if wishes else now
