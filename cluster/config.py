"""How a model is served: frozen, typed, unknown keys refused."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, model_validator

from shards.quantization.choice import Quantization


def _parts(value: object) -> object:
    """Accept the command line's `2,1,1`."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


Capacity = Annotated[
    tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...], BeforeValidator(_parts)
]
Names = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1), BeforeValidator(_parts)
]


class ClusterConfig(BaseModel):
    """One model copy: a driver and `tensor_parallel` ranks.

    `served_name` is what requests call the model; by default the name of its folder, or its hub id.
    `capacity` gives each rank's relative speed and then also says how many ranks there are.
    With `expert_parallel`, experts are dealt to ranks whole; else every one is cut by its channels.
    `kv_memory` is per rank; by default it is sized from the memory that is left after the weights.
    `dtype` is that of hidden states, KV cache and the weights that are not quantised;
    `quantization` says which are (`shards/quantization/choice.py`): by default those that the
    checkpoint has so, in its own blocks.
    Within ten minutes, ranks that are lost are replaced up to `recoveries` times; beyond that, and
    with 0 at once, the copy is NOT_READY and its streams end.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str
    served_name: Annotated[str, Field(min_length=1)] | None = None
    tokenizer: str | None = None
    revision: str | None = None
    tensor_parallel: Annotated[int, Field(ge=1)] = 1
    capacity: Capacity | None = None
    expert_parallel: bool = False
    device: Literal["cpu", "cuda"] = "cpu"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Quantization = "auto"
    collective: Literal["auto", "shared_memory", "gloo", "nccl", "symmetric_memory"] = "auto"
    placement: Literal["STRICT_PACK", "PACK", "SPREAD", "STRICT_SPREAD"] = "STRICT_PACK"
    cpus_per_rank: Annotated[float, Field(gt=0)] = 1
    threads_per_rank: Annotated[int, Field(ge=1)] | None = None
    max_context: Annotated[int, Field(ge=2)] | None = None
    kv_memory: ByteSize | None = None
    block_size: Literal[8, 16, 32, 64, 128] = 16
    prefix_caching: bool = True
    max_sequences: Annotated[int, Field(ge=1, le=4096)] = 32
    max_step_tokens: Annotated[int, Field(ge=1)] = 512
    max_queued_requests: Annotated[int, Field(ge=0)] = 256
    max_queued_tokens: Annotated[int, Field(ge=0)] = 1_000_000
    start_timeout_s: Annotated[float, Field(gt=0)] = 600
    step_timeout_s: Annotated[float, Field(gt=0)] = 60
    recoveries: Annotated[int, Field(ge=0)] = 3

    @model_validator(mode="before")
    @classmethod
    def _ranks_from_capacity(cls, data: object) -> object:
        """`--capacity 2,1,1` alone means three ranks; with a contradicting size it is an error."""
        if not isinstance(data, dict) or data.get("capacity") is None:
            return data
        capacity = _parts(data["capacity"])
        if not isinstance(capacity, (tuple, list)):
            return data
        ranks = data.get("tensor_parallel")
        if ranks is None:
            return {**data, "tensor_parallel": len(capacity)}
        if int(ranks) != len(capacity):
            raise ValueError(
                f"capacity lists {len(capacity)} ranks and tensor_parallel is {ranks}: "
                "give one number per rank, or leave tensor_parallel out"
            )
        return data


class ServerConfig(BaseModel):
    """Where the edge listens, who may call it, and how much at a time. Port 0 takes any free port;
    without `http` there is gRPC alone.

    Files are read at start, and again when they change: PEM for TLS, a bearer token per line
    (`deploy/edge/tokens.py`), callers' limits in YAML (`deploy/edge/limits.py`). `tls_client_names`
    are the common and alternative names that a client's certificate may bear; None takes every
    certificate of `tls_client_ca`. Connections are asked to make way for new ones at
    `max_connection_age_s`; what runs on them may go on for `max_connection_age_grace_s` (None:
    until it ends). `trace` sends OpenTelemetry spans where the OTEL_* variables say: of requests,
    and of one in `trace_steps` steps (0: of none).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = "127.0.0.1"
    grpc_port: Annotated[int, Field(ge=0, le=65535)] = 50051
    http: bool = True
    http_port: Annotated[int, Field(ge=0, le=65535)] = 8000
    tls_certificate: str | None = None
    tls_key: str | None = None
    tls_client_ca: str | None = None
    tls_client_names: Names | None = None
    token_file: str | None = None
    limits_file: str | None = None
    max_message_bytes: Annotated[int, Field(ge=1 << 16, le=1 << 30)] = 4 << 20
    max_connections: Annotated[int, Field(ge=1, le=1 << 20)] = 4096
    max_streams_per_connection: Annotated[int, Field(ge=1, le=1 << 20)] = 512
    max_concurrent_calls: Annotated[int, Field(ge=1, le=1 << 20)] = 2048
    max_connection_age_s: Annotated[float, Field(ge=1, le=1e6)] | None = 3600
    max_connection_age_grace_s: Annotated[float, Field(ge=1, le=1e6)] | None = None
    drain_timeout_s: Annotated[float, Field(ge=0)] = 2
    trace: bool = False
    trace_steps: Annotated[int, Field(ge=0)] = 100

    @model_validator(mode="after")
    def _tls_is_whole(self) -> ServerConfig:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together: give both or neither")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("tls_client_ca needs tls_certificate and tls_key")
        if self.tls_client_names is not None and self.tls_client_ca is None:
            raise ValueError("tls_client_names needs tls_client_ca, which vouches for the names")
        return self
