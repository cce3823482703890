"""How a model is served: frozen, typed, unknown keys refused."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, model_validator

from shards.quantization.choice import Quantization


def _capacities(value: object) -> object:
    """Accept the command line's `2,1,1`."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


Capacity = Annotated[
    tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...], BeforeValidator(_capacities)
]


class ClusterConfig(BaseModel):
    """One model copy: a driver and `tensor_parallel` ranks.

    `capacity` gives each rank's relative speed and then also says how many ranks there are.
    With `expert_parallel`, experts are dealt to ranks whole; else every one is cut by its channels.
    `kv_memory` is per rank; by default it is sized from the memory that is left after the weights.
    `dtype` is that of hidden states, KV cache and the weights that are not quantised;
    `quantization` says which are (`shards/quantization/choice.py`): by default those that the
    checkpoint has so, in its own blocks.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: str
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

    @model_validator(mode="before")
    @classmethod
    def _ranks_from_capacity(cls, data: object) -> object:
        """`--capacity 2,1,1` alone means three ranks; with a contradicting size it is an error."""
        if not isinstance(data, dict) or data.get("capacity") is None:
            return data
        capacity = _capacities(data["capacity"])
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
    """Where the edge listens, and who may call it. Port 0 takes any free port.

    Paths are read at start; `token_file` holds one bearer token per line.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = "127.0.0.1"
    grpc_port: Annotated[int, Field(ge=0, le=65535)] = 50051
    tls_certificate: str | None = None
    tls_key: str | None = None
    tls_client_ca: str | None = None
    token_file: str | None = None
    max_message_bytes: Annotated[int, Field(ge=1 << 16)] = 16 << 20
    drain_timeout_s: Annotated[float, Field(ge=0)] = 2

    @model_validator(mode="after")
    def _tls_is_whole(self) -> ServerConfig:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together: give both or neither")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("tls_client_ca needs tls_certificate and tls_key")
        return self
