"""The dense families after Llama: their specs, judged by transformers' configs, by the published
sizes, and by what a saved model and a GGUF file of it hold."""

from __future__ import annotations

import math
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING

from shards.checkpoint.loader import load_shard
from shards.errors import UnsupportedModel
from shards.layout import make_layout
from shards.models.parameters import parameters
from shards.models.registry import family_of_config, family_of_gguf
from shards.models.source import ModelSource, open_model
from shards.models.spec import Attention, LinearScaling, LongRopeScaling, ModelSpec, Rotary
from tests.gguf_models import write_dense_gguf
from tests.models import save, tiny_model

QWEN3_8B = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_theta": 1e6,
    "max_position_embeddings": 40960,
}
QWEN3_06B = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
GEMMA2_27B = {
    "hidden_size": 4608,
    "intermediate_size": 36864,
    "num_hidden_layers": 46,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "query_pre_attn_scalar": 144,
}
GEMMA3_1B = {
    "vocab_size": 262144,
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_hidden_layers": 26,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32768,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "rope_local_base_freq": 10000,
    "rope_theta": 1000000,
}
GEMMA3_4B_TEXT = {
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 34,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
}
LONGROPE_96 = {
    "type": "longrope",
    "short_factor": [1.0] * 48,
    "long_factor": [1 + n / 2 for n in range(48)],
}
PHI4_MINI = {
    "vocab_size": 200064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "partial_rotary_factor": 0.75,
    "rope_scaling": LONGROPE_96,
    "sliding_window": 262144,
    "tie_word_embeddings": True,
}
PHI4 = {
    "vocab_size": 100352,
    "hidden_size": 5120,
    "intermediate_size": 17920,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 10,
    "max_position_embeddings": 16384,
    "original_max_position_embeddings": 16384,
    "rope_theta": 250000,
}
GLM4_32B = {
    "hidden_size": 6144,
    "intermediate_size": 23040,
    "num_hidden_layers": 61,
    "num_attention_heads": 48,
    "num_key_value_heads": 2,
    "attention_bias": False,
    "max_position_embeddings": 32768,
}
OLMO2_7B = {"vocab_size": 100352, "max_position_embeddings": 4096, "rope_theta": 500000}
GRANITE_33_2B = {
    "vocab_size": 49159,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
    "attention_multiplier": 0.015625,
    "embedding_multiplier": 12.0,
    "logits_scaling": 8.0,
    "residual_multiplier": 0.22,
}
COMMAND_R_PLUS = {
    "hidden_size": 12288,
    "intermediate_size": 33792,
    "num_hidden_layers": 64,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "use_qk_norm": True,
    "logit_scale": 0.8333333333333334,
    "rope_theta": 75000000.0,
}
COMMAND_R7B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "logit_scale": 0.25,
    "rope_theta": 50000,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
}
STARCODER2_3B = {
    "max_position_embeddings": 16384,
    "sliding_window": 4096,
    "rope_theta": 999999.4420358813,
    "norm_epsilon": 1e-5,
}


def spec_of(model_type: str, **fields: Any) -> ModelSpec:
    config = {"model_type": model_type, **fields}
    return family_of_config(config).spec(config)


def attention_of(spec: ModelSpec, layer: int) -> Attention:
    attention = spec.layers[layer].attention
    assert isinstance(attention, Attention)
    return attention


def rotary_of(spec: ModelSpec, layer: int) -> Rotary:
    rotary = attention_of(spec, layer).rotary
    assert rotary is not None
    return rotary


