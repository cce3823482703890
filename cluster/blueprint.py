"""Everything about a deployment that is known before a process starts, checked."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.config import ClusterConfig
from cluster.request import ModelInfo
from shards.checkpoint.storage import choose_storage
from shards.collectives import Transport
from shards.config import ShardConfig
from shards.errors import NotEnoughMemory
from shards.footprint import RankFootprint, model_size, rank_footprints, settle_dtype
from shards.layout import Layout, make_layout
from shards.memory import host_bytes_left
from shards.models.mask import reads_whole_prompts
from shards.models.source import ModelSource, open_model

# What a rank holds besides weights and cache: Python, torch, scratch space.
_RANK_OVERHEAD = 400 << 20


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A model, its split and what each rank will hold. `dtype` and `context` are settled; `widened`
    are weights that were to be quantised and cannot be (`Choice.widened`)."""

    config: ClusterConfig
    source: ModelSource
    layout: Layout
    footprints: tuple[RankFootprint, ...]
    dtype: str
    context: int
    widened: tuple[str, ...]

    @property
    def block_bytes(self) -> tuple[int, ...]:
        """One KV block's bytes on each rank."""
        return tuple(f.kv_per_token * self.config.block_size for f in self.footprints)

    @property
    def max_blocks(self) -> int:
        """KV blocks for as many sequences of full length as may run at a time."""
        return self.config.max_sequences * -(-self.context // self.config.block_size)

    @property
    def window(self) -> int | None:
        """How far back the farthest-seeing layer sees; None where one sees everything."""
        windows = [layer.attention.window for layer in self.source.spec.layers]
        return None if None in windows else max(w for w in windows if w is not None)

    @property
    def whole_prompts(self) -> bool:
        """Whether a prompt's positions see later ones, and all are computed in one step."""
        return reads_whole_prompts(self.source.spec)

    @property
    def model(self) -> ModelInfo:
        spec = self.source.spec
        first = spec.layers[0].attention
        return ModelInfo(
            name=self.config.served_name or self.source.name,
            architecture=spec.architecture,
            vocabulary=spec.vocabulary,
            context=self.context,
            layers=len(spec.layers),
            heads=first.heads,
            kv_heads=first.kv_heads,
            head_dim=first.head_dim,
            width=spec.width,
            parameters=model_size(spec).parameters,
            dtype=self.dtype,
            eos_token_ids=self.source.eos_token_ids,
            longest_prompt=self.config.max_step_tokens if self.whole_prompts else None,
        )

    def shard(self, rank: int, collective: Transport, host_ranks: int) -> ShardConfig:
        """What rank `rank` is told; `host_ranks` ranks share its host."""
        config = self.config
        whole_cpus = int(config.cpus_per_rank) if config.cpus_per_rank > 1 else 0
        return ShardConfig(
            source=self.source,
            layout=self.layout,
            rank=rank,
            dtype=self.dtype,
            quantization=config.quantization,
            # Ray shows each GPU rank one device.
            device="cpu" if config.device == "cpu" else "cuda:0",
            threads=config.threads_per_rank or whole_cpus,
            host_ranks=host_ranks,
            block_size=config.block_size,
            max_sequences=config.max_sequences,
            max_step_tokens=config.max_step_tokens,
            context=self.context,
            kv_memory=None if config.kv_memory is None else int(config.kv_memory),
            collective=collective,
            deadline_s=config.step_timeout_s,
        )


def draw_up(config: ClusterConfig) -> Blueprint:
    """Open the model, deal it, and see that it fits; reads no weights.

    Raises `CheckpointError`, `UnsupportedModel`, `IllegalSplit` or `NotEnoughMemory`.
    """
    source = open_model(config.model, config.revision)
    layout = make_layout(
        source.spec,
        config.tensor_parallel,
        config.capacity,
        expert_parallel=config.expert_parallel,
    )
    dtype = settle_dtype(config.dtype, source.spec)
    context = min(source.spec.context, config.max_context or source.spec.context)
    storage = choose_storage(source, layout, config.quantization)
    footprints = rank_footprints(source.spec, layout, dtype, storage.schemes)
    if config.device == "cpu" and config.placement == "STRICT_PACK":
        _check_memory(config, footprints)
    return Blueprint(config, source, layout, footprints, dtype, context, storage.widened)


def _check_memory(config: ClusterConfig, footprints: tuple[RankFootprint, ...]) -> None:
    cache = (config.kv_memory or 0) * len(footprints)
    need = sum(f.weights + _RANK_OVERHEAD for f in footprints) + cache
    left = host_bytes_left()
    if need > left:
        raise NotEnoughMemory(
            f"{config.model} on {len(footprints)} ranks of this host needs about "
            f"{need / 2**30:.1f} GiB (weights, {cache / 2**30:.1f} GiB of KV cache, and "
            f"{_RANK_OVERHEAD >> 20} MiB a rank) and {left / 2**30:.1f} GiB are left: "
            "give a smaller --kv-memory, a 16-bit --dtype, --quantization int8 or int4, or spread "
            "the ranks over more hosts"
        )
