"""A codec as the files of a tokenizer folder, for gateways that have none of their own."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from typing import Any

from cluster.text import TextCodec
from cluster.text.bare import unpack


def zipped(codec: TextCodec) -> bytes:
    """A ZIP archive of the files that `transformers` would write: tokenizer.json and its config,
    chat templates, end tokens. The same codec gives the same bytes. Takes up to a second."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in _files(codec).items():
            # A ZipInfo made of a name alone is dated 1980.
            entry = zipfile.ZipInfo(name)
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, text)
    return buffer.getvalue()


def _files(codec: TextCodec) -> dict[str, str]:
    tokenizer, end_tokens = unpack(codec.pack())
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **tokenizer.special_tokens_map,
    }
    files = {
        "tokenizer.json": codec.tokenizer_json,
        "tokenizer_config.json": _json(config),
        "generation_config.json": _json({"eos_token_id": list(end_tokens)}),
    }
    template = tokenizer.chat_template or {}
    named = template if isinstance(template, Mapping) else {"default": template}
    for name, text in named.items():
        file = "chat_template" if name == "default" else f"additional_chat_templates/{name}"
        files[f"{file}.jinja"] = text
    return files


def _json(value: object) -> str:
    return json.dumps(value, indent=2, sort_keys=True)
