"""Every rank loads its own slice: put together, the slices are the Hugging Face weights."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from shards.checkpoint.loader import load_shard
from shards.errors import CheckpointError
from shards.layout import make_layout
from shards.models.parameters import parameters
from shards.models.source import ModelSource, open_model
from tests.models import save, tiny_model, write_gguf, write_metadata

CPU = torch.device("cpu")
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-9-3": ("llama", {}),
    "llama-7-1-tied-biased": (
        "llama",
        {
            "num_attention_heads": 7,
            "num_key_value_heads": 1,
            "head_dim": 6,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2-14-2": ("qwen2", {}),
    "gpt2-7": ("gpt2", {}),
    "gpt2-5-untied": ("gpt2", {"n_head": 5, "tie_word_embeddings": False}),
    "bigcode-7-1": ("gpt_bigcode", {}),
    "bigcode-5-5": ("gpt_bigcode", {"n_head": 5, "multi_query": False}),
}
LLAMA_MODULES = {
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn.gate": "mlp.gate_proj",
    "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
}
GPT_MODULES = {
    "attention_norm": "ln_1",
    "attention.out": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn.up": "mlp.c_fc",
    "ffn.down": "mlp.c_proj",
}


def expected(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """headwise's parameters taken from the live model as its own forward pass takes them."""
    weights = {}
    llama_like = model.config.model_type in ("llama", "qwen2")
    body = model.get_decoder() if llama_like else model.transformer
    layers, modules = (body.layers, LLAMA_MODULES) if llama_like else (body.h, GPT_MODULES)
    named = {"embedding": body.get_input_embeddings()}
    named["norm"] = body.norm if llama_like else body.ln_f
    if not llama_like:
        named["positions"] = body.wpe
    if not model.config.tie_word_embeddings:
        named["output"] = model.lm_head
    for i, layer in enumerate(layers):
        named |= {f"layers.{i}.{ours}": layer.get_submodule(hf) for ours, hf in modules.items()}
        if not llama_like:
            for suffix, tensor in _fused(model.config, layer.attn.c_attn).items():
                weights[f"layers.{i}.attention.{suffix}"] = tensor
    for name, module in named.items():
        for suffix, tensor in module.named_parameters():
            is_conv1d = type(module).__name__ == "Conv1D" and tensor.ndim == 2
            weights[f"{name}.{suffix}"] = (tensor.T if is_conv1d else tensor).detach()
    return weights


def _fused(config: Any, c_attn: torch.nn.Module) -> dict[str, torch.Tensor]:
    """q, k and v apart, by the splits in transformers' GPT-2 and GPT-BigCode attention."""
    width, head_dim = config.n_embd, config.n_embd // config.n_head
    parts = {}
    for suffix, tensor in c_attn.named_parameters():
        rows = tensor.detach()
        if config.model_type == "gpt2":
            split = (rows.T if rows.ndim == 2 else rows).split(width)
        elif config.multi_query:
            split = rows.split([width, head_dim, head_dim])
        else:
            by_head = rows.unflatten(0, (config.n_head, 3, head_dim))
            split = tuple(by_head[:, nth].flatten(0, 1) for nth in range(3))
        parts |= {f"{part}.{suffix}": t for part, t in zip("qkv", split, strict=True)}
    return parts


