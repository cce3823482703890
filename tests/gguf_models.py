"""GGUF files of tiny models of the dense families after Llama, as llama.cpp's converter writes
them: its keys, its names, and what it does to the tensors. Llama, Qwen2 and GPT-2: `tests.models`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import PreTrainedModel

_ARCHITECTURES = {"cohere": "command-r", "gemma3_text": "gemma3", "glm": "chatglm"}
_HEAD_DIM_STATED = ("qwen3", "gemma2", "gemma3_text", "glm", "glm4")


def write_dense_gguf(model: PreTrainedModel, path: Path) -> Path:
    """`model` in float32, without tokenizer."""
    kind = model.config.model_type
    architecture = _ARCHITECTURES.get(kind, kind)
    writer = gguf.GGUFWriter(path, architecture)
    _write_sizes(writer, model.config)
    _write_rope(writer, model.config)
    _write_extras(writer, model.config)
    names = gguf.get_tensor_name_map(
        {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[architecture],
        model.config.num_hidden_layers,
    )
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(stored, _converted(model.config, name, tensor).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_sizes(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if config.model_type in ("cohere", "cohere2"):
        writer.add_layer_norm_eps(config.layer_norm_eps)
    elif config.model_type == "starcoder2":
        writer.add_layer_norm_eps(config.norm_epsilon)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.model_type in _HEAD_DIM_STATED:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)


def _write_rope(writer: gguf.GGUFWriter, config: Any) -> None:
    rope = config.rope_parameters
    if config.model_type == "gemma3_text":
        rope = rope["full_attention"]
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if config.model_type in ("phi3", "glm", "glm4", "granite", "cohere2"):
        even = config.hidden_size // config.num_attention_heads
        whole = config.head_dim if config.model_type in _HEAD_DIM_STATED else even
        writer.add_rope_dimension_count(int(whole * rope.get("partial_rotary_factor", 1.0)))
    if config.model_type == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    if rope["rope_type"] == "longrope":
        writer.add_rope_scaling_attn_factors(rope["attention_factor"])
        for length in ("long", "short"):
            factors = torch.tensor(rope[f"{length}_factor"]).numpy()
            writer.add_tensor(f"rope_factors_{length}.weight", factors)


def _write_extras(writer: gguf.GGUFWriter, config: Any) -> None:
    if config.model_type in ("gemma2", "gemma3_text", "cohere2"):
        writer.add_sliding_window(config.sliding_window)
    if config.model_type == "phi3":
        writer.add_sliding_window(config.sliding_window or 0)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if config.model_type in ("cohere", "cohere2"):
        writer.add_logit_scale(config.logit_scale)
    if config.model_type == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)


def _converted(config: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Gemma's norms with the 1 that they lack; Granite's q and k rows pairwise, as Llama's are."""
    if config.model_type.startswith("gemma") and name.endswith("norm.weight"):
        return tensor + 1
    if config.model_type == "granite" and (".q_proj." in name or ".k_proj." in name):
        head_dim = config.hidden_size // config.num_attention_heads
        paired = tensor.reshape(-1, 2, head_dim // 2, *tensor.shape[1:])
        return paired.swapaxes(1, 2).reshape(tensor.shape).contiguous()
    return tensor
