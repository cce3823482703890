"""The cluster from Python, without a server: for batch work and notebooks."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, overload

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cluster.blueprint import draw_up
from cluster.config import ClusterConfig
from cluster.constraints import ConstraintChecker
from cluster.driver import Driver
from cluster.errors import InvalidRequest, Overloaded, Violation
from cluster.prompts import bias_of, constraint_of, ids_of, prompts_of, texts_of
from cluster.rank_group import Launcher, OnProgress
from cluster.ray_environment import prepare_local_ray
from cluster.request import (
    BeamParams,
    Constraint,
    FinishReason,
    ModelInfo,
    Request,
    SamplingParams,
    Stopping,
    Usage,
)
from cluster.text import TextStream
from cluster.validation import max_prompt_bytes, validate
from shards.contract import Logprobs

Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class Generation:
    """What a prompt was continued with.

    `text` is "" for a model without a tokenizer. `logprobs` has one entry per token of `token_ids`
    and `prompt_logprobs` one per token of the prompt (None for the first), where asked for. `score`
    is that of a beam search's best hypothesis.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    usage: Usage
    seed: int
    logprobs: tuple[Logprobs, ...] | None = None
    prompt_logprobs: tuple[Logprobs | None, ...] | None = None
    score: float | None = None


@dataclass(slots=True)
class _Collector:
    """One prompt's stream, and what came out of it so far."""

    stream: TextStream
    request: Request
    tokens: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)

    def finish(self) -> Generation:
        """Read to the end."""
        prompt_logprobs, last = None, None
        for delta in self.stream:
            self.tokens.extend(delta.tokens)
            self.text.append(delta.text)
            self.logprobs.extend(delta.logprobs)
            prompt_logprobs = delta.prompt_logprobs or prompt_logprobs
            last = delta
        if last is None or last.finish is None or last.usage is None or last.seed is None:
            raise RuntimeError(f"the stream of request {self.request.id} ended without a finish")
        asked = self.request.sampling.logprobs is not None
        return Generation(
            token_ids=tuple(self.tokens),
            text="".join(self.text),
            finish_reason=last.finish,
            usage=last.usage,
            seed=last.seed,
            logprobs=tuple(self.logprobs) if asked else None,
            prompt_logprobs=prompt_logprobs,
            score=last.score,
        )


