"""Random legal configs of every family: what nobody thought of writing a row for.

`draw(seed)` gives a tiny model's family and fields, and how to cut it; the same for the same seed.
Sizes are small and awkward: heads, channels, experts and vocabulary rows that no number of ranks
divides, single layers, windows of one position and windows that hold everything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tests.models import FAMILIES

CONTEXT = 128
"""`max_position_embeddings`: above what the prompts and what is generated for them reach."""

Fields = dict[str, Any]

_TRAINED = 4
"""Positions that LongRoPE is "trained" on: every prompt is longer, so that both sides take the
divisors for long contexts."""
_WINDOWS = (1, 2, 3, 7, 13, 31, 500)
_ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")


class Drawn(NamedTuple):
    """`tests.models.tiny_model(family, seed=seed, **config)` over `world` ranks.

    `legacy`: its rotary fields are to be spelled as transformers 4 did.
    """

    seed: int
    family: str
    config: Fields
    world: int
    expert_parallel: bool
    legacy: bool


def draw(seed: int, families: tuple[str, ...] = FAMILIES) -> Drawn:
    """Seeds one after another go round the families."""
    rng = _Draws(seed)
    family = families[seed % len(families)]
    config = rng.common() | _FAMILIES[family](rng)
    return Drawn(seed, family, config, rng.one(1, 2, 3, 4), rng.flip(), rng.flip())


class _Draws:
    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def one(self, *of: Any) -> Any:
        return of[self._rng.integers(len(of))]

    def flip(self) -> bool:
        return bool(self._rng.integers(2))

    def whole(self, least: int, most: int) -> int:
        return int(self._rng.integers(least, most + 1))

    def number(self, least: float, most: float) -> float:
        return float(self._rng.uniform(least, most))

    def common(self) -> Fields:
        return {"vocab_size": self.whole(17, 150), "tie_word_embeddings": self.flip()}

    def layers(self) -> int:
        return self.one(1, 2, 3)

    def rope(self, dim: int, kinds: tuple[str, ...]) -> Fields:
        """`dim` channels are rotated."""
        theta = self.one(100.0, 10000.0, 500000.0)
        kind = self.one("default", *kinds)
        factor = self.one(1.5, 2.0, 8.0)
        stated: Fields = {"rope_type": kind, "rope_theta": theta}
        if kind != "default":
            stated["factor"] = factor
        if kind == "llama3":
            stated |= {"low_freq_factor": 1.0, "high_freq_factor": self.one(2.0, 4.0)}
        if kind in ("llama3", "yarn", "longrope"):
            longrope = kind == "longrope"
            stated["original_max_position_embeddings"] = (
                _TRAINED if longrope else self.one(4, 24, 64)
            )
        if kind == "yarn":
            stated |= self.one(
                {}, {"attention_factor": 1.3}, {"beta_fast": 16.0, "beta_slow": 2.0}
            ) | self.one({}, {"truncate": False})
        if kind == "longrope":
            for name in ("short_factor", "long_factor"):
                stated[name] = [self.number(1.0, 4.0) for _ in range(dim // 2)]
        return stated

    def llama_like(
        self,
        *,
        head_dim: bool = True,
        partial: bool = False,
        kinds: tuple[str, ...] = ("linear", "dynamic", "yarn", "llama3", "longrope"),
        grouped: bool = True,
    ) -> Fields:
        """Sizes, heads and positions; `head_dim` may be other than an even share of the width."""
        kv = self.one(1, 2, 3, 4)
        heads = kv * (self.one(1, 2, 3) if grouped else 1)
        dim = 2 * self.whole(2, 9)
        fields: Fields = {
            "hidden_size": heads * dim,
            "intermediate_size": self.whole(5, 120),
            "num_hidden_layers": self.layers(),
            "num_attention_heads": heads,
            "num_key_value_heads": kv,
            "max_position_embeddings": CONTEXT,
            "rms_norm_eps": self.one(1e-6, 1e-5, 1e-2),
        }
        if head_dim and self.flip():
            fields |= {"head_dim": dim, "hidden_size": heads * self.whole(3, 20)}
        rotated = dim
        if partial:  # transformers divides by the rotated pairs but one
            kinds = tuple(kind for kind in kinds if kind != "dynamic")
        factor = self.one(0.25, 0.5, 1.0) if partial else 1.0
        if partial:
            rotated = max(2, int(dim * factor) // 2 * 2)
            factor = (rotated + 0.25) / dim if rotated < dim else 1.0
        fields["rope_parameters"] = self.rope(rotated, kinds)
        if partial:
            fields["rope_parameters"]["partial_rotary_factor"] = factor
        return fields

    def act(self, name: str = "hidden_act") -> Fields:
        return {name: self.one(*_ACTIVATIONS)}

    def flags(self, *names: str) -> Fields:
        return {name: self.flip() for name in names}

    def window(self) -> Fields:
        return {"sliding_window": self.one(None, *_WINDOWS)}

    def layer_types(self, layers: int) -> Fields:
        kinds = ("sliding_attention", "full_attention")
        return {
            "sliding_window": self.one(*_WINDOWS),
            "layer_types": [self.one(*kinds) for _ in range(layers)],
        }

    def experts(self, count: str, *, least: int = 1) -> Fields:
        """A token may go to one expert, or to all."""
        experts = self.whole(least, 8)
        return {count: experts, "num_experts_per_tok": self.one(1, self.whole(1, experts), experts)}


def _llama(rng: _Draws) -> Fields:
    return rng.llama_like() | rng.act() | rng.flags("attention_bias", "mlp_bias")


def _mistral(rng: _Draws) -> Fields:
    return rng.llama_like() | rng.act() | rng.window()


def _qwen(rng: _Draws, fields: Fields) -> Fields:
    fields |= rng.act() | {"use_sliding_window": rng.flip(), "sliding_window": rng.one(*_WINDOWS)}
    return fields | {"max_window_layers": rng.whole(0, fields["num_hidden_layers"])}


def _qwen2(rng: _Draws) -> Fields:
    return _qwen(rng, rng.llama_like())


def _qwen3(rng: _Draws) -> Fields:
    return _qwen(rng, _with_head_dim(rng)) | rng.flags("attention_bias")


def _with_head_dim(rng: _Draws) -> Fields:
    """Of a family whose default is not an even share of the width."""
    fields = rng.llama_like()
    return {"head_dim": fields["hidden_size"] // fields["num_attention_heads"], **fields}


def _gemma(rng: _Draws) -> Fields:
    fields = rng.llama_like(kinds=("linear",)) | rng.act("hidden_activation")
    fields.setdefault("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
    fields |= rng.layer_types(fields["num_hidden_layers"]) | rng.flags("attention_bias")
    return fields | {"query_pre_attn_scalar": rng.whole(4, 40)}


def _gemma2(rng: _Draws) -> Fields:
    return _gemma(rng) | {
        "attn_logit_softcapping": rng.one(None, 2.0, 50.0),
        "final_logit_softcapping": rng.one(None, 3.0, 30.0),
        "attn_implementation": "eager",  # the others leave out the cap
    }


def _gemma3(rng: _Draws) -> Fields:
    fields = _gemma(rng)
    dim = fields["head_dim"]
    kinds = {"full_attention": ("linear", "yarn"), "sliding_attention": ()}
    fields["rope_parameters"] = {kind: rng.rope(dim, known) for kind, known in kinds.items()}
    # transformers does not look for this one beside the others of a kind of layer.
    fields["rope_parameters"]["full_attention"].pop("truncate", None)
    return fields | {"final_logit_softcapping": rng.one(None, 3.0)}


def _gemma3_multimodal(rng: _Draws) -> Fields:
    # The multimodal model of transformers has no cap for the final logits.
    text = rng.common() | _gemma3(rng) | {"final_logit_softcapping": None}
    return {"text_config": text, "tie_word_embeddings": text["tie_word_embeddings"]}


def _phi3(rng: _Draws) -> Fields:
    fields = rng.llama_like(head_dim=False, partial=True, kinds=("longrope",)) | rng.act()
    fields |= rng.window()
    if fields["rope_parameters"]["rope_type"] == "longrope":
        fields["original_max_position_embeddings"] = _TRAINED
    return fields


def _glm(rng: _Draws) -> Fields:
    fields = rng.llama_like(partial=True) | rng.act() | rng.flags("attention_bias")
    fields.setdefault("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
    return fields


def _olmo2(rng: _Draws) -> Fields:
    return rng.llama_like(head_dim=False) | rng.act() | rng.flags("attention_bias")


def _granite(rng: _Draws) -> Fields:
    # Larger ones let float32's rounding grow from layer to layer.
    multipliers = ("embedding", "attention", "residual")
    scales = {f"{name}_multiplier": rng.number(0.1, 0.5) for name in multipliers}
    fields = rng.llama_like(head_dim=False) | rng.act() | rng.flags("attention_bias", "mlp_bias")
    return fields | scales | {"logits_scaling": rng.number(0.5, 8.0)}


def _cohere(rng: _Draws) -> Fields:
    fields = rng.llama_like(head_dim=False) | rng.act()
    del fields["rms_norm_eps"]
    fields |= rng.flags("attention_bias", "use_qk_norm")
    return fields | {"logit_scale": rng.number(0.05, 1.0), "layer_norm_eps": rng.one(1e-5, 1e-2)}


def _cohere2(rng: _Draws) -> Fields:
    fields = _cohere(rng)
    del fields["use_qk_norm"]
    return fields | rng.layer_types(fields["num_hidden_layers"])


def _starcoder2(rng: _Draws) -> Fields:
    fields = rng.llama_like(head_dim=False) | rng.act() | rng.window() | rng.flags("use_bias")
    del fields["rms_norm_eps"]
    return fields | {"norm_epsilon": rng.one(1e-5, 1e-2)}


def _gpt2_sizes(rng: _Draws) -> Fields:
    heads = rng.whole(1, 9)
    return {
        "n_head": heads,
        "n_embd": heads * 2 * rng.whole(2, 8),
        "n_layer": rng.layers(),
        "n_inner": rng.one(None, rng.whole(5, 120)),
        "n_positions": CONTEXT,
        "activation_function": rng.one("gelu_new", "gelu", "relu", "silu"),
        "layer_norm_epsilon": rng.one(1e-5, 1e-2),
    }


def _gpt2(rng: _Draws) -> Fields:
    return _gpt2_sizes(rng) | rng.flags("scale_attn_weights", "scale_attn_by_inverse_layer_idx")


def _gpt_bigcode(rng: _Draws) -> Fields:
    return _gpt2_sizes(rng) | rng.flags("multi_query", "scale_attn_weights")


def _gptj(rng: _Draws) -> Fields:
    fields = _gpt2_sizes(rng)
    head_dim = fields["n_embd"] // fields["n_head"]
    return fields | {"rotary_dim": 2 * rng.whole(1, head_dim // 2)}


def _falcon(rng: _Draws) -> Fields:
    kv, newer = rng.one(1, 2, 3), rng.flip()
    heads = kv * rng.one(1, 2, 3) if newer else rng.whole(1, 8)
    fields = {
        "num_hidden_layers": rng.layers(),
        "num_attention_heads": heads,
        "hidden_size": heads * 4 * rng.whole(1, 4),
        "ffn_hidden_size": rng.whole(5, 120),
        "new_decoder_architecture": newer,
        "layer_norm_epsilon": rng.one(1e-5, 1e-2),
        "activation": rng.one("gelu", "relu"),
        "max_position_embeddings": CONTEXT,
        **rng.flags("bias"),
    }
    if newer:
        return fields | {"num_kv_heads": kv, "num_ln_in_parallel_attn": rng.one(1, 2)}
    return fields | rng.flags("multi_query", "parallel_attn", "alibi")


def _gpt_neox(rng: _Draws) -> Fields:
    fields = rng.llama_like(head_dim=False, partial=True, grouped=False)
    for name in ("num_key_value_heads", "rms_norm_eps"):
        del fields[name]
    fields |= rng.flags("use_parallel_residual", "attention_bias")
    return fields | {"hidden_act": rng.one("gelu", "gelu_fast", "gelu_new", "relu")}


def _opt(rng: _Draws) -> Fields:
    heads = rng.whole(1, 8)
    width = heads * 2 * rng.whole(2, 8)
    return {
        "num_attention_heads": heads,
        "hidden_size": width,
        "word_embed_proj_dim": rng.one(width, rng.whole(5, 90)),
        "ffn_dim": rng.whole(5, 120),
        "num_hidden_layers": rng.layers(),
        "max_position_embeddings": CONTEXT,
        "activation_function": rng.one("relu", "gelu"),
        **rng.flags("do_layer_norm_before", "enable_bias", "_remove_final_layer_norm"),
    }


def _bloom(rng: _Draws) -> Fields:
    heads = rng.whole(1, 12)
    return {
        "n_head": heads,
        "hidden_size": heads * 4 * rng.whole(1, 4),
        "n_layer": rng.layers(),
        "layer_norm_epsilon": rng.one(1e-5, 1e-2),
    }


def _stablelm(rng: _Draws) -> Fields:
    fields = rng.llama_like(head_dim=False, partial=True) | rng.act()
    del fields["rms_norm_eps"]
    fields |= {"layer_norm_eps": rng.one(1e-5, 1e-2)}
    return fields | rng.flags("use_qkv_bias", "qk_layernorm", "use_parallel_residual")


def _mixtral(rng: _Draws) -> Fields:
    fields = rng.llama_like() | rng.act() | rng.window() | rng.experts("num_local_experts")
    fields.setdefault("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
    return fields


def _qwen_moe(rng: _Draws, fields: Fields) -> Fields:
    layers = fields["num_hidden_layers"]
    return (
        _qwen(rng, fields)
        | rng.experts("num_experts")
        | rng.flags("norm_topk_prob")
        | {
            "moe_intermediate_size": rng.whole(5, 60),
            "decoder_sparse_step": rng.one(1, 2),
            "mlp_only_layers": rng.one([], [layers - 1]),
        }
    )


def _qwen2_moe(rng: _Draws) -> Fields:
    shared = {"shared_expert_intermediate_size": rng.whole(5, 60)}
    return _qwen_moe(rng, rng.llama_like()) | shared | rng.flags("qkv_bias")


def _qwen3_moe(rng: _Draws) -> Fields:
    return _qwen_moe(rng, _with_head_dim(rng)) | rng.flags("attention_bias")


def _gpt_oss(rng: _Draws) -> Fields:
    fields = rng.llama_like(kinds=("yarn", "linear"))
    fields.setdefault("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
    fields |= rng.layer_types(fields["num_hidden_layers"]) | rng.flags("attention_bias")
    return fields | rng.experts("num_local_experts") | {"swiglu_limit": rng.one(0.5, 2.0, 7.0)}


def _deepseek(rng: _Draws) -> Fields:
    heads, rope = rng.whole(1, 6), 2 * rng.whole(1, 5)
    stated = rng.rope(rope, ("yarn", "linear"))
    if stated["rope_type"] == "yarn" and "attention_factor" not in stated:
        stated |= rng.one({}, {"mscale": 1.0, "mscale_all_dim": rng.one(0.707, 1.0)})
    return {
        "hidden_size": heads * rng.whole(3, 20),
        "intermediate_size": rng.whole(5, 120),
        "moe_intermediate_size": rng.whole(5, 60),
        "num_hidden_layers": rng.layers(),
        "first_k_dense_replace": rng.one(0, 1, 2),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "q_lora_rank": rng.one(None, rng.whole(4, 30)),
        "kv_lora_rank": 2 * rng.whole(2, 20),  # V2's rotation in transformers wants even strides
        "qk_nope_head_dim": 2 * rng.whole(1, 8),
        "qk_rope_head_dim": rope,
        "v_head_dim": rng.whole(1, 16),
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": rng.one(1e-6, 1e-5),
        "rope_parameters": stated,
        "n_shared_experts": rng.one(1, 2),
        "routed_scaling_factor": rng.number(0.5, 3.0),
        **rng.act(),
        **rng.flags("attention_bias"),
    }


def _deepseek_v2(rng: _Draws) -> Fields:
    fields = _deepseek(rng)
    if rng.flip():
        return fields | rng.experts("n_routed_experts") | {"topk_method": "greedy"}
    groups, each = rng.whole(1, 4), rng.whole(1, 3)
    top = rng.whole(1, groups)
    return fields | {
        "topk_method": "group_limited_greedy",
        "n_routed_experts": groups * each,
        "n_group": groups,
        "topk_group": top,
        "num_experts_per_tok": rng.whole(1, top * each),
    }


def _deepseek_v3(rng: _Draws) -> Fields:
    groups, each = rng.whole(1, 4), rng.whole(2, 3)
    top = rng.whole(1, groups)
    return (
        _deepseek(rng)
        | rng.flags("norm_topk_prob", "rope_interleave")
        | {
            "n_routed_experts": groups * each,
            "n_group": groups,
            "topk_group": top,
            "num_experts_per_tok": rng.whole(1, top * each),
        }
    )


_FAMILIES: dict[str, Callable[[_Draws], Fields]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gemma3_multimodal": _gemma3_multimodal,
    "phi3": _phi3,
    "glm": _glm,
    "glm4": _glm,
    "olmo2": _olmo2,
    "granite": _granite,
    "cohere": _cohere,
    "cohere2": _cohere2,
    "starcoder2": _starcoder2,
    "gpt2": _gpt2,
    "gpt_bigcode": _gpt_bigcode,
    "gptj": _gptj,
    "falcon": _falcon,
    "gpt_neox": _gpt_neox,
    "opt": _opt,
    "bloom": _bloom,
    "stablelm": _stablelm,
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "gpt_oss": _gpt_oss,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
}
