"""The Control service: what is served, by whom, and how it is doing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import grpc

from cluster.errors import InvalidRequest, Violation
from cluster.request import Generator
from deploy import codec
from deploy.edge.intake import check_model
from deploy.edge.text import Texts
from headwise.v1 import control_pb2, control_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What the generator does not know of the server it answers in; `started_at` is unix time."""

    version: str
    libraries: Mapping[str, str]
    device: str
    collective: str
    max_sequences: int
    max_step_tokens: int
    started_at: float


class ControlService(control_pb2_grpc.ControlServicer):
    """Raises headwise's own errors; `deploy.edge.calls` turns them into statuses."""

    def __init__(self, generator: Generator, texts: Texts, facts: ServerFacts) -> None:
        self._generator = generator
        self._texts = texts
        self._facts = facts

    async def GetServerInfo(
        self, request: control_pb2.GetServerInfoRequest, context: Context
    ) -> control_pb2.GetServerInfoResponse:
        ranks = self._generator.ranks
        load = self._generator.load()
        return control_pb2.GetServerInfoResponse(
            version=self._facts.version,
            libraries=self._facts.libraries,
            tensor_parallel=len(ranks),
            device=self._facts.device,
            collective=self._facts.collective,
            ranks=[codec.rank(info) for info in ranks],
            started_at=codec.timestamp(self._facts.started_at),
            max_sequences=self._facts.max_sequences,
            max_step_tokens=self._facts.max_step_tokens,
            kv_blocks=load.kv_blocks,
            block_size=load.block_size,
        )

    async def GetModelInfo(
        self, request: control_pb2.GetModelInfoRequest, context: Context
    ) -> control_pb2.GetModelInfoResponse:
        model = self._generator.model
        check_model(request.model, model)
        return codec.model_info(
            model,
            has_tokenizer=self._texts.codec is not None,
            has_chat_template=self._texts.has_chat_template,
        )

    async def GetLoad(
        self, request: control_pb2.GetLoadRequest, context: Context
    ) -> control_pb2.GetLoadResponse:
        return codec.load(self._generator.load())

    async def GetHealth(
        self, request: control_pb2.GetHealthRequest, context: Context
    ) -> control_pb2.GetHealthResponse:
        return codec.health(self._generator.health())

    async def Abort(
        self, request: control_pb2.AbortRequest, context: Context
    ) -> control_pb2.AbortResponse:
        if not request.request_id:
            raise InvalidRequest(Violation("request_id", "empty: name the request to end"))
        return control_pb2.AbortResponse(found=self._generator.abort(request.request_id))
