"""The Control service: what is served, by whom, and how it is doing."""

from __future__ import annotations

from typing import Any

import grpc

from cluster.errors import InvalidRequest, Violation
from deploy import codec
from deploy.edge.models import Models
from headwise.v1 import control_pb2, control_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class ControlService(control_pb2_grpc.ControlServicer):
    """Raises headwise's own errors; `deploy.edge.calls` turns them into statuses."""

    def __init__(self, models: Models) -> None:
        self._models = models

    async def ListModels(
        self, request: control_pb2.ListModelsRequest, context: Context
    ) -> control_pb2.ListModelsResponse:
        return control_pb2.ListModelsResponse(names=self._models.names)

    async def GetServerInfo(
        self, request: control_pb2.GetServerInfoRequest, context: Context
    ) -> control_pb2.GetServerInfoResponse:
        served = self._models.get(request.model)
        facts, ranks = served.facts, served.generator.ranks
        load = served.generator.load()
        return control_pb2.GetServerInfoResponse(
            version=facts.version,
            libraries=facts.libraries,
            tensor_parallel=1 + max((info.rank for info in ranks), default=-1),
            device=facts.device,
            collective=facts.collective,
            ranks=[codec.rank(info) for info in ranks],
            started_at=codec.timestamp(facts.started_at),
            max_sequences=facts.max_sequences,
            max_step_tokens=facts.max_step_tokens,
            kv_blocks=load.kv_blocks,
            block_size=load.block_size,
        )

    async def GetModelInfo(
        self, request: control_pb2.GetModelInfoRequest, context: Context
    ) -> control_pb2.GetModelInfoResponse:
        served = self._models.get(request.model)
        return codec.model_info(
            served.generator.model,
            has_tokenizer=served.texts.codec is not None,
            has_chat_template=served.texts.has_chat_template,
        )

    async def GetLoad(
        self, request: control_pb2.GetLoadRequest, context: Context
    ) -> control_pb2.GetLoadResponse:
        return codec.load(self._models.get(request.model).generator.load())

    async def GetHealth(
        self, request: control_pb2.GetHealthRequest, context: Context
    ) -> control_pb2.GetHealthResponse:
        return codec.health(self._models.get(request.model).generator.health())

    async def Abort(
        self, request: control_pb2.AbortRequest, context: Context
    ) -> control_pb2.AbortResponse:
        if not request.request_id:
            raise InvalidRequest(Violation("request_id", "empty: name the request to end"))
        return control_pb2.AbortResponse(found=await self._models.abort(request.request_id))
