"""Gemma 3, text alone: Gemma 2 with normed queries and keys instead of caps, and a rotation of its
own for windowed layers. Of the models that also see, the language model is served."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from shards.errors import UnsupportedModel
from shards.models.families import gemma2, llama
from shards.models.families.fields import Fields
from shards.models.families.names import gguf_fields, sources
from shards.models.families.rope import gguf_scaling, rotary
from shards.models.family import Family, GGUFNames, Source
from shards.models.spec import Attention, FeedForward, Layer, ModelSpec, Norm, QKNorm, Rotary

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
}

_NAMES: dict[str, str | Source] = {
    **gemma2.NAMES,
    "layers.{i}.attention.q_norm": gemma2.unit_offset("model.layers.{i}.self_attn.q_norm"),
    "layers.{i}.attention.k_norm": gemma2.unit_offset("model.layers.{i}.self_attn.k_norm"),
}


def _rotaries(config: Mapping[str, Any], fields: Fields, head_dim: int) -> tuple[Rotary, Rotary]:
    """Of full and of windowed layers: as `rope_parameters` states for each (transformers 5), or
    from `rope_scaling` and `rope_theta`, and from `rope_local_base_freq` (before)."""
    nested = _object("rope_parameters", config.get("rope_parameters"))
    older = _object("rope_scaling", config.get("rope_scaling"))

    def of(kind: str, theta: float, older: Mapping[str, Any]) -> Rotary:
        stated = _object(f"rope_parameters.{kind}", nested.get(kind))
        stated = {"rope_theta": theta, **stated, **older}
        return rotary(Fields({**config, "rope_scaling": stated}, _DEFAULTS), head_dim)

    full = of("full_attention", fields.number("rope_theta"), older)
    return full, of("sliding_attention", fields.number("rope_local_base_freq"), {})


def _object(name: str, value: Any) -> Mapping[str, Any]:
    """The object that a field holds; an empty one where there is none."""
    if not isinstance(value or {}, Mapping):
        raise UnsupportedModel(f"config field {name} is {value!r:.80}: an object is needed")
    return value or {}


def _spec(config: Mapping[str, Any]) -> ModelSpec:
    fields = Fields(config, _DEFAULTS)
    fields.refuse_flag("use_bidirectional_attention", gemma2.NO_BIDIRECTIONAL)
    fields.refuse_flag("attn_logit_softcapping", "Gemma 3 norms queries and keys instead")
    heads, kv_heads = fields.head_counts("num_attention_heads", "num_key_value_heads")
    head_dim = fields.integer("head_dim")
    width, longest = fields.integer("hidden_size"), fields.integer("max_position_embeddings")
    norm = Norm("rms", fields.number("rms_norm_eps"))
    pattern = fields.integer("sliding_window_pattern")
    full_rotary, sliding_rotary = _rotaries(config, fields, head_dim)
    attention = Attention(
        heads,
        kv_heads,
        head_dim,
        scale=fields.number("query_pre_attn_scalar") ** -0.5,
        qkv_bias=fields.flag("attention_bias"),
        out_bias=fields.flag("attention_bias"),
        rotary=full_rotary,
        qk_norm=QKNorm(norm),
    )
    ffn = FeedForward(
        width=fields.integer("intermediate_size"),
        activation=fields.activation("hidden_activation"),
        gated=True,
    )
    full = Layer(attention, ffn, post_norm=True)
    window = fields.window("sliding_window", longest)
    sliding = replace(full, attention=replace(attention, window=window, rotary=sliding_rotary))
    return ModelSpec(
        architecture="gemma3",
        width=width,
        vocabulary=fields.integer("vocab_size"),
        context=longest,
        layers=tuple(
            sliding if slides else full
            for slides in fields.sliding_layers(lambda i: (i + 1) % pattern != 0)
        ),
        norm=norm,
        tied_embeddings=fields.flag("tie_word_embeddings"),
        dtype=fields.dtype(),
        embedding_scale=width**0.5,
        logit_softcap=fields.number_or_none("final_logit_softcapping"),
    )


def _text_spec(config: Mapping[str, Any]) -> ModelSpec:
    """The text part's; what concerns the whole model is stated outside it."""
    text = config.get("text_config") or {}
    if not isinstance(text, Mapping):
        raise UnsupportedModel(f"config field text_config is {text!r:.80}: an object is needed")
    whole = ("dtype", "torch_dtype", "tie_word_embeddings")
    return _spec({**text, **{name: config[name] for name in whole if config.get(name) is not None}})


def _text_sources(spec: ModelSpec) -> dict[str, Source]:
    text = sources(spec, _NAMES)
    return {
        parameter: replace(source, tensor=f"language_model.{source.tensor}")
        for parameter, source in text.items()
    }


def _gguf_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    optional = gemma2.GGUF_OPTIONAL | {"rope_local_base_freq": "rope.freq_base_swa"}
    config = gguf_fields(metadata, "gemma3", llama.GGUF_REQUIRED, optional)
    config["query_pre_attn_scalar"] = gemma2.query_scalar(config, largest=62)
    config["rope_scaling"] = gguf_scaling(metadata, "gemma3")
    return config


FAMILY = Family(
    name="Gemma 3",
    architectures=("Gemma3ForCausalLM",),
    model_type="gemma3_text",
    spec=_spec,
    sources=lambda spec: sources(spec, _NAMES),
    prefix="model.",
    ignored=llama.IGNORED,
    gguf=GGUFNames("gemma3", _gguf_config, lambda spec: sources(spec, llama.GGUF_NAMES)),
)
MULTIMODAL = Family(
    name="Gemma 3 (text of the multimodal)",
    architectures=("Gemma3ForConditionalGeneration",),
    model_type="gemma3",
    spec=_text_spec,
    sources=_text_sources,
    prefix="language_model.",
    ignored=(r"vision_tower\..*", r"multi_modal_projector\..*", r"lm_head\.weight"),
)