@pytest.mark.parametrize(
    ("model_type", "fields", "published"),
    [
        ("qwen3", QWEN3_06B, 596_049_920),
        ("qwen3", QWEN3_8B, 8_190_735_360),
        ("gemma2", {}, 2_614_341_888),
        ("gemma2", GEMMA2_27B, 27_227_128_320),
        ("gemma3_text", GEMMA3_1B, 999_885_952),
        ("gemma3", {"text_config": GEMMA3_4B_TEXT}, 3_880_263_168),
        ("phi3", {}, 3_821_079_552),
        ("phi3", PHI4, 14_659_507_200),
        ("phi3", PHI4_MINI, 3_836_021_760),
        ("glm", {}, 9_399_951_360),
        ("glm4", {"max_position_embeddings": 32768}, 9_400_279_040),
        ("glm4", GLM4_32B, 32_566_081_536),
        ("olmo2", OLMO2_7B, 7_298_617_344),
        ("granite", GRANITE_33_2B, 2_533_539_840),
        ("cohere", {}, 34_980_831_232),
        ("cohere", COMMAND_R_PLUS, 103_810_674_688),
        ("cohere2", COMMAND_R7B, 8_028_033_024),
        ("starcoder2", STARCODER2_3B, 3_030_371_328),
    ],
)
def test_published_models(model_type: str, fields: dict[str, Any], published: int) -> None:
    """The parameters of the checkpoint, and one spec before and after transformers read it."""
    spec = spec_of(model_type, **fields)
    assert sum(prod(parameter.shape) for parameter in parameters(spec)) == published
    filled = CONFIG_MAPPING[model_type].from_dict(dict(fields)).to_dict()
    assert spec_of(**filled) == spec


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("qwen3", {"num_key_value_heads": None, "head_dim": 64, "attention_bias": True}),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 20}),
        ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
        ("gemma2", {"layer_types": ["full_attention"] * 26, "tie_word_embeddings": False}),
        ("gemma3_text", {"sliding_window_pattern": 2, "attention_bias": True}),
        ("gemma3_text", {"final_logit_softcapping": 9.0, "query_pre_attn_scalar": 168}),
        ("phi3", {"num_key_value_heads": 8, "sliding_window": 2047}),
        ("phi3", PHI4_MINI | {"rope_scaling": LONGROPE_96 | {"factor": 9.0}}),
        (
            "phi3",
            PHI4_MINI
            | {
                "rope_scaling": LONGROPE_96
                | {"type": "su", "original_max_position_embeddings": 4096}
            },
        ),
        ("glm", {"partial_rotary_factor": 0.25, "rope_theta": 5e5, "attention_bias": False}),
        ("glm4", {"rope_parameters": {"rope_theta": 5e5, "partial_rotary_factor": 1.0}}),
        ("olmo2", {"num_key_value_heads": 8, "rope_scaling": {"type": "linear", "factor": 2.0}}),
        ("granite", {"attention_bias": True, "mlp_bias": True, "rope_theta": 5e6}),
        ("cohere", {"num_key_value_heads": 8, "attention_bias": True}),
        ("cohere2", {"layer_types": ["full_attention", "sliding_attention"] * 20}),
        ("starcoder2", {"use_bias": False, "tie_word_embeddings": False}),
    ],
)
def test_spec_is_the_same_before_and_after_transformers(
    model_type: str, fields: dict[str, Any]
) -> None:
    filled = CONFIG_MAPPING[model_type].from_dict(dict(fields)).to_dict()
    assert spec_of(model_type, **fields) == spec_of(**filled)


def test_gemma3_layers_differ_in_window_and_rotation() -> None:
    spec = spec_of("gemma3", text_config=GEMMA3_4B_TEXT, torch_dtype="bfloat16")
    assert spec.dtype == "bfloat16"
    windows = [attention_of(spec, i).window for i in range(12)]
    assert windows == [*[1024] * 5, None] * 2
    assert rotary_of(spec, 4) == Rotary(1e4, 256)
    assert rotary_of(spec, 5) == Rotary(1e6, 256, scaling=LinearScaling(8.0))
    assert spec.embedding_scale == math.sqrt(2560)


def test_cohere2_rotates_windowed_layers_alone() -> None:
    """Even where the window holds the whole context, as the default context is the window."""
    for context, window in ((8192, 4096), (4096, None)):
        spec = spec_of("cohere2", max_position_embeddings=context)
        assert rotary_of(spec, 0).interleaved
        assert [attention_of(spec, i).window for i in range(4)] == [window] * 3 + [None]
        assert [attention_of(spec, i).rotary is None for i in range(4)] == [False] * 3 + [True]


