"""Tiny random models of every family, and the files a user would hand over for them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from transformers import PreTrainedModel

# Sizes that no number of ranks but 1 divides: 131 rows, 101 channels, 9 heads over 3 KV heads.
_COMMON = {"vocab_size": 131, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_LLAMA_LIKE = {
    "intermediate_size": 101,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 256,
}
_GEMMA_LIKE = _LLAMA_LIKE | {"head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 13}
_GPT2_LIKE = {"n_inner": 101, "n_layer": 2, "n_head": 7, "n_positions": 256}
_DEEPSEEK = {
    "intermediate_size": 101,
    "moe_intermediate_size": 37,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 7,
    "num_key_value_heads": 7,
    "q_lora_rank": 20,
    "kv_lora_rank": 28,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 11,
    "max_position_embeddings": 256,
}
_FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _LLAMA_LIKE),
    "qwen2": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        _LLAMA_LIKE | {"num_attention_heads": 14, "num_key_value_heads": 2},
    ),
    "mistral": ("MistralConfig", "MistralForCausalLM", _LLAMA_LIKE | {"sliding_window": 13}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _LLAMA_LIKE | {"head_dim": 12}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        _GEMMA_LIKE
        | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 7.0}
        | {"attn_implementation": "eager"},  # the others leave out the cap
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        _GEMMA_LIKE | {"sliding_window_pattern": 2},
    ),
    "gemma3_multimodal": (
        "Gemma3Config",
        "Gemma3ForConditionalGeneration",
        {
            "text_config": _COMMON | _GEMMA_LIKE | {"hidden_size": 72, "sliding_window_pattern": 2},
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 8,
                "intermediate_size": 9,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 16,
                "patch_size": 8,
            },
        },
    ),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", _LLAMA_LIKE),
    "glm": ("GlmConfig", "GlmForCausalLM", _LLAMA_LIKE | {"head_dim": 12}),
    "glm4": ("Glm4Config", "Glm4ForCausalLM", _LLAMA_LIKE | {"head_dim": 12}),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", _LLAMA_LIKE),
    "granite": (
        "GraniteConfig",
        "GraniteForCausalLM",
        _LLAMA_LIKE
        | {"embedding_multiplier": 3.0, "attention_multiplier": 0.25}
        | {"residual_multiplier": 0.5, "logits_scaling": 4.0},
    ),
    "cohere": ("CohereConfig", "CohereForCausalLM", _LLAMA_LIKE | {"logit_scale": 0.25}),
    "cohere2": (
        "Cohere2Config",
        "Cohere2ForCausalLM",
        _LLAMA_LIKE | {"logit_scale": 0.25, "sliding_window": 13, "sliding_window_pattern": 2},
    ),
    "starcoder2": (
        "Starcoder2Config",
        "Starcoder2ForCausalLM",
        _LLAMA_LIKE | {"sliding_window": 13},
    ),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT2_LIKE),
    "gpt_bigcode": ("GPTBigCodeConfig", "GPTBigCodeForCausalLM", _GPT2_LIKE),
    "falcon": (
        "FalconConfig",
        "FalconForCausalLM",
        {"num_hidden_layers": 2, "num_attention_heads": 7, "ffn_hidden_size": 101},
    ),
    "gpt_neox": (
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        {
            "intermediate_size": 101,
            "num_hidden_layers": 2,
            "num_attention_heads": 7,
            "hidden_size": 7 * 16,
            "max_position_embeddings": 256,
        },
    ),
    "gptj": ("GPTJConfig", "GPTJForCausalLM", _GPT2_LIKE | {"rotary_dim": 6}),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {
            "ffn_dim": 101,
            "num_hidden_layers": 2,
            "num_attention_heads": 7,
            "max_position_embeddings": 256,
        },
    ),
    "bloom": (
        "BloomConfig",
        "BloomForCausalLM",
        {"n_layer": 2, "n_head": 7, "hidden_size": 56, "seq_length": 256},
    ),
    "stablelm": (
        "StableLmConfig",
        "StableLmForCausalLM",
        _LLAMA_LIKE | {"hidden_size": 9 * 16},
    ),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        _LLAMA_LIKE | {"intermediate_size": 37, "num_local_experts": 5},
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        _LLAMA_LIKE
        | {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 37}
        | {"shared_expert_intermediate_size": 41},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        _LLAMA_LIKE | {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 37},
    ),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        _LLAMA_LIKE
        | {"intermediate_size": 37, "head_dim": 12, "sliding_window": 13, "swiglu_limit": 2.0}
        | {"num_local_experts": 5, "num_experts_per_tok": 2},
    ),
    "deepseek_v2": (
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        _DEEPSEEK | {"n_routed_experts": 7, "num_experts_per_tok": 3},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        _DEEPSEEK
        | {"n_routed_experts": 15, "n_group": 5, "topk_group": 3, "num_experts_per_tok": 4},
    ),
}
FAMILIES = tuple(_FAMILIES)


def architecture_of(family: str) -> str:
    """The `architectures` entry of a model that `tiny_model(family)` makes."""
    return _FAMILIES[family][1]


def tiny_model(family: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random fp32 model of `family` (a key of `_FAMILIES`) in eval mode.

    Every parameter is random, biases and norms too, so that leaving one out shows in the logits.
    `overrides` are fields of the family's Hugging Face config. The width, unless given, is 8
    channels for each attention head.
    """
    config_class, model_class, sizes = _FAMILIES[family]
    fields = {**_COMMON, **sizes, **overrides}
    for heads, width in (("num_attention_heads", "hidden_size"), ("n_head", "n_embd")):
        if heads in fields:
            fields.setdefault(width, 8 * fields[heads])
    config = getattr(transformers, config_class)(**fields)
    model: PreTrainedModel = getattr(transformers, model_class)(config).eval()
    # Its grouped matrix product wants rows of whole multiples of 16 bytes.
    model.config._experts_implementation = "eager"
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                parameter.copy_(noise * 0.3)
            elif name.endswith((".mlp.gate.weight", ".router.weight", "_gate.weight")):
                # Narrow enough for more experts than the best to have a say.
                parameter.copy_(noise * 1.5 / math.sqrt(parameter.shape[1]))
            elif parameter.ndim > 1:
                # Wide enough for the layers to outweigh the embedding that they are added to.
                # Several experts are added: each is less wide.
                fan = max(parameter.shape[1:]) if parameter.ndim == 3 else min(parameter.shape)
                parameter.copy_(noise * 2.5 / math.sqrt(fan))
            else:
                parameter.copy_(1.0 + noise * 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.3)
    return model


