"""`TextDelta`s become messages of `vllm.grpc.engine`.

Chunks carry what is new, as those of vLLM's own service do. A sample's last message is a
`GenerateComplete` with all of its tokens; log probabilities are in it where there were no chunks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from cluster.request import FinishReason, Request
from cluster.text import TextDelta
from deploy.edge.text import spelled_tokens
from shards.contract import Logprobs

_FINISH = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.ABORTED: "abort",
}


class Sample:
    """What one sample of a request has brought so far."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._tokens: list[int] = []
        self._logprobs: list[Logprobs] = []
        self._prompt_logprobs: tuple[Logprobs | None, ...] | None = None
        self.spelled = 0
        """Tokens with a log probability that `complete` will tell."""

    def add(self, delta: TextDelta) -> None:
        self._tokens += delta.tokens

    def add_logprobs(self, delta: TextDelta) -> None:
        """For `complete`, where no chunk has told them."""
        self._logprobs += delta.logprobs
        self._prompt_logprobs = self._prompt_logprobs or delta.prompt_logprobs
        self.spelled += spelled_tokens(delta)

    def chunk(self, delta: TextDelta) -> pb.GenerateResponse:
        """What is new: the numbers of tokens too."""
        chunk = pb.GenerateStreamChunk(
            token_ids=delta.tokens,
            prompt_tokens=len(self._request.prompt),
            completion_tokens=len(delta.tokens),
            output_logprobs=_output_logprobs(delta.logprobs),
            input_logprobs=_input_logprobs(delta.prompt_logprobs, self._request.prompt),
            index=delta.index,
        )
        return pb.GenerateResponse(chunk=chunk)

    def complete(self, delta: TextDelta) -> pb.GenerateResponse:
        """`delta` is the sample's last, whose `finish` is not DEADLINE: that is a status."""
        assert delta.finish is not None
        usage = delta.usage
        complete = pb.GenerateComplete(
            output_ids=self._tokens,
            finish_reason=_FINISH[delta.finish],
            prompt_tokens=len(self._request.prompt),
            completion_tokens=len(self._tokens),
            cached_tokens=0 if usage is None else usage.cached_tokens,
            output_logprobs=_output_logprobs(self._logprobs),
            input_logprobs=_input_logprobs(self._prompt_logprobs, self._request.prompt),
            index=delta.index,
        )
        if isinstance(delta.matched, str):
            complete.matched_stop_str = delta.matched
        # vLLM names stop tokens that were asked for, not the model's own end.
        elif delta.matched is not None and delta.matched in self._request.stopping.token_ids:
            complete.matched_token_id = delta.matched
        return pb.GenerateResponse(complete=complete)


def _output_logprobs(entries: Sequence[Logprobs]) -> pb.OutputLogProbs | None:
    if not entries:
        return None
    return pb.OutputLogProbs(
        token_logprobs=[entry.logprob for entry in entries],
        token_ids=[entry.token for entry in entries],
        top_logprobs=_tops(entries),
    )


def _input_logprobs(
    entries: Sequence[Logprobs | None] | None, prompt: Sequence[int]
) -> pb.InputLogProbs | None:
    """One per prompt token; the first has nothing before it, and its value stays unset."""
    if entries is None:
        return None
    return pb.InputLogProbs(
        token_logprobs=[
            pb.InputTokenLogProb(value=None if entry is None else entry.logprob)
            for entry in entries
        ],
        token_ids=prompt,
        top_logprobs=_tops(entries),
    )


def _tops(entries: Iterable[Logprobs | None]) -> list[pb.TopLogProbs]:
    """One for each entry, or none at all where none were asked for."""
    tops = [
        pb.TopLogProbs()
        if entry is None
        else pb.TopLogProbs(values=entry.top_logprobs, token_ids=entry.top_tokens)
        for entry in entries
    ]
    return tops if any(top.token_ids for top in tops) else []
