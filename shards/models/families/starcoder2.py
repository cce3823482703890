"""StarCoder2: GPT-2's norms, biases and plain FFN on Llama's rotary attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shards.models.families import llama
from shards.models.families.fields import Fields
from shards.models.families.names import gguf_fields, sources
from shards.models.families.rope import context, gguf_scaling, rotary
from shards.models.family import Family, GGUFNames
from shards.models.spec import Attention, FeedForward, Layer, ModelSpec, Norm

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 3072,
    "intermediate_size": 12288,
    "num_hidden_layers": 30,
    "num_attention_heads": 24,
    "num_key_value_heads": 2,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 4096,
    "norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "use_bias": True,
}

_NAMES = {
    **llama.NAMES,
    "layers.{i}.ffn.up": "model.layers.{i}.mlp.c_fc",
    "layers.{i}.ffn.down": "model.layers.{i}.mlp.c_proj",
}


def _spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, _DEFAULTS)
    heads, kv_heads = fields.head_counts("num_attention_heads", "num_key_value_heads")
    head_dim = fields.head_dim("hidden_size", "num_attention_heads")
    bias, longest = fields.flag("use_bias"), context(fields)
    layer = Layer(
        Attention(
            heads,
            kv_heads,
            head_dim,
            scale=head_dim**-0.5,
            qkv_bias=bias,
            out_bias=bias,
            window=fields.window("sliding_window", longest),
            rotary=rotary(fields, head_dim),
        ),
        FeedForward(
            width=fields.integer("intermediate_size"),
            activation=fields.activation("hidden_act"),
            gated=False,
            bias=bias,
        ),
    )
    return ModelSpec(
        architecture="starcoder2",
        width=fields.integer("hidden_size"),
        vocabulary=fields.integer("vocab_size"),
        context=longest,
        layers=(layer,) * fields.layers("num_hidden_layers"),
        norm=Norm("layer", fields.number("norm_epsilon"), bias=True),
        tied_embeddings=fields.flag("tie_word_embeddings"),
        dtype=fields.dtype(),
    )


def _gguf_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    required = {name: key for name, key in llama.GGUF_REQUIRED.items() if name != "rms_norm_eps"}
    required["norm_epsilon"] = "attention.layer_norm_epsilon"
    optional = llama.GGUF_OPTIONAL | {"sliding_window": "attention.sliding_window"}
    config = gguf_fields(metadata, "starcoder2", required, optional)
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config["rope_scaling"] = gguf_scaling(metadata, "starcoder2")
    return config


FAMILY = Family(
    name="StarCoder2",
    architectures=("Starcoder2ForCausalLM",),
    model_type="starcoder2",
    spec=_spec,
    sources=lambda spec: sources(spec, _NAMES),
    prefix="model.",
    ignored=llama.IGNORED,
    gguf=GGUFNames("starcoder2", _gguf_config, lambda spec: sources(spec, llama.GGUF_NAMES)),
)
