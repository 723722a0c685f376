"""The fingerprint of a KV cache: every fact that must agree before it may be used.

It is kept as strings in the metadata of ``kv.safetensors``. The model's part (``MODEL_FIELDS``) is
made by the runtime from the live model; the text's part (``TEXT_FIELDS``) from the payload; how
they are stored is the cube's choice; the checksums are the tensors'. Comparing is here, without
torch, so that the filesystem can say ``foreign`` or ``stale`` with no model loaded. Pure functions,
any thread.
"""

from __future__ import annotations

from collections.abc import Mapping

from memfs.errors import KVCorrupt, KVForeign, KVStale

FORMAT = "memfs-kv-2"

MODEL_FIELDS = (
    "format",  # FORMAT
    "weights_sha256",  # of the model's weight files: content, not name
    "architecture",  # class of the model, as its config names it
    "layers",
    "kv_heads",
    "head_dim",
    "layer_types",  # JSON list, one attention kind a layer
    "sliding_window",  # rows a sliding layer sees, or "none"
    "rope",  # JSON of the rotary parameters
    "inv_freq_sha256",  # of the inverse frequencies the model really uses, float32
    "dtype",  # of the stored keys and values
    "quantization",  # of the weights, or "none"
    "tokenizer_sha256",
    "chat_template_sha256",
    "preamble_sha256",  # of the token ids in front of every memory, int32
    "base_position",  # position of the cube's first row = rows of the preamble
    "prefill_chunk",  # rows computed at once: part of what the floats depend on
    "adapter",  # digest of the adapter it was made under, or "base"
)

TEXT_FIELDS = (
    "token_count",
    "token_ids_sha256",  # of the ids, int32
    "payload_sha256",  # of payload.md, byte for byte
)

STORAGE = "storage"
"""Metadata key of how keys and values are stored: one of STORAGES. It is neither the model's nor
the text's: a cube's header chooses it, and a file of either kind serves."""

STORAGES = ("exact", "int8")
"""As the model made them, in its dtype; or as 8-bit integers and scales."""

CHECKSUMS = "xxh3"
"""Metadata key of the checksums: JSON object, tensor name to xxh3-64 in hex."""


FIELDS = (*MODEL_FIELDS, *TEXT_FIELDS, STORAGE, CHECKSUMS)
"""All fields, in the order in which they stand in a file."""


def require_fields(found: Mapping[str, str]) -> None:
    """Raises KVCorrupt naming the first field that is missing, or that is none; or the format."""
    for name in FIELDS:
        if name not in found:
            raise KVCorrupt(f"its fingerprint has no {name}")
        if name == "format" and found[name] != FORMAT:  # before what another format may not have
            raise KVCorrupt(f"format is {found[name][:40]!a}, not {FORMAT!r}")
    if more := found.keys() - set(FIELDS):
        raise KVCorrupt(f"its fingerprint has {min(more)[:40]!a}, which is none of its fields")


def is_complete(model: Mapping[str, str]) -> bool:
    """Whether a model's part is of this format: one remembered from an older memfs may not be."""
    return model.get("format") == FORMAT and model.keys() >= set(MODEL_FIELDS)


def require_model(found: Mapping[str, str], model: Mapping[str, str]) -> None:
    """Raises KVForeign naming the first field of the model's part that differs.

    Args:
        found: metadata of the file, its fields all there.
        model: the resident model's part of the fingerprint.
    """
    for name in MODEL_FIELDS:
        if found[name] != model[name]:
            raise KVForeign(
                f"{name} is {_short(found[name])} in the file, {_short(model[name])} in the model"
            )


def require_text(found: Mapping[str, str], payload_sha256: str) -> None:
    """Raises KVStale where the file was made from another payload than this one."""
    if found["payload_sha256"] != payload_sha256:
        raise KVStale(
            f"payload_sha256 is {_short(found['payload_sha256'])} in the file, "
            f"{_short(payload_sha256)} in the text"
        )


def _short(value: str) -> str:
    """A field's value as an error shows it."""
    shown = value if len(value) <= 40 else value[:12] + "…"
    return shown if shown.isprintable() else ascii(shown)