def test_longrope_of_phi4_mini() -> None:
    rotary = rotary_of(spec_of("phi3", **PHI4_MINI), 0)
    assert isinstance(rotary.scaling, LongRopeScaling)
    assert (rotary.dim, rotary.scaling.original_context) == (96, 4096)
    assert rotary.scaling.long[:3] == (1.0, 1.5, 2.0)
    # sqrt(1 + ln 32 / ln 4096) = sqrt(1 + 5/12)
    assert rotary.scaling.attention_factor == pytest.approx(math.sqrt(17 / 12))


@pytest.mark.parametrize(
    ("model_type", "fields", "said"),
    [
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention is T"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0: Gemma"),
        ("gemma3_text", {"rope_parameters": 3}, "rope_parameters is 3: an object"),
        (
            "gemma3_text",
            {"rope_parameters": {"full_attention": 1.5}},
            "rope_parameters.full_attention is 1.5: an object",
        ),
        ("gemma3_text", {"rope_scaling": "linear"}, "rope_scaling is 'linear': an object"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
        ("gemma3", {"text_config": [1]}, r"text_config is \[1\]: an object"),
        ("gemma2", {"layer_types": ["full_attention"]}, "num_hidden_layers=26 is needed"),
        ("gemma2", {"layer_types": ["linear_attention"] * 26}, "layer_types is 'linear_attention'"),
        (
            "qwen3",
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
            r"rope_parameters differs by layer \(full_attention\)",
        ),
        ("qwen3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "with longrope"),
        (
            "phi3",
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            r"short_factor has 1 numbers: 48 are needed, one for each pair of the 96",
        ),
        (
            "phi3",
            {"rope_scaling": {"type": "longrope", "short_factor": [-1.0], "long_factor": [1.0]}},
            r"short_factor\[0\] is -1.0: a number above 0",
        ),
        ("phi3", {"rope_scaling": {"type": "longrope"}}, "short_factor is None: a list"),
        ("phi3", PHI4_MINI | {"original_max_position_embeddings": 1}, "embeddings is 1: from 2"),
        ("phi3", {"partial_rotary_factor": 1e308}, "partial_rotary_factor is 1e.308: of head_dim"),
        ("granite", {"logits_scaling": 0}, "logits_scaling is 0: a number above 0"),
        ("starcoder2", {"use_bias": None, "num_key_value_heads": 7}, "num_key_value_heads=7"),
    ],
)
def test_refused_with_field_and_value(model_type: str, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModel, match=said):
        spec_of(model_type, **fields)


def loaded(source: ModelSource, world: int, rank: int) -> dict[str, torch.Tensor]:
    layout = make_layout(source.spec, world)
    return load_shard(source, layout, rank, torch.float32, torch.device("cpu"))


# Powers of two survive the float32 of GGUF's metadata.
RMS, LAYER = {"rms_norm_eps": 2.0**-20}, {"layer_norm_eps": 2.0**-17}
LONGROPE = {
    "hidden_size": 9 * 16,
    "original_max_position_embeddings": 64,
    "partial_rotary_factor": 0.75,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 1000.0,
        "short_factor": [1.0, 1.0, 1.25, 1.5, 2.0, 2.5],
        "long_factor": [1.0, 1.5, 2.5, 4.0, 7.0, 9.0],
        "attention_factor": 1.125,
    },
}
GEMMA_GGUF = RMS | {"query_pre_attn_scalar": 12}  # the head_dim, as in all but the largest


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("qwen3", RMS | {"attention_bias": True, "tie_word_embeddings": True}),
        ("gemma2", GEMMA_GGUF),
        ("gemma3", GEMMA_GGUF | {"sliding_window_pattern": 6, "num_hidden_layers": 7}),
        (
            "gemma3",
            GEMMA_GGUF
            | {"layer_types": ["sliding_attention"] * 2}
            | {
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                }
            },
        ),
        ("phi3", RMS),
        ("phi3", RMS | {"sliding_window": 13, "tie_word_embeddings": True}),
        ("phi3", RMS | LONGROPE),
        ("glm", RMS),
        ("glm4", RMS | {"attention_bias": False}),
        ("olmo2", RMS),
        ("granite", RMS | {"tie_word_embeddings": True}),
        ("cohere", LAYER),
        ("cohere", LAYER | {"use_qk_norm": True}),
        ("cohere2", LAYER | {"sliding_window_pattern": 4, "num_hidden_layers": 5}),
        ("starcoder2", {"norm_epsilon": 2.0**-17, "sliding_window": None}),
    ],
)
def test_gguf_and_folder_hold_one_model(
    family: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny_model(family, **fields)
    folder = open_model(str(save(model, tmp_path / "folder")))
    file = open_model(str(write_dense_gguf(model, tmp_path / "model.gguf")))
    assert file.spec == folder.spec
    for world, rank in ((1, 0), (4, 2)):
        expected = loaded(folder, world, rank)
        for name, tensor in loaded(file, world, rank).items():
            assert torch.equal(tensor, expected[name]), name


def test_gemma_norms_are_loaded_with_their_offset(tmp_path: Path) -> None:
    model = tiny_model("gemma3")
    weights = loaded(open_model(str(save(model, tmp_path))), 1, 0)
    layer = model.model.layers[1]
    for name, module in {
        "norm": model.model.norm,
        "layers.1.attention_norm": layer.input_layernorm,
        "layers.1.attention_post_norm": layer.post_attention_layernorm,
        "layers.1.ffn_norm": layer.pre_feedforward_layernorm,
        "layers.1.ffn_post_norm": layer.post_feedforward_layernorm,
        "layers.1.attention.q_norm": layer.self_attn.q_norm,
        "layers.1.attention.k_norm": layer.self_attn.k_norm,
    }.items():
        assert torch.equal(weights[f"{name}.weight"], 1 + module.weight), name


def test_text_of_the_multimodal_gemma3(tmp_path: Path) -> None:
    """Its text alone: the tensors of the vision tower are left where they are."""
    model = tiny_model("gemma3_multimodal")
    source = open_model(str(save(model, tmp_path)))
    text = model.model.language_model
    weights = loaded(source, 1, 0)
    assert sum(t.numel() for t in weights.values()) == sum(p.numel() for p in text.parameters())
    assert torch.equal(weights["embedding.weight"], text.embed_tokens.weight)
    assert torch.equal(weights["layers.1.ffn.up.weight"], text.layers[1].mlp.up_proj.weight)


@pytest.mark.parametrize(
    ("architecture", "metadata", "scale"),
    [
        ("gemma2", {"embedding_length": 2304, "block_count": 26, "attention.head_count": 8}, 256),
        ("gemma2", {"embedding_length": 4608, "block_count": 46, "attention.head_count": 32}, 144),
        ("gemma3", {"embedding_length": 5376, "block_count": 62, "attention.head_count": 32}, 168),
    ],
)
def test_scale_of_gguf_gemma_by_its_size(
    architecture: str, metadata: dict[str, int], scale: int
) -> None:
    family, names = family_of_gguf(architecture)
    common = {
        "context_length": 8192,
        "feed_forward_length": 9216,
        "attention.head_count_kv": 4,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.key_length": 256 if scale == 256 else 128,
    }
    given = {f"{architecture}.{key}": value for key, value in {**common, **metadata}.items()}
    assert attention_of(family.spec(names.config(given)), 0).scale == scale**-0.5


def test_olmo3_in_gguf_is_refused() -> None:
    _, names = family_of_gguf("olmo2")
    with pytest.raises(UnsupportedModel, match=r"olmo2\.attention\.sliding_window is 4096: OLMo 3"):
        names.config({"olmo2.attention.sliding_window": 4096})
