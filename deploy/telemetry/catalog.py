"""Every metric, as data: what the registry exposes, and what `docs/observability.md` lists.

`vllm:*` are vLLM's names, types and labels, which LLM dashboards and the Kubernetes Gateway API
inference extension expect (https://docs.vllm.ai/en/latest/usage/metrics.html); `headwise_*` is what
only this engine has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric family; a counter's samples are named `name` + `_total`."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    help: str
    buckets: tuple[float, ...] = ()

    @property
    def exposed(self) -> str:
        """Its name in a query, but for a histogram's `_bucket`, `_sum` and `_count`."""
        return f"{self.name}_total" if self.kind == "counter" else self.name

    @property
    def samples(self) -> tuple[str, ...]:
        """The names of its samples."""
        if self.kind == "histogram":
            return tuple(f"{self.name}_{part}" for part in ("bucket", "sum", "count"))
        return (self.exposed,)


ENGINE = "0"
"""The label `engine`: vLLM numbers its data-parallel engines; here a process has one driver."""

_MODEL = ("model_name", "engine")
_RANK = ("model_name", "rank")
_API = ("model_name", "api")

# vLLM's, and below them what a small model or a fast device needs.
_TTFT = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_ITL = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_LATENCY = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0),
    *(30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))
_RETRY = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0)

RUNNING = Metric(
    "vllm:num_requests_running", "gauge", _MODEL, "Sequences that the ranks hold a slot for."
)
WAITING = Metric(
    "vllm:num_requests_waiting", "gauge", _MODEL, "Sequences that wait for a slot or for KV blocks."
)
KV_USAGE = Metric(
    "vllm:kv_cache_usage_perc", "gauge", _MODEL, "KV blocks that live sequences hold; 1 is all."
)
CACHE_CONFIG = Metric(
    "vllm:cache_config_info",
    "gauge",
    (*_MODEL, "block_size", "num_gpu_blocks", "cache_dtype"),
    "1, with the KV cache's layout as labels; `num_gpu_blocks` on any device.",
)
PREFIX_QUERIES = Metric(
    "vllm:prefix_cache_queries", "counter", _MODEL, "Prompt tokens looked up in the prefix cache."
)
PREFIX_HITS = Metric(
    "vllm:prefix_cache_hits", "counter", _MODEL, "Prompt tokens found in the prefix cache."
)
PREEMPTIONS = Metric(
    "vllm:num_preemptions",
    "counter",
    _MODEL,
    "Sequences that had to give up their KV blocks, to be computed again later.",
)
PROMPT_TOKENS = Metric(
    "vllm:prompt_tokens", "counter", _MODEL, "Prompt tokens of sequences that have started."
)
GENERATION_TOKENS = Metric(
    "vllm:generation_tokens", "counter", _MODEL, "Tokens generated, those nobody reads included."
)
SUCCESS = Metric(
    "vllm:request_success",
    "counter",
    (*_MODEL, "finished_reason"),
    "Samples that ended: `stop`, `length`, `abort` (cancelled, or past its deadline), `error`.",
)
TTFT = Metric(
    "vllm:time_to_first_token_seconds",
    "histogram",
    _MODEL,
    "From submission to a sample's first tokens, as its edge handed them on.",
    _TTFT,
)
ITL = Metric(
    "vllm:inter_token_latency_seconds",
    "histogram",
    _MODEL,
    "Between two tokens of a sample; tokens that came together share their time.",
    _ITL,
)
TPOT = Metric(
    "vllm:request_time_per_output_token_seconds",
    "histogram",
    _MODEL,
    "Mean time of a finished sample's tokens after the first.",
    _ITL,
)
E2E = Metric(
    "vllm:e2e_request_latency_seconds",
    "histogram",
    _MODEL,
    "From submission to a sample's end.",
    _LATENCY,
)
QUEUE_TIME = Metric(
    "vllm:request_queue_time_seconds",
    "histogram",
    _MODEL,
    "From submission to the first step that computed a finished sample.",
    _LATENCY,
)
PREFILL_TIME = Metric(
    "vllm:request_prefill_time_seconds",
    "histogram",
    _MODEL,
    "From there to its first token.",
    _LATENCY,
)
DECODE_TIME = Metric(
    "vllm:request_decode_time_seconds",
    "histogram",
    _MODEL,
    "From its first token to its end.",
    _LATENCY,
)
INFERENCE_TIME = Metric(
    "vllm:request_inference_time_seconds", "histogram", _MODEL, "Prefill and decode.", _LATENCY
)
REQUEST_PROMPT = Metric(
    "vllm:request_prompt_tokens",
    "histogram",
    _MODEL,
    "Tokens of a finished sample's prompt.",
    _TOKENS,
)
REQUEST_GENERATION = Metric(
    "vllm:request_generation_tokens",
    "histogram",
    _MODEL,
    "Tokens of a finished sample's answer.",
    _TOKENS,
)
PARAMS_N = Metric(
    "vllm:request_params_n",
    "histogram",
    _MODEL,
    "Samples that a request asked for.",
    (1.0, 2.0, 5.0, 10.0, 20.0),
)
PARAMS_MAX_TOKENS = Metric(
    "vllm:request_params_max_tokens",
    "histogram",
    _MODEL,
    "Where a request gave it: tokens that it asked for at most.",
    _TOKENS,
)

