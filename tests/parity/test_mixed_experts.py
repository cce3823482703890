"""Experts of one layer in different GGUF types, as quantisers mix them, answer as the dequantised
weights do."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from shards.kernels.base import KernelSet
from shards.kernels.cpu import CpuKernels
from shards.kernels.reference.kernels import ReferenceKernels
from tests.gguf_experts import write_gguf
from tests.models import tiny_model
from tests.ranks import CPU, generate, thread_ranks

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 5,
}
# Every pair of neighbours in a layer differs somewhere; Q5_0 is widened when it is loaded.
TYPES = ("Q4_0", "Q4_1", "Q8_0", "F16", "Q5_0")


def type_of(layer: int, part: str, e: int) -> str:
    if part == "up":
        return TYPES[e // 2]
    return TYPES[(e + layer) % len(TYPES)] if part == "gate" else TYPES[-1 - e]


def in_the_types_of_the_file(model: torch.nn.Module) -> None:
    """Each expert's weights become what its GGUF type keeps of them."""
    for layer, block in enumerate(model.model.layers):
        experts = block.mlp.experts
        for e in range(SIZES["num_local_experts"]):
            gate, up = experts.gate_up_proj.data[e].chunk(2)
            for part, weight in (("gate", gate), ("up", up), ("down", experts.down_proj.data[e])):
                kind = gguf.GGMLQuantizationType[type_of(layer, part, e)]
                encoded = gguf.quants.quantize(weight.contiguous().numpy(), kind)
                weight.copy_(torch.from_numpy(gguf.quants.dequantize(encoded, kind)))


@pytest.mark.parametrize("expert_parallel", [False, True], ids=["cut", "dealt"])
@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize(
    "kernels",
    [CpuKernels(torch.float32, 1), ReferenceKernels(CPU, torch.float32)],
    ids=["cpu", "reference"],
)
def test_equals_the_dequantised_experts(
    kernels: KernelSet[object], world: int, expert_parallel: bool, tmp_path: Path
) -> None:
    model = tiny_model("mixtral", **SIZES)
    path = write_gguf(model, tmp_path / "model.gguf", apart=type_of)
    in_the_types_of_the_file(model)
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    with thread_ranks(
        path, world, expert_parallel=expert_parallel, kernels=kernels, quantization="auto"
    ) as ranks:
        [(tokens, logits)] = generate(ranks, [prompt], 8)
    with torch.inference_mode():
        expected = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].numpy()
    assert np.abs(logits - expected).max() < 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_they_can_be_quantised_anew(quantization: str, tmp_path: Path) -> None:
    """Those that have so many bits already are left as they are, beside the others."""
    path = write_gguf(tiny_model("mixtral", **SIZES), tmp_path / "model.gguf", apart=type_of)
    kernels = CpuKernels(torch.float32, 1, integers=True)
    with thread_ranks(path, 2, kernels=kernels, quantization=quantization) as ranks:
        [(tokens, logits)] = generate(ranks, [[3, 1, 4, 1, 5]], 4)
    assert len(tokens) == 4
    assert np.isfinite(logits).all()
