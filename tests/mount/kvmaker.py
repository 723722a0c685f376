"""A whole and valid ``kv.safetensors`` for a text, by a model that is nowhere."""

from __future__ import annotations

import hashlib
import json

import xxhash

from memfs.cube.fingerprint import FORMAT, MODEL_FIELDS, STORAGE
from memfs.cube.kvfile import header_bytes

MODEL = dict.fromkeys(MODEL_FIELDS, "0") | {
    "format": FORMAT,
    "layers": "1",
    "kv_heads": "1",
    "head_dim": "4",
    "dtype": "float32",
    "adapter": "base",
}


def kv_file(text: bytes, tokens: int = 8, model: dict[str, str] | None = None) -> bytes:
    """The file's bytes."""
    ids, layer = bytes(4 * tokens), bytes(range(256)) * (tokens * 32 // 256)
    layer = layer.ljust(tokens * 32, b"\x01")
    metadata = (model or MODEL) | {
        "token_count": str(tokens),
        "token_ids_sha256": hashlib.sha256(ids).hexdigest(),
        "payload_sha256": hashlib.sha256(text).hexdigest(),
        STORAGE: "exact",
        "xxh3": json.dumps(
            {
                "layers.000": xxhash.xxh3_64(layer).hexdigest(),
                "token_ids": xxhash.xxh3_64(ids).hexdigest(),
            }
        ),
    }
    shapes = {"layers.000": ("F32", [2, 1, tokens, 4]), "token_ids": ("I32", [tokens])}
    return header_bytes(metadata, shapes) + layer + ids