def save(model: PreTrainedModel, folder: Path, **options: Any) -> Path:
    """A Hugging Face folder with config.json and safetensors; `options` as of save_pretrained."""
    model.save_pretrained(folder, **options)
    return folder


def write_gguf(model: PreTrainedModel, path: Path, quantisation: str = "F32") -> Path:
    """`model` (llama, qwen2 or gpt2) as llama.cpp's converter would write it, without tokenizer.

    Matrices are stored as `quantisation` where their rows are whole blocks of it, else as F32; see
    `quantised_blocks` for what a K-quant's hold.
    """
    architecture = model.config.model_type
    writer = gguf.GGUFWriter(path, architecture)
    write_metadata(writer, model)
    names = gguf.get_tensor_name_map(
        {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[architecture],
        model.config.num_hidden_layers,
    )
    if (getattr(model.config, "rope_parameters", None) or {}).get("rope_type") == "llama3":
        _write_rope_freqs(writer, model)
    tied = model.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        _write_tensor(writer, stored, _converted(model, name, tensor).numpy(), quantisation)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_metadata(writer: gguf.GGUFWriter, model: PreTrainedModel) -> None:
    """What a converter writes about the sizes of `model`."""
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if config.model_type == "llama":
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_vocab_size(config.vocab_size)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _write_rope_freqs(writer: gguf.GGUFWriter, model: PreTrainedModel) -> None:
    """Llama 3's rope scaling, of which GGUF states the effect: the divisor of each frequency."""
    config = model.config
    exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    unscaled = config.rope_parameters["rope_theta"] ** -exponents
    divisors = unscaled / model.model.rotary_emb.inv_freq
    writer.add_tensor("rope_freqs.weight", divisors.numpy())


def _converted(model: PreTrainedModel, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Llama's q and k rows pairwise within each head; GPT-2's Conv1D weights [outputs, inputs]."""
    config = model.config
    if config.model_type == "llama" and (".q_proj." in name or ".k_proj." in name):
        paired = tensor.reshape(-1, 2, config.head_dim // 2, *tensor.shape[1:])
        return paired.swapaxes(1, 2).reshape(tensor.shape).contiguous()
    conv1d = (".c_attn.", ".c_proj.", ".c_fc.")
    if config.model_type == "gpt2" and tensor.ndim == 2 and any(part in name for part in conv1d):
        return tensor.T.contiguous()
    return tensor


def _write_tensor(
    writer: gguf.GGUFWriter, name: str, values: np.ndarray[Any, Any], quantisation: str
) -> None:
    kind = gguf.GGMLQuantizationType[quantisation]
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    if values.ndim == 1 or values.shape[-1] % block:
        kind = gguf.GGMLQuantizationType.F32
    writer.add_tensor(name, quantised_blocks(values, kind.name), raw_dtype=kind)


def quantised_blocks(values: np.ndarray[Any, Any], dtype: str) -> np.ndarray[Any, Any]:
    """[rows, columns] in a GGUF type; in a K-quant, which gguf cannot quantise to, random blocks of
    that shape with scales within 0.1."""
    kind = gguf.GGMLQuantizationType[dtype]
    try:
        return gguf.quants.quantize(values, kind)
    except NotImplementedError:
        rng = np.random.default_rng(5)
        width, nbytes = gguf.GGML_QUANT_SIZES[kind]
        rows, columns = values.shape
        blocks = rng.integers(0, 256, (rows, columns // width, nbytes), np.uint8)
        # The float16 scales: one at the end of a Q6_K block, two at the start of the others.
        scales = blocks[..., -2:] if dtype == "Q6_K" else blocks[..., :4]
        drawn = rng.uniform(-0.1, 0.1, (*scales.shape[:2], scales.shape[2] // 2))
        scales[...] = drawn.astype(np.float16).view(np.uint8)
        return blocks.reshape(rows, -1)