BUILD = Metric("headwise_build_info", "gauge", ("version",), "1, with headwise's version.")
READY = Metric("headwise_ready", "gauge", ("model_name",), "1 while the ranks can compute.")
EPOCH = Metric(
    "headwise_epoch", "gauge", ("model_name",), "Times that the ranks have formed a group."
)
QUEUE_TOKENS = Metric(
    "headwise_queue_tokens",
    "gauge",
    ("model_name",),
    "Tokens to compute before every waiting sequence yields its next one.",
)
KV_BLOCKS = Metric(
    "headwise_kv_blocks",
    "gauge",
    ("model_name",),
    "KV blocks; every rank has as many, and holds its own heads in each.",
)
KV_BLOCKS_USED = Metric(
    "headwise_kv_blocks_used", "gauge", ("model_name",), "KV blocks that live sequences hold."
)
STEPS = Metric("headwise_steps", "counter", ("model_name",), "Steps that the driver has planned.")
RANK_UP = Metric("headwise_rank_up", "gauge", _RANK, "1 while the rank computes.")
RANK_INFO = Metric(
    "headwise_rank_info",
    "gauge",
    (*_RANK, "host", "pid", "state", "cause"),
    "1, with where the rank runs, its state, and why it is not ready.",
)
RANK_STEPS = Metric(
    "headwise_rank_steps", "counter", _RANK, "Steps the rank has computed in this epoch."
)
RANK_STEP_SECONDS = Metric(
    "headwise_rank_step_seconds", "counter", _RANK, "Time the rank spent in steps."
)
RANK_PHASE_SECONDS = Metric(
    "headwise_rank_phase_seconds",
    "counter",
    (*_RANK, "phase"),
    "The same by phase: `embed`, `attention`, `ffn`, `all_reduce` (which includes the wait for "
    "slower ranks), `output`, `sample`.",
)
RANK_WEIGHTS = Metric("headwise_rank_weight_bytes", "gauge", _RANK, "Weights the rank holds.")
RANK_KV = Metric("headwise_rank_kv_bytes", "gauge", _RANK, "The rank's KV cache, used or not.")
RANK_RSS = Metric(
    "headwise_rank_resident_bytes", "gauge", _RANK, "Resident memory of the rank's process."
)
EXPERT_TOKENS = Metric(
    "headwise_expert_tokens",
    "counter",
    ("model_name", "layer", "expert"),
    "Tokens sent to each expert; only for models of at most 1024 experts, all layers together.",
)
EXPERT_IMBALANCE = Metric(
    "headwise_expert_imbalance",
    "gauge",
    ("model_name", "layer"),
    "The busiest expert's tokens over the mean of its layer, since the start; 1 is even.",
)
ERRORS = Metric(
    "headwise_request_errors",
    "counter",
    (*_API, "code"),
    "Requests that a model refused or that failed, by gRPC status code, whichever the API.",
)
CALLS = Metric(
    "headwise_calls",
    "counter",
    ("api", "method", "code"),
    "Calls by the status that they ended with, gRPC's name or HTTP's number, also those that reach "
    "no model: bad ones, strangers'. `method` is `other` where it is not served; gRPC's health is "
    "not counted.",
)
STREAMS = Metric("headwise_streams_open", "gauge", _API, "Requests whose answer is being read.")
CONNECTIONS = Metric("headwise_connections", "gauge", ("api",), "Connections that clients hold.")
RETRY_HINTS = Metric(
    "headwise_retry_hint_seconds",
    "histogram",
    _API,
    "How long refused clients were told to wait.",
    _RETRY,
)
CERTIFICATE_EXPIRY = Metric(
    "headwise_certificate_expiry_timestamp_seconds",
    "gauge",
    (),
    "Unix time when the server's certificate expires; only where TLS is on.",
)

CATALOG: tuple[Metric, ...] = tuple(
    value for value in tuple(globals().values()) if isinstance(value, Metric)
)
"""All of the above, in their order."""
