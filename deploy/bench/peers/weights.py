"""The same weights for every engine: GGUF files of one precision each, and a folder for those that
read Hugging Face's layout. Made once from the user's model and kept in a cache folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.bench.peers.llama_cpp import LlamaCpp
from deploy.bench.suite.errors import BenchmarkError
from shards.quantization.choice import Quantization


@dataclass(frozen=True, slots=True)
class Precision:
    """`gguf` is llama.cpp's name for it, `headwise_dtype` and `quantization` are `ClusterConfig`'s,
    `dtype` that of engines which know floating point alone (None: they have no counterpart)."""

    gguf: str
    headwise_dtype: str
    quantization: Quantization
    dtype: str | None = None


PRECISIONS: Mapping[str, Precision] = {
    "float32": Precision("F32", "float32", "none", dtype="float32"),
    "bfloat16": Precision("BF16", "bfloat16", "none", dtype="bfloat16"),
    "float16": Precision("F16", "float16", "none"),
    "int8": Precision("Q8_0", "auto", "int8"),
    "int4": Precision("Q4_0", "auto", "int4"),
}

QWEN_SIZED = "Qwen2.5-0.5B-sized"
# The sizes of Qwen2.5-0.5B's config.json; its weights are random here.
_QWEN_CONFIG: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
}


class Weights:
    """What `model`, a GGUF file or a folder, becomes; files go below `cache`."""

    def __init__(self, model: Path, cache: Path) -> None:
        if not model.exists():
            raise BenchmarkError(f"--model {model}: no such file or folder")
        self.model = model
        self.is_gguf = model.suffix == ".gguf"
        self.name = model.stem if self.is_gguf else model.name
        stat = model.stat()
        mark = f"{model.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
        digest = hashlib.sha256(mark.encode()).hexdigest()[:12]
        self._folder = cache / "models" / f"{self.name}-{digest}"

    def gguf(self, precision: str, llama_cpp: LlamaCpp) -> Path:
        """The model as a GGUF file of that precision, by llama.cpp's own quantiser.

        Every precision is made from float32 values, so that all engines see the same weights.
        """
        if not self.is_gguf:
            raise BenchmarkError(f"--model {self.model}: llama.cpp reads GGUF files alone")
        kind = PRECISIONS[precision].gguf
        path = self._folder / f"{self.name}.{kind}.gguf"
        if not path.exists():
            source = self.model if kind == "F32" else self.gguf("float32", llama_cpp)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            llama_cpp.quantize(source, partial, kind)
            partial.rename(path)
        return path

    def folder(self) -> Path:
        """The model as a folder of safetensors in float32: itself where it is one."""
        if not self.is_gguf:
            return self.model
        path = self._folder / "safetensors"
        if not (path / "config.json").exists():
            from transformers import AutoModelForCausalLM

            loaded = AutoModelForCausalLM.from_pretrained(
                self.model.parent, gguf_file=self.model.name, dtype="float32"
            )
            _save(loaded.config, loaded.state_dict(), path)
        return path


def qwen_sized(cache: Path) -> Path:
    """A folder with random bfloat16 weights of Qwen2.5-0.5B's sizes: 14 heads over 2 KV heads."""
    path = cache / "models" / QWEN_SIZED
    if not (path / "config.json").exists():
        import torch
        from transformers import Qwen2Config, Qwen2ForCausalLM

        torch.manual_seed(0)
        config = Qwen2Config(**_QWEN_CONFIG)
        _save(config, Qwen2ForCausalLM(config).bfloat16().state_dict(), path)
    return path


def _save(config: Any, state: dict[str, Any], path: Path) -> None:
    """`transformers` does not save a model that it has read from GGUF, nor will it save a part of a
    folder: a fresh one takes the weights, and the folder appears when it is whole."""
    from transformers import AutoModelForCausalLM

    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = AutoModelForCausalLM.from_config(config)
    fresh = fresh.to(next(iter(state.values())).dtype)
    fresh.load_state_dict(state)
    partial = path.with_name(f"{path.name}.partial")
    fresh.save_pretrained(partial)
    partial.rename(path)