@pytest.fixture(scope="module", params=CASES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    family, overrides = CASES[request.param]
    model = tiny_model(family, **overrides)
    return model, save(model, tmp_path_factory.mktemp(request.param))


def load(source: ModelSource, world: int, rank: int, **options: Any) -> dict[str, torch.Tensor]:
    options = {"dtype": torch.float32, "device": CPU, **options}
    return load_shard(source, make_layout(source.spec, world), rank, **options)


def assembled(source: ModelSource, world: int) -> dict[str, torch.Tensor]:
    """All ranks' slices put where the layout says they belong; NaN where nobody had anything."""
    layout = make_layout(source.spec, world)
    whole = {p.name: torch.full(p.shape, torch.nan) for p in parameters(source.spec)}
    for rank in range(world):
        shard = load(source, world, rank)
        assert shard.keys() == whole.keys()
        for p in parameters(source.spec):
            owned = layout.owned(p, rank)
            assert shard[p.name].is_contiguous()
            whole[p.name].narrow(p.axis, owned.start, len(owned)).copy_(shard[p.name])
    return whole


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_slices_put_together_are_the_weights(saved: Any, world: int) -> None:
    model, folder = saved
    weights = expected(model)
    whole = assembled(open_model(str(folder)), world)
    assert whole.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(whole[name], tensor), name


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_gguf_gives_the_same_slices_as_safetensors(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    whole = assembled(open_model(str(write_gguf(model, tmp_path / "model.gguf"))), 3)
    for name, tensor in expected(model).items():
        assert torch.equal(whole[name], tensor), name


def test_llama_biases_in_gguf_are_permuted_with_their_rows(tmp_path: Path) -> None:
    model = tiny_model("llama", attention_bias=True, mlp_bias=True)
    whole = assembled(open_model(str(write_gguf(model, tmp_path / "model.gguf"))), 2)
    for name, tensor in expected(model).items():
        assert torch.equal(whole[name], tensor), name


def test_checkpoint_in_several_files(tmp_path: Path) -> None:
    model = tiny_model("llama")
    save(model, tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    whole = assembled(open_model(str(tmp_path)), 2)
    for name, tensor in expected(model).items():
        assert torch.equal(whole[name], tensor), name


@pytest.mark.parametrize("family", ["gpt2", "gpt_bigcode", "llama"])
def test_checkpoint_of_the_bare_body(family: str, tmp_path: Path) -> None:
    """GPT-2's own checkpoint has no "transformer." before its names."""
    model = tiny_model(family, tie_word_embeddings=True)
    save(model, tmp_path)
    path = tmp_path / "model.safetensors"
    prefix = "model." if family == "llama" else "transformer."
    save_file({name.removeprefix(prefix): t for name, t in load_file(path).items()}, path)
    whole = assembled(open_model(str(tmp_path)), 2)
    for name, tensor in expected(model).items():
        assert torch.equal(whole[name], tensor), name


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float16, torch.bfloat16, torch.float32])
def test_converts_from_the_stored_dtype(
    stored: torch.dtype, wanted: torch.dtype, tmp_path: Path
) -> None:
    model = tiny_model("llama").to(stored)
    source = open_model(str(save(model, tmp_path)))
    assert source.spec.dtype == str(stored).removeprefix("torch.")
    weights = load(source, 1, 0, dtype=wanted)
    for name, tensor in expected(model).items():
        assert torch.equal(weights[name], tensor.to(wanted)), name


def test_float16_overflow_names_the_tensor_and_the_remedy(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = 70000.0
    source = open_model(str(save(model, tmp_path)))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj.* holds 70000.*--dtype"):
        load(source, 1, 0, dtype=torch.float16)
    assert load(source, 1, 0, dtype=torch.bfloat16)


def test_progress_ends_at_the_bytes_of_the_slice(saved: Any) -> None:
    source = open_model(str(saved[1]))
    seen: list[tuple[int, int]] = []
    weights = load(source, 2, 1, on_bytes=lambda done, total: seen.append((done, total)))
    nbytes = sum(t.numel() * t.element_size() for t in weights.values())
    assert seen[-1] == (nbytes, nbytes)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_source_is_small_to_pickle_even_after_reading(saved: Any) -> None:
    source = open_model(str(saved[1]))
    before = load(source, 2, 0)
    copied = pickle.loads(pickle.dumps(source))
    assert len(pickle.dumps(source)) < 20_000
    assert copied.spec == source.spec
    assert all(torch.equal(t, before[name]) for name, t in load(copied, 2, 0).items())


def test_file_changed_between_header_and_load(tmp_path: Path) -> None:
    source = open_model(str(save(tiny_model("llama"), tmp_path)))
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="was changed meanwhile"):
        load(source, 1, 0)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        load(source, 1, 0)


# Loads rank 1 of 4; prints by how much its peak RSS exceeds the RSS before, and the slice's bytes.
MEASURE = """
import sys, torch
from pathlib import Path
from shards.checkpoint.loader import load_shard
from shards.layout import make_layout
from shards.models.source import open_model

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

source = open_model(sys.argv[1])
layout = make_layout(source.spec, 4)
before = status("VmRSS")
weights = load_shard(
    source, layout, 1, torch.float32, torch.device("cpu"), quantization=sys.argv[2]
)
print(status("VmHWM") - before, sum(t.nbytes for t in weights.values()))
"""


@pytest.fixture(scope="module")
def large_model() -> PreTrainedModel:
    """285 million parameters, 1.1 GB in float32, of which none is ever allocated."""
    with torch.device("meta"):
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=16384,
                hidden_size=2048,
                intermediate_size=8192,
                num_hidden_layers=4,
                num_attention_heads=8,
                num_key_value_heads=4,
                tie_word_embeddings=True,
            )
        )


@pytest.mark.parametrize(
    ("form", "quantization", "bits"),
    [
        ("safetensors", "none", 32),
        ("gguf", "none", 32),
        ("gguf", "auto", 5),
        ("safetensors", "int8", 8.5),
        ("safetensors", "int4", 4.5),
    ],
)
def test_peak_memory_is_that_of_the_slice(
    form: str, quantization: str, bits: float, large_model: PreTrainedModel, tmp_path: Path
) -> None:
    """A quarter of the model is 1/4 of 1.1 GB; whole tensors, or mapped pages kept, would show."""
    write = sparse_safetensors if form == "safetensors" else sparse_gguf
    write(large_model, tmp_path)
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path, quantization],
        check=True,
        capture_output=True,
        text=True,
    )
    peak, weights = (int(n) for n in measured.stdout.split())
    assert weights > 70e6 * bits / 8
    assert peak < 1.05 * weights + 200e6


def sparse_safetensors(model: PreTrainedModel, folder: Path) -> None:
    """A checkpoint of zeros that takes no room on the disk."""
    model.config.save_pretrained(folder)
    header, at = {}, 0
    for name, parameter in model.named_parameters():
        stop = at + 4 * parameter.numel()
        header[name] = {"dtype": "F32", "shape": [*parameter.shape], "data_offsets": [at, stop]}
        at = stop
    encoded = json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded)
    os.truncate(path, 8 + len(encoded) + at)


def sparse_gguf(model: PreTrainedModel, folder: Path) -> None:
    """The same in Q4_K, which no writer here can quantise to."""
    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    write_metadata(writer, model)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    total = 0
    for name, parameter in model.named_parameters():
        kind = gguf.GGMLQuantizationType["Q4_K" if parameter.ndim == 2 else "F32"]
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        nbytes = parameter.numel() // block * block_bytes
        stored = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor_info(stored, parameter.shape, np.float32, nbytes, kind)
        total += -(-nbytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(path, -(-path.stat().st_size // 32) * 32 + total)
