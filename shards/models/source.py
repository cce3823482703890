"""A model ready to be cut: what it is made of, where its tensors lie, and which tokens end it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.checkpoint.checkpoint import Checkpoint, TensorInfo
from shards.checkpoint.float8 import float8_of, scaled
from shards.checkpoint.locate import CONFIG, Located, locate
from shards.checkpoint.safetensors_index import open_safetensors
from shards.checkpoint.verify import resolve, verify
from shards.errors import CheckpointError, UnsupportedModel
from shards.models.families.rope import llama3_scaling_of
from shards.models.family import Family, GGUFNames, Source
from shards.models.mask import masked
from shards.models.registry import family_of_config, family_of_gguf
from shards.models.spec import ModelSpec

if TYPE_CHECKING:
    from shards.checkpoint.gguf_index import GGUFFile

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_GGUF_EMBEDDING = "token_embd.weight"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Everything a rank needs to load its slice; small, immutable and picklable.

    `name` is the last part of its path, or its hub id; `path` the folder or GGUF file.
    `eos_token_ids` end a generation; empty where the checkpoint names none. The tokenizer is what
    `AutoTokenizer.from_pretrained(tokenizer_path, gguf_file=tokenizer_gguf)` reads: a folder, and
    a file name in it for GGUF; None where there is none.
    """

    name: str
    path: str
    spec: ModelSpec
    sources: Mapping[str, Source]
    checkpoint: Checkpoint
    eos_token_ids: tuple[int, ...] = ()
    tokenizer_path: str | None = None
    tokenizer_gguf: str | None = None


def open_model(model: str, revision: str | None = None) -> ModelSource:
    """Find `model` (folder, GGUF file or hub id), read its headers, and check that its tensors are
    those its config needs. No weights are read.

    Raises `CheckpointError` (not found, corrupt, truncated, wrong tensors) or `UnsupportedModel`.
    """
    located = locate(model, revision, weights=True)
    name = located.path.resolve().name if Path(model).exists() else model
    if located.kind == "gguf":
        return _open_gguf(name, located.path)
    return _open_folder(name, located.path)


def load_spec(model: str, revision: str | None = None) -> ModelSpec:
    """The spec of `model` from its config.json or GGUF header alone; weights need not be there.

    Raises as `open_model` does. Imports neither torch nor transformers.
    """
    located: Located = locate(model, revision, weights=False)
    if located.kind == "gguf":
        return _gguf_spec(located.path)[2]
    config = _json_object(located.path / CONFIG)
    float8_of(config)  # refuses what could not be read
    return masked(family_of_config(config).spec(config), config)


def _open_folder(name: str, folder: Path) -> ModelSource:
    config = _json_object(folder / CONFIG)
    family, float8 = family_of_config(config), float8_of(config)
    checkpoint = open_safetensors(folder)
    if float8 is not None:
        checkpoint = scaled(checkpoint, float8)
    if config.get("dtype") is None and config.get("torch_dtype") is None:
        config["dtype"] = _main_dtype(checkpoint.tensors)
    spec = masked(family.spec(config), config)
    sources = _checked(checkpoint, family, spec, family.sources(spec))
    has_tokenizer = any((folder / file).is_file() for file in _TOKENIZERS)
    return ModelSource(
        name=name,
        path=str(folder),
        spec=spec,
        sources=sources,
        checkpoint=checkpoint,
        eos_token_ids=_known(_folder_eos(folder, config), spec),
        tokenizer_path=str(folder) if has_tokenizer else None,
    )


