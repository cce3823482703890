"""A checkpoint that does not fit its config is refused before anything is loaded, with a list."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shards.errors import CheckpointError, UnsupportedModel
from shards.models.source import open_model
from tests.models import save, tiny_model

EDIT = dict[str, torch.Tensor]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tiny_model("llama"), tmp_path)


def tensors(folder: Path) -> EDIT:
    return load_file(folder / "model.safetensors")


def rewrite(folder: Path, held: EDIT) -> None:
    save_file(held, folder / "model.safetensors")


def edit_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_model(str(folder))
    return str(caught.value)


def test_missing(folder: Path) -> None:
    held = tensors(folder)
    del held["model.layers.1.mlp.up_proj.weight"], held["model.norm.weight"]
    rewrite(folder, held)
    text = refusal(folder)
    assert "2 missing: model.layers.1.mlp.up_proj.weight, model.norm.weight" in text
    assert "unused" not in text
    assert "misshapen" not in text


def test_unused(folder: Path) -> None:
    rewrite(folder, tensors(folder) | {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)})
    assert refusal(folder).endswith("1 unused: model.layers.0.self_attn.q_norm.weight")


def test_misshapen_says_what_is_there_and_what_is_needed(folder: Path) -> None:
    edit_config(folder, vocab_size=140)
    assert refusal(folder).endswith(
        "2 misshapen: model.embed_tokens.weight is [131, 72] where the config needs [140, 72], "
        "lm_head.weight is [131, 72] where the config needs [140, 72]"
    )


def test_all_three_at_once_and_long_lists_are_cut(folder: Path) -> None:
    held = tensors(folder)
    del held["model.norm.weight"]
    held["lm_head.weight"] = held["lm_head.weight"][:, :70].contiguous()
    held |= {f"extra.{i}": torch.ones(1) for i in range(13)}
    rewrite(folder, held)
    text = refusal(folder)
    assert "1 missing: model.norm.weight" in text
    assert "1 misshapen: lm_head.weight is [131, 70]" in text
    assert "13 unused: extra.0" in text
    assert text.endswith("and 3 more")


def test_bias_that_the_config_denies(folder: Path) -> None:
    save(tiny_model("llama", attention_bias=True), folder)
    edit_config(folder, attention_bias=False)
    assert "8 unused: model.layers.0.self_attn.k_proj.bias" in refusal(folder)


@pytest.mark.parametrize("family", ["gpt2", "gpt_bigcode"])
def test_fused_tensor_of_the_wrong_height(family: str, tmp_path: Path) -> None:
    save(tiny_model(family), tmp_path)
    held = tensors(tmp_path)
    held["transformer.h.0.attn.c_attn.bias"] = held["transformer.h.0.attn.c_attn.bias"][:-1].clone()
    rewrite(tmp_path, held)
    rows = 3 * 56 if family == "gpt2" else 56 + 2 * 8
    assert f"is [{rows - 1}] where the config needs [{rows}]" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("family", "extra"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("llama", "lm_head.weight"),
        ("gpt2", "transformer.h.0.attn.bias"),
        ("gpt2", "h.1.attn.masked_bias"),
        ("gpt_bigcode", "transformer.h.0.attn.bias"),
    ],
)
def test_what_old_checkpoints_save_beside_weights_is_no_fault(
    family: str, extra: str, tmp_path: Path
) -> None:
    save(tiny_model(family, tie_word_embeddings=True), tmp_path)
    rewrite(tmp_path, tensors(tmp_path) | {extra: torch.ones(4)})
    assert "output.weight" not in open_model(str(tmp_path)).sources


def test_dtype_that_cannot_be_read(folder: Path) -> None:
    held = tensors(folder)
    held["model.norm.weight"] = held["model.norm.weight"].to(torch.float8_e4m3fn)
    rewrite(folder, held)
    with pytest.raises(UnsupportedModel, match=r"model\.norm\.weight is F8_E4M3 .* BF16"):
        open_model(str(folder))


def test_quantised_folder_is_refused_by_its_method(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UnsupportedModel, match=r"quantization_config .* 'gptq'"):
        open_model(str(folder))
