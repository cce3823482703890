"""From a config to a spec, field by field, with transformers' own config classes as the judge."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
from transformers import CONFIG_MAPPING, Phi3Config, Phi3ForCausalLM
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

from shards.checkpoint.loader import load_shard
from shards.checkpoint.safetensors_index import open_safetensors
from shards.checkpoint.verify import verify
from shards.errors import UnsupportedModel
from shards.layout import make_layout
from shards.models.parameters import parameters
from shards.models.registry import FAMILIES, family_of_config, family_of_gguf
from shards.models.source import ModelSource, open_model
from shards.models.spec import LinearScaling, Llama3Scaling, ModelSpec, YarnScaling
from tests.models import save, tiny_model, write_gguf

NAMES = [family.model_type for family in FAMILIES]


def spec_of(model_type: str, **fields: Any) -> ModelSpec:
    config = {"model_type": model_type, **fields}
    return family_of_config(config).spec(config)


def filled(model_type: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The same config with transformers' defaults and its spelling of every field."""
    return CONFIG_MAPPING[model_type].from_dict(dict(fields)).to_dict()


# Fields without which a model cannot run, whatever its config class says.
NEEDED = {"deepseek_v2": {"num_experts_per_tok": 6}}


@pytest.mark.parametrize("model_type", NAMES)
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    needed = NEEDED.get(model_type, {})
    assert spec_of(model_type, **needed) == spec_of(**filled(model_type, needed))


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        # Llama 2 7B and Llama 3.1 8B, TinyLlama, SmolLM2, as their config.json states them.
        ("llama", {"max_position_embeddings": 4096, "rope_scaling": None, "head_dim": None}),
        (
            "llama",
            {
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_key_value_heads": 8,
                "rope_theta": 500000.0,
                "max_position_embeddings": 131072,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
                "torch_dtype": "bfloat16",
            },
        ),
        ("llama", {"rope_theta": 1e5, "rope_scaling": {"type": "linear", "factor": 2.0}}),
        (
            "llama",
            {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 80}
            | {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
        ),
        ("qwen2", {"num_key_value_heads": None, "num_attention_heads": 16}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 32768, "rope_theta": 1e6}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 32}),
        (
            "qwen2",
            {"rope_scaling": {"type": "yarn", "factor": 4.0}, "tie_word_embeddings": True}
            | {"max_position_embeddings": 131072, "original_max_position_embeddings": 32768},
        ),
        ("gpt2", {"n_ctx": 1024, "n_inner": 100, "activation_function": "relu"}),
        ("gpt2", {"hidden_size": 96, "num_attention_heads": 8, "num_hidden_layers": 3}),
        ("gpt2", {"scale_attn_weights": False, "tie_word_embeddings": False}),
        # GPT-3 175B.
        ("gpt2", {"n_embd": 12288, "n_head": 96, "n_layer": 96, "n_positions": 2048}),
        ("gpt_bigcode", {"multi_query": False, "n_inner": None, "dtype": "float16"}),
        ("gpt_bigcode", {"n_embd": 6144, "n_head": 48, "n_positions": 8192, "n_inner": 24576}),
    ],
)
def test_spec_is_the_same_before_and_after_transformers(
    model_type: str, fields: dict[str, Any]
) -> None:
    """A raw config.json and the one that transformers makes of it describe one model."""
    assert spec_of(model_type, **fields) == spec_of(**filled(model_type, fields))


def test_inverse_layer_scale_makes_layers_differ() -> None:
    spec = spec_of("gpt2", n_embd=64, n_head=4, scale_attn_by_inverse_layer_idx=True)
    assert [layer.attention.scale for layer in spec.layers] == [0.25 / (i + 1) for i in range(12)]


def test_equal_layers_share_one_object() -> None:
    for name in NAMES:
        layers = spec_of(name, **NEEDED.get(name, {})).layers
        assert len({id(layer) for layer in layers}) == len(set(layers))


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"type": "linear", "factor": 2}, LinearScaling(2.0)),
        (
            {
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            Llama3Scaling(32.0, 1.0, 4.0, 8192),
        ),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
            YarnScaling(4.0, 512, 0.1 * math.log(4.0) + 1.0),
        ),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
            | {"attention_factor": 1.5, "beta_fast": 16, "beta_slow": 2, "truncate": False},
            YarnScaling(4.0, 512, 1.5, 16.0, 2.0, truncate=False),
        ),
    ],
)
def test_rope_scaling(scaling: dict[str, Any], expected: object) -> None:
    for field in ("rope_scaling", "rope_parameters"):
        rotary = (
            spec_of("llama", **{field: {"rope_theta": 5e5, **scaling}}).layers[0].attention.rotary
        )
        assert rotary is not None
        assert (rotary.theta, rotary.dim, rotary.scaling) == (5e5, 128, expected)


