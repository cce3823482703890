"""Messages to dataclasses and back, without a server."""

from __future__ import annotations

import math

import pytest

from cluster.request import BeamParams, FinishReason, SamplingParams, Stopping, Timing, Usage
from deploy import codec
from headwise.v1 import inference_pb2 as pb
from shards.contract import Logprobs


def test_empty_messages_are_the_defaults() -> None:
    assert codec.sampling_params(pb.Sampling(), pb.OutputOptions()) == SamplingParams()
    assert codec.stopping(pb.Stopping()) == (Stopping(), [])


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty"])
def test_zero_is_a_value_and_not_absence(name: str) -> None:
    params = codec.sampling_params(pb.Sampling(**{name: 0}), pb.OutputOptions())

    assert getattr(params, name) == 0


def test_zero_limits_and_false_arrive() -> None:
    stopping, _ = codec.stopping(pb.Stopping(max_tokens=0, ignore_eos=False))
    params = codec.sampling_params(pb.Sampling(seed=0), pb.OutputOptions(logprobs=0))

    assert stopping.max_tokens == 0
    assert (params.seed, params.logprobs, params.prompt_logprobs) == (0, 0, None)


def test_a_beam_search_is_asked_for_or_not() -> None:
    assert codec.beam_params(pb.GenerateRequest()) is None
    assert codec.beam_params(pb.GenerateRequest(beam_search=pb.BeamSearch(width=4))) == BeamParams(
        4
    )
    assert codec.beam_params(
        pb.GenerateRequest(
            beam_search=pb.BeamSearch(width=2, length_penalty=0.7, early_stopping=True)
        )
    ) == BeamParams(2, 0.7, True)


@pytest.mark.parametrize("value", [0.1, 0.7, 1e-7, 1.5, 3.4e38, 0.0, -2.0])
def test_floats_keep_the_decimal_that_was_written(value: float) -> None:
    message = pb.Sampling(temperature=value, logit_bias={1: value})
    params = codec.sampling_params(message, pb.OutputOptions())

    assert params.temperature == value
    assert params.logit_bias == {1: value}


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinities_reach_validation(value: float) -> None:
    params = codec.sampling_params(pb.Sampling(top_p=value), pb.OutputOptions())

    assert params.top_p == value


def test_nan_reaches_validation() -> None:
    params = codec.sampling_params(pb.Sampling(top_p=math.nan), pb.OutputOptions())

    assert math.isnan(params.top_p)


def test_stop_conditions_keep_their_order_and_faults_their_index() -> None:
    message = pb.Stopping(
        conditions=[
            pb.StopCondition(text="a"),
            pb.StopCondition(token_id=0),
            pb.StopCondition(),
            pb.StopCondition(text=""),
        ]
    )
    stopping, faults = codec.stopping(message)

    assert stopping.strings == ("a", "")
    assert stopping.token_ids == (0,)
    assert [fault.field for fault in faults] == ["stopping.conditions[2]"]


def test_a_chat_becomes_a_generate_request_with_presence_kept() -> None:
    plain = codec.generate_request(pb.ChatRequest())
    full = codec.generate_request(
        pb.ChatRequest(request_id="r", model="m", n=0, priority=0, generated=pb.TokenIds(ids=[1]))
    )

    assert not plain.HasField("n")
    assert not plain.HasField("priority")
    assert full.HasField("n")
    assert full.HasField("priority")
    assert (full.request_id, full.model, list(full.generated.ids)) == ("r", "m", [1])


def test_a_chat_delta_is_the_same_delta() -> None:
    message = pb.GenerateResponse(
        request_id="r",
        index=2,
        text="x",
        token_ids=[1],
        logprobs=[pb.TokenLogprob(token_id=1)],
        finish=pb.Finish(seed=3),
    )
    response = codec.chat_response(message)

    for field in ("request_id", "index", "text", "token_ids", "logprobs", "finish"):
        assert getattr(response, field) == getattr(message, field)
    assert not codec.chat_response(pb.GenerateResponse()).HasField("request_id")
    assert not codec.chat_response(pb.GenerateResponse()).HasField("finish")


def test_the_first_prompt_token_has_no_logprob() -> None:
    first, second = codec.prompt_logprobs([None, Logprobs(8, -1.0, 3)], (7, 8), str)

    assert (first.token_id, first.text, first.HasField("logprob")) == (7, "7", False)
    assert (second.token_id, second.logprob, second.rank) == (8, -1.0, 3)


@pytest.mark.parametrize(
    ("reason", "wire"),
    [
        (FinishReason.STOP, pb.FINISH_REASON_STOP),
        (FinishReason.LENGTH, pb.FINISH_REASON_LENGTH),
        (FinishReason.ABORTED, pb.FINISH_REASON_ABORTED),
    ],
)
def test_finish(reason: FinishReason, wire: int) -> None:
    message = codec.finish(reason, 0, Usage(3, 4, 1), Timing(0.1, 0.2, 0.3), 2**64 - 1)

    assert message.reason == wire
    assert message.matched.WhichOneof("condition") == "token_id"
    usage = message.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (3, 4, 1)
    assert (usage.queue_seconds, usage.first_token_seconds, usage.total_seconds) == (0.1, 0.2, 0.3)
    assert message.seed == 2**64 - 1
    assert not message.HasField("score")


def test_the_score_of_a_hypothesis_may_be_zero() -> None:
    message = codec.finish(FinishReason.LENGTH, None, None, None, 0, score=0.0)

    assert message.HasField("score")


def test_timestamps_are_exact_to_the_microsecond() -> None:
    assert codec.timestamp(1_700_000_000.999999).ToMicroseconds() == 1_700_000_000_999_999
