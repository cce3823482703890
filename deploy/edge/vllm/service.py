"""The VllmEngine service: the same models as `headwise.v1`, in vLLM's words."""

from __future__ import annotations

import asyncio
import hashlib
import time
from datetime import UTC, datetime
from functools import partial
from typing import Any

import grpc
from smg_grpc_proto.generated import common_pb2, vllm_engine_pb2_grpc
from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from cluster.errors import Unavailable
from cluster.request import FinishReason
from cluster.text import TextCodec
from deploy.edge.answers import Answers
from deploy.edge.calls import current_caller, deadline_of, write
from deploy.edge.errors import DeadlineExceeded, UnknownMethod
from deploy.edge.health import HealthService
from deploy.edge.intake import Intake
from deploy.edge.models import Models, Served
from deploy.edge.text import spelled_tokens
from deploy.edge.vllm import SERVICE, tokenizer_files
from deploy.edge.vllm.messages import own_names, take_generate
from deploy.edge.vllm.responses import Sample
from deploy.edge.vllm.throughput import Throughput
from shards.models.registry import FAMILIES

Context = grpc.aio.ServicerContext[Any, Any]

_CHUNK_BYTES = 64 << 10


class VllmService(vllm_engine_pb2_grpc.VllmEngineServicer):  # type: ignore[misc]
    """Raises headwise's own errors; `deploy.edge.calls` turns them into statuses.

    The API knows one model. Of several it is the first by name.
    """

    def __init__(self, models: Models, answers: Answers, health: HealthService) -> None:
        """`health` knows whether this service serves."""
        self._models = models
        self._answers = answers
        self._health = health
        self._throughput = Throughput()
        self._last_request = 0.0  # unix time
        self._zipped: tuple[TextCodec, bytes] | None = None
        self._zipping = asyncio.Lock()

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        self._last_request = time.time()
        served = self._served()
        intake = await take_generate(request, served, deadline_of(context))
        with own_names(request):
            await self._answer(served, intake, context, streams=request.stream)

    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        for request_id in request.request_ids:
            await self._models.abort(request_id)
        return pb.AbortResponse()

    async def HealthCheck(
        self, request: pb.HealthCheckRequest, context: Context
    ) -> pb.HealthCheckResponse:
        try:
            health = self._served().generator.health()
        except Unavailable as error:
            return pb.HealthCheckResponse(healthy=False, message=str(error))
        healthy = self._health.serves(SERVICE)
        message = ": ".join(filter(None, (health.state.value, health.cause)))
        if not healthy and not health.cause:
            message += "; the server is shutting down, or not up yet"
        return pb.HealthCheckResponse(healthy=healthy, message=message)

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: Context
    ) -> pb.GetModelInfoResponse:
        served = self._served()
        model = served.generator.model
        longest = model.context - 1
        architecture, model_type = _in_transformers(model.architecture)
        return pb.GetModelInfoResponse(
            # Paths of this machine would mean nothing to a gateway on another one; a hub id does,
            # and for anything else it asks GetTokenizer.
            model_path=model.name,
            tokenizer_path=model.name if served.texts.codec is not None else "",
            served_model_name=model.name,
            is_generation=True,
            max_context_length=model.context,
            max_req_input_len=min(longest, model.longest_prompt or longest),
            vocab_size=model.vocabulary,
            architectures=[architecture],
            model_type=model_type,
            eos_token_ids=model.eos_token_ids,
        )

    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: Context
    ) -> pb.GetServerInfoResponse:
        served = self._served()
        load = served.generator.load()
        return pb.GetServerInfoResponse(
            active_requests=load.running + load.waiting,
            last_receive_timestamp=self._last_request,
            uptime_seconds=max(0.0, time.time() - served.facts.started_at),
            server_type="headwise",
            data_parallel_size=1,
            block_size=load.block_size,
            model_dtype=f"torch.{served.generator.model.dtype}",
            max_num_seqs=served.facts.max_sequences,
            constrained_decoding_start="first_token",
        )

    async def GetLoads(self, request: pb.GetLoadsRequest, context: Context) -> pb.GetLoadsResponse:
        served = self._served()
        load, most = served.generator.load(), served.facts.max_sequences
        one = pb.SchedulerLoad(
            num_running_reqs=load.running,
            num_waiting_reqs=load.waiting,
            num_total_reqs=load.running + load.waiting,
            num_used_tokens=load.kv_blocks_used * load.block_size,
            max_total_num_tokens=load.kv_blocks * load.block_size,
            token_usage=_share(load.kv_blocks_used, load.kv_blocks),
            gen_throughput=self._throughput.of(served.name, load.generated_tokens),
            cache_hit_rate=_share(load.cached_tokens, load.prompt_tokens),
            utilization=_share(load.running, most),
            max_running_requests=most,
            num_waiting_uncached_tokens=load.waiting_tokens,
        )
        return pb.GetLoadsResponse(
            timestamp=datetime.now(UTC).isoformat(),
            version=served.facts.version,
            dp_rank_count=1,
            loads=[] if request.dp_rank else [one],
        )

    async def GetTokenizer(self, request: common_pb2.GetTokenizerRequest, context: Context) -> None:
        served = self._served()
        codec = served.texts.codec
        if codec is None:
            raise UnknownMethod(f"GetTokenizer: {served.name} has no tokenizer, send token ids")
        data = await self._zip(codec)
        digest = hashlib.sha256(data).hexdigest()
        for start in range(0, len(data), _CHUNK_BYTES):
            last = start + _CHUNK_BYTES >= len(data)
            chunk = common_pb2.GetTokenizerChunk(
                data=data[start : start + _CHUNK_BYTES], sha256=digest if last else ""
            )
            await write(context, chunk)

    async def Embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:
        raise UnknownMethod("Embed: headwise serves models that generate text, and no embeddings")

    async def FlushCache(
        self, request: common_pb2.FlushCacheRequest, context: Context
    ) -> common_pb2.FlushCacheResponse:
        raise UnknownMethod(
            "FlushCache: the prefix cache gives way by itself where sequences need its room; a "
            "request of headwise.v1 keeps out of it with prefix_cache.disabled or a salt"
        )

    async def StartProfile(
        self, request: common_pb2.StartProfileRequest, context: Context
    ) -> common_pb2.ProfileResponse:
        raise UnknownMethod(_NO_PROFILE)

    async def StopProfile(
        self, request: common_pb2.StopProfileRequest, context: Context
    ) -> common_pb2.ProfileResponse:
        raise UnknownMethod(_NO_PROFILE)

    async def SubscribeKvEvents(
        self, request: common_pb2.SubscribeKvEventsRequest, context: Context
    ) -> None:
        raise UnknownMethod("SubscribeKvEvents: KV cache events are not published; use GetLoads")

    def _served(self) -> Served:
        """Raises `Unavailable` while there is none."""
        names = self._models.names
        return self._models.get(names[0] if names else "")

    async def _answer(
        self, served: Served, intake: Intake, context: Context, *, streams: bool
    ) -> None:
        """Samples that do not stream come together, in their order, as the gateway counts them."""
        samples = [Sample(intake.request) for _ in range(intake.request.n)]
        whole: dict[int, pb.GenerateResponse] = {}
        build = served.texts.build
        async with self._answers.of(served, intake, current_caller()) as deltas:
            async for delta in deltas:
                if delta.finish is FinishReason.DEADLINE:
                    raise DeadlineExceeded("the call's deadline passed before the last token")
                sample = samples[delta.index]
                sample.add(delta)
                if streams:
                    chunk = await build(spelled_tokens(delta), partial(sample.chunk, delta))
                    await write(context, chunk)
                else:
                    sample.add_logprobs(delta)
                if delta.finish is not None:
                    complete = await build(sample.spelled, partial(sample.complete, delta))
                    if streams:
                        await write(context, complete)
                    else:
                        whole[delta.index] = complete
        for index in sorted(whole):
            await write(context, whole[index])

    async def _zip(self, codec: TextCodec) -> bytes:
        async with self._zipping:
            if self._zipped is None or self._zipped[0] is not codec:
                self._zipped = codec, await asyncio.to_thread(tokenizer_files.zipped, codec)
            return self._zipped[1]


_NO_PROFILE = (
    "StartProfile and StopProfile: headwise measures every phase of every rank all the time, see "
    "GET /metrics and headwise_rank_phase_seconds"
)


def _in_transformers(architecture: str) -> tuple[str, str]:
    """What config.json would call an architecture, which a GGUF file names in its own way, and its
    model_type; that is empty for a family that is not known."""
    for family in FAMILIES:
        if architecture in family.architectures:
            return architecture, family.model_type
        if architecture == family.model_type:
            return family.architectures[0], family.model_type
    return architecture, ""


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
