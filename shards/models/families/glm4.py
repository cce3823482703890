"""GLM-4 of 2025 (GLM-4-0414, GLM-Z1): that of 2024 with a norm after each half as well."""

from __future__ import annotations

from shards.models.families import glm, llama
from shards.models.families.fused import gate_up_in_turn
from shards.models.families.names import sources
from shards.models.family import Family, GGUFNames, Source
from shards.models.spec import ModelSpec


def _sources(spec: ModelSpec) -> dict[str, Source]:
    names = {
        **llama.NAMES,
        **gate_up_in_turn(spec, glm.GATE_UP),
        "layers.{i}.attention_post_norm": "model.layers.{i}.post_self_attn_layernorm",
        "layers.{i}.ffn_post_norm": "model.layers.{i}.post_mlp_layernorm",
    }
    return sources(spec, names)


FAMILY = Family(
    name="GLM-4 (2025)",
    architectures=("Glm4ForCausalLM",),
    model_type="glm4",
    spec=lambda config: glm.glm_spec(config, "glm4", post_norm=True),
    sources=_sources,
    prefix="model.",
    ignored=llama.IGNORED,
    gguf=GGUFNames("glm4", lambda metadata: glm.gguf_config(metadata, "glm4"), glm.gguf_sources),
)