def test_yarn_stretches_the_context() -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert spec_of("qwen2", rope_scaling=yarn).context == 131072


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("model_type", "fields", "said"),
    [
        ("llama", {"rope_scaling": {"type": "ntk", "factor": 2.0}}, "'ntk': known rope .*linear"),
        ("llama", {"rope_scaling": {"rope_type": "longrope"}}, "rope_scaling.short_factor is None"),
        ("llama", {"rms_norm_eps": 10**400}, "rms_norm_eps is 1000.*: a number above 0"),
        ("llama", {"rope_scaling": YARN | {"factor": 1e300}}, "factor is 1e.300: of a trained"),
        ("llama", {"rope_scaling": YARN | {"rope_theta": 1}}, "rope_theta is 1: YaRN"),
        (
            "deepseek_v2",
            {"rope_scaling": YARN | {"mscale_all_dim": 1e308}},
            "mscale_all_dim is inf",
        ),
        (
            "llama",
            {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}},
            "low_freq_factor=4 and high_freq_factor=4: the latter must be the larger",
        ),
        ("llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is None"),
        ("llama", {"rope_scaling": "linear"}, "rope_scaling is 'linear': an object"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("llama", {"head_dim": 33}, "head_dim 33 is odd"),
        ("llama", {"hidden_act": "mish"}, "hidden_act is 'mish': known are silu"),
        ("llama", {"num_attention_heads": 9}, "hidden_size=4096 and num_attention_heads=9"),
        ("llama", {"num_key_value_heads": 5}, "num_key_value_heads=5: the KV heads must divide"),
        ("llama", {"hidden_size": "wide"}, "hidden_size is 'wide': a whole number above 0"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ("llama", {"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0: a number above 0"),
        ("llama", {"attention_bias": "yes"}, "attention_bias is 'yes': true or false"),
        ("llama", {"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000: at most 10,000"),
        ("gpt2", {"n_layer": 10**8}, "n_layer is 100000000: at most 10,000"),
        ("llama", {"num_attention_heads": 8192}, "num_attention_heads is 8192: at most 4,096"),
        ("gpt_bigcode", {"n_head": 2**31}, "n_head is 2147483648: at most 4,096"),
        ("llama", {"vocab_size": 2**31}, "vocab_size is 2147483648: at most 2,147,483,647"),
        ("llama", {"dtype": "int8"}, "dtype is 'int8': known are float32"),
        ("llama", {"torch_dtype": "float8_e4m3fn"}, "dtype is 'float8_e4m3fn': known are float32"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True"),
        ("gpt_bigcode", {"add_cross_attention": True}, "add_cross_attention is True"),
        ("gpt2", {"n_head": 7}, "n_embd=768 and n_head=7"),
    ],
)
def test_refused_with_field_and_value(model_type: str, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModel, match=said):
        spec_of(model_type, **fields)


def test_family_by_architecture_or_model_type() -> None:
    for family in FAMILIES:
        assert family_of_config({"architectures": list(family.architectures)}) is family
        assert family_of_config({"model_type": family.model_type}) is family
        if family.gguf is not None:
            found = family_of_gguf(family.gguf.architecture, experts=bool(family.gguf.experts))
            assert found == (family, family.gguf)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"architectures": ["LlamaForCasualLM"]}, "LlamaForCausalLM, .*nearest is LlamaForCausalL"),
        ({"architectures": ["LlamaForSequenceClassification"], "model_type": "llama"}, "unknown"),
        ({"model_type": "gpt-2"}, "known are llama, .*, gpt2, .*; the nearest is gpt2"),
        ({}, "neither architectures nor model_type"),
        ({"architectures": [], "model_type": "lama"}, "model_type 'lama' is unknown: .* is llama"),
        (
            {"architectures": ["OwnForCausalLM"], "auto_map": {"AutoModel": "modeling_own.Own"}},
            "'OwnForCausalLM' is unknown: .* auto_map names code .* never run",
        ),
        (
            {
                "architectures": ["Mistral3ForConditionalGeneration"],
                "text_config": {"model_type": "mistral"},
            },
            "'Mistral3ForConditionalGeneration' is unknown: .* text model of model_type 'mistral'",
        ),
    ],
)
def test_unknown_architecture_lists_the_known(config: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModel, match=said):
        family_of_config(config)


