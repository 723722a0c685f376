"""A whole and valid ``kv.safetensors`` for a text, by a model that is nowhere."""

from __future__ import annotations

import hashlib
import json
import struct

import xxhash

from memfs.cube.fingerprint import FORMAT, MODEL_FIELDS

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
        "xxh3": json.dumps(
            {
                "token_ids": xxhash.xxh3_64(ids).hexdigest(),
                "layers.000": xxhash.xxh3_64(layer).hexdigest(),
            }
        ),
    }
    header = {
        "__metadata__": metadata,
        "token_ids": {"dtype": "I32", "shape": [tokens], "data_offsets": [0, len(ids)]},
        "layers.000": {
            "dtype": "F32",
            "shape": [2, 1, tokens, 4],
            "data_offsets": [len(ids), len(ids) + len(layer)],
        },
    }
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw + ids + layer