def _open_gguf(name: str, path: Path) -> ModelSource:
    file, family, spec, names = _gguf_spec(path)
    sources = _checked(file.checkpoint, family, spec, names.sources(spec))
    eos = (file.metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom"))
    return ModelSource(
        name=name,
        path=str(path),
        spec=spec,
        sources=sources,
        checkpoint=file.checkpoint,
        eos_token_ids=_known(tuple(token for token in eos if token is not None), spec),
        tokenizer_path=str(path.parent) if file.has_tokenizer else None,
        tokenizer_gguf=path.name if file.has_tokenizer else None,
    )


def _checked(
    checkpoint: Checkpoint, family: Family, spec: ModelSpec, sources: Mapping[str, Source]
) -> dict[str, Source]:
    resolved = resolve(sources, checkpoint.tensors, family.prefix)
    verify(checkpoint, spec, resolved, family.ignored, family.prefix)
    return resolved


def _json_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds {type(found).__name__}: a JSON object is needed")
    return found


def _folder_eos(folder: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """generation_config.json's, which has a chat model's end-of-turn tokens, else the config's."""
    path = folder / "generation_config.json"
    generation = _json_object(path) if path.is_file() else {}
    stated = generation.get("eos_token_id")
    if stated is None:
        stated = config.get("eos_token_id")
    tokens = stated if isinstance(stated, list) else [] if stated is None else [stated]
    for token in tokens:
        if type(token) is not int or token < 0:
            raise CheckpointError(
                f"{folder}: eos_token_id is {stated!r}: a token id or a list of them is needed"
            )
    return tuple(tokens)


def _known(tokens: Sequence[int], spec: ModelSpec) -> tuple[int, ...]:
    """Without those that the model can never generate: a tokenizer may have more tokens than the
    model has rows, and a config the leftovers of another."""
    return tuple(dict.fromkeys(token for token in tokens if token < spec.vocabulary))


def _gguf_spec(path: Path) -> tuple[GGUFFile, Family, ModelSpec, GGUFNames]:
    # Brings numpy along, which planning from a config.json does without.
    from shards.checkpoint.gguf_index import open_gguf

    file = open_gguf(path)
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise CheckpointError(f"{path}: its metadata has no general.architecture: no model in it")
    experts = bool(file.metadata.get(f"{architecture}.expert_count"))
    family, names = family_of_gguf(architecture, experts=experts)
    tensors = file.checkpoint.tensors
    config = names.config(file.metadata) | _stated_by_tensors(file) | names.shown(tensors)
    if "rope_freqs.weight" in file.checkpoint.tensors:
        divisors = _vector(file, "rope_freqs.weight")
        config["rope_scaling"] = llama3_scaling_of(divisors, config.get("rope_theta", 10_000.0))
    elif "rope_factors_long.weight" in file.checkpoint.tensors:
        config["rope_scaling"] = {
            "rope_type": "longrope",
            "short_factor": _vector(file, "rope_factors_short.weight"),
            "long_factor": _vector(file, "rope_factors_long.weight"),
            "attention_factor": file.metadata.get(f"{architecture}.rope.scaling.attn_factor"),
        }
    return file, family, family.spec(config), names


def _stated_by_tensors(file: GGUFFile) -> dict[str, Any]:
    """The config fields that a GGUF file shows by which tensors it holds, and of what shape."""
    tensors = file.checkpoint.tensors
    if _GGUF_EMBEDDING not in tensors:
        raise CheckpointError(
            f"the GGUF file holds no tensor {_GGUF_EMBEDDING}: it is not a whole language model"
        )
    return {
        "vocab_size": tensors[_GGUF_EMBEDDING].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "use_qk_norm": "blk.0.attn_q_norm.weight" in tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in tensors,
        "dtype": _main_dtype(tensors),
    }


def _vector(file: GGUFFile, name: str) -> Sequence[float]:
    """A tensor that says something about the model: the divisors of its rotary frequencies."""
    info = file.checkpoint.tensors.get(name)
    if info is None:
        raise CheckpointError(f"the GGUF file holds no tensor {name}: convert the model again")
    if info.dtype != "F32" or len(info.shape) != 1:
        raise UnsupportedModel(
            f"tensor {name} is {info.dtype} {list(info.shape)}: a vector of F32 is known"
        )
    try:
        return file.checkpoint.floats(name)
    finally:
        file.checkpoint.close()


def _main_dtype(tensors: Mapping[str, TensorInfo]) -> str:
    """That of the most bytes; float32 where those are quantised, for what they are widened to.
    MXFP4's bytes (U8) and FP8 do not count: beside them a checkpoint is in its own dtype."""
    nbytes: dict[str, int] = {}
    for info in tensors.values():
        if info.dtype != "U8" and info.scales is None:
            nbytes[info.dtype] = nbytes.get(info.dtype, 0) + info.nbytes
    return _DTYPES.get(max(nbytes, key=lambda dtype: nbytes[dtype], default="F32"), "float32")
