"""How a stream that broke goes on: which calls ask for exactly what is still missing.

A sample is a function of its prompt, options and seed, so the same request with the tokens received
so far (`generated`) goes on at the next one. The seed is the client's own where the caller gave
none: it has to be known before anything breaks. The server begins a continuation's text where the
text for those tokens ended, inside a character or a possible stop string if need be.
"""

from __future__ import annotations

import secrets
from copy import deepcopy
from dataclasses import dataclass
from typing import TypeAlias

import grpc

from headwise._responses import Gathering, StreamMessage
from headwise._retry import Attempts
from headwise._status import read_error
from headwise.errors import HeadwiseError, InvalidRequestError
from headwise.options import RequestOptions
from headwise.types import Delta
from headwise.v1 import inference_pb2 as pb

StreamRequest: TypeAlias = pb.GenerateRequest | pb.ChatRequest

_SEEDS = 1 << 64
_SEED_STEP = 0x9E3779B97F4A7C15  # of `Sampling.seed` in the API
_LONGEST_ID = 128  # of `GenerateRequest.request_id` in the API


def sample_seed(seed: int, index: int) -> int:
    """The seed of one of a request's samples."""
    return (seed + index * _SEED_STEP) % _SEEDS


@dataclass
class Leg:
    """One call of the server, for the whole request or what is missing of one of its samples.

    `samples` are those of the request: the call's own index counts from the first. `broken` calls
    came before it.
    """

    request: StreamRequest
    samples: range
    broken: int = 0
    begun: bool = False


class Resumption:
    """What one request has so far, and what to call next; makes no call itself."""

    def __init__(self, request: StreamRequest, options: RequestOptions, attempts: Attempts) -> None:
        """Gives a request that may be resumed a seed, if it has none."""
        self.gathering = Gathering(request.request_id, request.n if request.HasField("n") else 1)
        schema = options.get("json_schema")
        if isinstance(schema, type):
            self.gathering.model = schema
        self.attempts = attempts
        self._request = request
        searches = isinstance(request, pb.GenerateRequest) and request.HasField("beam_search")
        wanted = options.get("resume") is not False and attempts.policy.resumes
        self._resumes = wanted and not searches
        if self._resumes and not request.sampling.HasField("seed"):
            request.sampling.seed = secrets.randbits(64)

    def first_leg(self) -> Leg:
        """The whole request."""
        return Leg(self._request, range(max(1, self.gathering.samples)))

    def arrived(self, leg: Leg, message: StreamMessage) -> Delta:
        """A message of a leg, as the request's; raises HeadwiseError for a wrong one."""
        leg.begun = True
        self.attempts.progressed()
        return self.gathering.add(message, leg.samples)

    def legs_after(self, leg: Leg, fault: grpc.RpcError) -> tuple[list[Leg], float]:
        """What takes a broken leg's place, nothing if all of it has come, and the seconds to wait
        first. Raises HeadwiseError if there is no other way."""
        missing = [i for i in leg.samples if not self.gathering.finished(i)]
        if not missing:
            return [], 0.0
        error = read_error(fault, self._request.request_id)
        # The server may notice later than we do that a connection is gone.
        id_in_use = leg.broken > 0 and _says_id_in_use(error)
        if leg.begun and not self._resumes:
            raise error from fault
        pause = self.attempts.pause(error, temporary=id_in_use)
        if pause is None:
            raise error from fault
        broken = leg.broken + 1
        if leg.begun:
            return [Leg(self._rest_of(i), range(i, i + 1), broken) for i in missing], pause
        if id_in_use:
            leg.request = deepcopy(leg.request)
            leg.request.request_id = self._id(f"~{broken}", leg.samples)
        return [Leg(leg.request, leg.samples, broken)], pause

    def _rest_of(self, index: int) -> StreamRequest:
        """The request for what is missing of a sample."""
        request = deepcopy(self._request)
        request.request_id = self._id("", range(index, index + 1))
        request.ClearField("n")
        if request.sampling.HasField("seed"):
            request.sampling.seed = sample_seed(request.sampling.seed, index)
        generated = self.gathering.generated(index)
        if generated:
            request.generated.ids.extend(generated)
        if self.gathering.begun(index):
            request.output.ClearField("echo")
        if index > 0 or self.gathering.begun(index):
            request.output.ClearField("prompt_logprobs")
        return request

    def _id(self, suffix: str, samples: range) -> str:
        """The request's own, as far as calls at the same time can share it."""
        if len(samples) < self.gathering.samples:
            suffix = f".{samples.start}{suffix}"
        return self._request.request_id[: _LONGEST_ID - len(suffix)] + suffix


def _says_id_in_use(error: HeadwiseError) -> bool:
    return isinstance(error, InvalidRequestError) and {
        violation.field for violation in error.violations
    } == {"request_id"}