class Engine:
    """A driver and its shards, started with the `with` block and gone after it.

    Uses the Ray that this process is connected to, or starts one of its own on loopback.

        with Engine(ClusterConfig(model="path/to/model", tensor_parallel=2)) as engine:
            print(engine.generate("The capital of France is", max_tokens=8, temperature=0).text)
    """

    def __init__(
        self,
        config: ClusterConfig,
        *,
        launcher: Launcher | None = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        """Opens and checks the model; starts nothing yet. `launcher` replaces Ray's."""
        self._driver = Driver(draw_up(config))
        self._config = config
        self._launcher = launcher
        self._on_progress = on_progress
        self._ray: object | None = None
        self._constraints: ConstraintChecker | None = None

    @property
    def model(self) -> ModelInfo:
        return self._driver.model

    @property
    def driver(self) -> Driver:
        return self._driver

    def start(self) -> Self:
        """Start the ranks and wait until they are ready. `with` does it."""
        launcher = self._launcher
        if launcher is None:
            prepare_local_ray()
            from cluster.shard_group import LocalRay, RayLauncher, local_cpus

            self._ray = LocalRay(local_cpus(self._config))
            launcher = RayLauncher(self._config)
        try:
            self._driver.start(launcher, self._on_progress)
        except BaseException:
            self.stop()
            raise
        codec = self._driver.codec
        if codec is not None:
            self._constraints = ConstraintChecker(codec, self.model.eos_token_ids)
        return self

    def stop(self) -> None:
        """End the ranks, and Ray if it was started here. Idempotent."""
        self._driver.stop()
        if self._constraints is not None:
            self._constraints.close()
        if self._ray is not None:
            from cluster.shard_group import LocalRay

            assert isinstance(self._ray, LocalRay)
            self._ray.stop()
            self._ray = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    # A str is a Sequence[str] too: the first that fits is meant.
    @overload
    def generate(self, prompt: str, **options: Any) -> Generation: ...
    @overload
    def generate(self, prompt: Sequence[int], **options: Any) -> Generation: ...
    @overload
    def generate(self, prompt: Sequence[Prompt], **options: Any) -> list[Generation]: ...

    def generate(  # type: ignore[misc] # the overloads need not repeat its options
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        max_tokens: int | None = 128,
        min_tokens: int = 0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: dict[int, float] | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Iterable[int] | None = None,
        ignore_eos: bool = False,
        include_stop: bool = False,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        beam_width: int | None = None,
        length_penalty: float = 1.0,
        early_stopping: bool = False,
        json_schema: str | Mapping[str, Any] | bool | None = None,
        regex: str | None = None,
        lark: str | None = None,
        choices: Sequence[str] | None = None,
        progress: bool | None = None,
    ) -> Generation | list[Generation]:
        """Continue a prompt, or each of a list of prompts; text and token ids may be mixed, and
        ids may come in an array or tensor.

        The parameters are those of `cluster.request.SamplingParams` and `Stopping`; `max_tokens`
        None goes as far as the context. `beam_width` searches for the likeliest continuation, as
        `BeamParams` says, and gives the best one. `json_schema`, `regex`, `lark` or `choices` is
        what the text has to be (docs/structured_output.md); only one may be given. `progress` shows
        a bar (by default for lists). Raises `InvalidRequest` naming every fault, before anything is
        computed, `NoToken` where no token can be picked, and `Unavailable` if the shard group dies.
        """
        sampling = SamplingParams(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            seed=seed,
            logit_bias=bias_of("logit_bias", logit_bias),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )
        stopping = Stopping(
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            strings=texts_of("stop", stop),
            token_ids=ids_of("stop_token_ids", stop_token_ids),
            ignore_eos=ignore_eos,
            include_stop=include_stop,
        )
        beams = None
        if beam_width is not None:
            beams = BeamParams(beam_width, length_penalty, early_stopping)
        prompts, single = prompts_of(prompt)
        constraint = constraint_of(json_schema=json_schema, regex=regex, lark=lark, choices=choices)
        requests = [self._request(one, sampling, stopping, beams, constraint) for one in prompts]
        show = len(requests) > 1 if progress is None else progress
        generations = self._run(requests, show)
        return generations[0] if single else generations

    def _request(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        stopping: Stopping,
        beams: BeamParams | None,
        constraint: Constraint | None,
    ) -> Request:
        codec = self._driver.codec
        if isinstance(prompt, str):
            if codec is None:
                raise InvalidRequest(
                    Violation("prompt", "this model has no tokenizer: give token ids, not text")
                )
            if len(prompt) > max_prompt_bytes(codec, self.model):  # a character is a byte or more
                raise InvalidRequest(
                    Violation(
                        "prompt",
                        f"{len(prompt)} characters cannot fit into a context of "
                        f"{self.model.context} tokens: give a shorter text",
                    )
                )
            prompt = codec.encode(prompt)
        request = Request(
            f"engine-{secrets.token_hex(8)}",
            tuple(prompt),
            sampling,
            stopping,
            beams=beams,
            constraint=constraint,
        )
        validate(request, self.model, has_tokenizer=codec is not None)
        if self._constraints is not None:
            self._constraints.check(request)
        return request

    def _run(self, requests: list[Request], show: bool) -> list[Generation]:
        """Keep the queue full, and collect in order."""
        waiting, running = deque(requests), deque[_Collector]()
        generations: list[Generation] = []
        with Progress(
            TextColumn("generating"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            disable=not show,
        ) as bar:
            task = bar.add_task("", total=len(requests))
            try:
                while waiting or running:
                    while waiting and (collector := self._submit(waiting[0], bool(running))):
                        running.append(collector)
                        waiting.popleft()
                    generations.append(running[0].finish())
                    running.popleft()
                    bar.advance(task)
            finally:
                for collector in running:
                    collector.stream.close()
        return generations

    def _submit(self, request: Request, others_running: bool) -> _Collector | None:
        """None where the queue is full and will drain once a running one has been collected."""
        try:
            stream = self._driver.submit(request)
        except Overloaded:
            if others_running:
                return None
            raise
        return _Collector(TextStream(self._driver.codec, request, stream), request)