@pytest.mark.parametrize("field", [{"max_window_layers": "28"}, {"layer_types": 3}])
def test_windows_that_cannot_be_read_are_refused(field: dict[str, Any]) -> None:
    (name,) = field
    with pytest.raises(UnsupportedModel, match=name):
        spec_of("qwen2", use_sliding_window=True, sliding_window=64, **field)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_gguf_names_are_those_of_the_converter(architecture: str) -> None:
    """Each parameter's two names, one per format, are a pair in the gguf package's table."""
    family, names = family_of_gguf(architecture)
    spec = spec_of(family.model_type, tie_word_embeddings=False)
    numbered = {name: number for number, name in MODEL_ARCH_NAMES.items()}
    table = get_tensor_name_map(numbered[architecture], len(spec.layers))
    ours, hf = names.sources(spec), family.sources(spec)
    for parameter in parameters(spec):
        name = hf[parameter.name].tensor
        assert ours[parameter.name].tensor == table.get_name(name, (".weight", ".bias"))


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_gguf_metadata_is_read_as_transformers_reads_it(architecture: str) -> None:
    """Every key in transformers' table, given a value, ends in the same config field."""
    _, names = family_of_gguf(architecture)
    table = {key: field for key, field in GGUF_CONFIG_MAPPING[architecture].items() if field}
    table.pop("vocab_size")  # taken from the embedding's shape, which every file has
    metadata = {f"{architecture}.{key}": 2 + n for n, key in enumerate(table)}
    config = names.config(metadata)
    for key, field in table.items():
        assert config[field] == metadata[f"{architecture}.{key}"]


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "head_dim": 12, "attention_bias": True}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e5}}),
        (
            "llama",
            {
                "head_dim": 64,
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 5e5,
                    "factor": 32.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            },
        ),
        (
            "qwen2",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 1e6,
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
        ),
        ("gpt2", {"n_inner": None}),
    ],
)
def test_gguf_and_folder_give_one_spec(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    # Powers of two survive the float32 of GGUF's metadata.
    eps = "layer_norm_epsilon" if family == "gpt2" else "rms_norm_eps"
    model = tiny_model(family, **{eps: 2.0**-20}, **fields)
    folder = open_model(str(save(model, tmp_path / "folder"))).spec
    file = open_model(str(write_gguf(model, tmp_path / "model.gguf"))).spec
    assert file == folder


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"llama.attention.head_count_kv": [3, 3, 1]}, "head_count_kv differs from layer to layer"),
        ({"llama.attention.key_length": 32}, "rope.dimension_count is 16 and the head_dim is 32"),
        ({"llama.block_count": None}, "has no llama.block_count"),
        (
            {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.attn_factor": 0.5},
            "attn_factor is 0.5: only 1 is known",
        ),
    ],
)
def test_gguf_option_without_a_part(metadata: dict[str, Any], said: str) -> None:
    family, names = family_of_gguf("llama")
    given = {
        "llama.context_length": 256,
        "llama.embedding_length": 48,
        "llama.feed_forward_length": 100,
        "llama.block_count": 3,
        "llama.attention.head_count": 3,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": 16,
    }
    assert family.spec(names.config(given)).layers[0].attention.kv_heads == 3
    with pytest.raises(UnsupportedModel, match=said):
        names.config(given | metadata)


def test_rope_freqs_of_another_scaling(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 2.0,
        "high_freq_factor": 16.0,
        "original_max_position_embeddings": 8192,
    }
    model = tiny_model("llama", head_dim=64, rope_parameters=rope)
    with pytest.raises(UnsupportedModel, match=r"rope_freqs\.weight scales frequency .* safetens"):
        open_model(str(write_gguf(model, tmp_path / "model.gguf")))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gpt_bigcode"])
def test_tiny_models_are_no_trivial_judges(family: str) -> None:
    """No parameter is all zeros or all ones, and the logits tell tokens apart."""
    model = tiny_model(family)
    assert all(p.std() > 0.05 for p in model.parameters())
    with torch.inference_mode():
        logits = model(torch.arange(20)[None]).logits[0]
    assert logits.std() > 1
    assert len(set(logits.argmax(-1).tolist())) > 3


def test_the_example_in_the_guide_loads_its_model(tmp_path: Path) -> None:
    """docs/adding_a_family.md: its code, run as it stands, against a tiny Phi-3."""
    guide = Path(__file__).parents[2] / "docs/adding_a_family.md"
    code = guide.read_text().split("```python\n")[1].split("```")[0]
    module: dict[str, Any] = {}
    exec(compile(code, str(guide), "exec", dont_inherit=True), module)
    family = module["FAMILY"]
    assert family.spec({}) == family.spec(filled("phi3", {}))

    sizes = {"vocab_size": 50, "hidden_size": 48, "intermediate_size": 70, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "pad_token_id": None}
    model = Phi3ForCausalLM(Phi3Config(**sizes, **heads))
    save(model, tmp_path)
    spec = family.spec(model.config.to_dict())
    checkpoint = open_safetensors(tmp_path)
    sources = family.sources(spec)
    verify(checkpoint, spec, sources, family.ignored, family.prefix)
    source = ModelSource("phi3", str(tmp_path), spec, sources, checkpoint)

    layer = model.model.layers[1]
    q, k, v = layer.self_attn.qkv_proj.weight.split([48, 16, 16])
    gate, up = layer.mlp.gate_up_proj.weight.chunk(2)
    expected = {
        "attention.q": q,
        "attention.k": k,
        "attention.v": v,
        "ffn.gate": gate,
        "ffn.up": up,
    }
    layout = make_layout(spec, 4)
    table = {parameter.name: parameter for parameter in parameters(spec)}
    for rank in range(4):
        shard = load_shard(source, layout, rank, torch.float32, torch.device("cpu"))
        for name, whole in expected.items():
            owned = layout.owned(table[f"layers.1.{name}.weight"], rank)
            assert torch.equal(shard[f"layers.1.{name}.weight"], whole[owned.start : owned.stop])
