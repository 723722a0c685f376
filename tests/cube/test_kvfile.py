"""kv.safetensors is read without trust: every field, every byte and every length may lie."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from memfs.cube import kvfile
from memfs.cube.fingerprint import (
    CHECKSUMS,
    FORMAT,
    MODEL_FIELDS,
    STORAGE,
    STORAGES,
    TEXT_FIELDS,
    require_fields,
    require_model,
    require_text,
)
from memfs.errors import KVCorrupt, KVForeign, KVStale
from tests.kvbytes import kv_bytes

LAYERS, HEADS, TOKENS, HEAD_DIM = 2, 2, 5, 4


def fingerprint(storage: str = "exact") -> dict[str, str]:
    fields = {name: f"{name} of a test" for name in (*MODEL_FIELDS, *TEXT_FIELDS)}
    return fields | {
        "format": FORMAT,
        "layers": str(LAYERS),
        "kv_heads": str(HEADS),
        "head_dim": str(HEAD_DIM),
        "token_count": str(TOKENS),
        "token_ids_sha256": hashlib.sha256(tensors()[kvfile.TOKEN_IDS].tobytes()).hexdigest(),
        "base_position": "7",
        "dtype": "float32",
        STORAGE: storage,
    }


def tensors(storage: str = "exact") -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(0)
    layers: dict[str, np.ndarray[Any, Any]] = {}
    for index in range(LAYERS):
        described = kvfile.layer_tensors(index, storage, "F32", HEADS, TOKENS, HEAD_DIM)
        for name, (dtype, shape) in described.items():
            layers[name] = random.standard_normal(shape, np.float32)
            if dtype == "I8":
                layers[name] = random.integers(-127, 128, shape, np.int8)
            elif storage == "int8":
                layers[name] = np.abs(layers[name])
    return layers | {kvfile.TOKEN_IDS: np.arange(TOKENS, dtype=np.int32)}


def written(storage: str = "exact", data: dict[str, np.ndarray[Any, Any]] | None = None) -> bytes:
    """A whole file, with the checksums of its tensors."""
    return kv_bytes(fingerprint(storage), data or tensors(storage))


def check(path: Path, content: bytes) -> kvfile.Header:
    """Everything that is checked of a file without a model."""
    path.write_bytes(content)
    fd = os.open(path, os.O_RDONLY)
    try:
        header = kvfile.read_header(fd)
        kvfile.check_tensors(fd, header)
        return header
    finally:
        os.close(fd)


def edited(edit: Callable[[dict[str, Any]], None], storage: str = "exact") -> bytes:
    """A whole file with its header changed by ``edit``."""
    content = written(storage)
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    edit(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % kvfile.ALIGNMENT)
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


KV_BYTES = {
    "exact": LAYERS * 2 * HEADS * TOKENS * HEAD_DIM * 4,
    "int8": LAYERS * HEADS * (2 * TOKENS * HEAD_DIM + 4 * HEAD_DIM + 4 * TOKENS),
}


@pytest.mark.parametrize("storage", STORAGES)
def test_a_whole_file_is_read_as_safetensors_reads_it(storage: str, tmp_path: Path) -> None:
    path = tmp_path / "kv.safetensors"
    header = check(path, written(storage))
    assert header.tokens == TOKENS
    assert header.storage == storage
    assert header.kv_bytes == KV_BYTES[storage]
    content = path.read_bytes()
    for name, array in load_file(path).items():
        tensor = header.tensors[name]
        assert content[tensor.offset : tensor.offset + tensor.nbytes] == array.tobytes()
        assert tensor.shape == array.shape


@pytest.mark.parametrize("name", [*MODEL_FIELDS, *TEXT_FIELDS, STORAGE, CHECKSUMS])
def test_a_missing_field_is_named(name: str, tmp_path: Path) -> None:
    content = edited(lambda header: header["__metadata__"].pop(name))
    with pytest.raises(KVCorrupt, match=f"no {name}$"):
        check(tmp_path / "kv", content)


@pytest.mark.parametrize("name", MODEL_FIELDS)
def test_a_field_of_another_model_is_named(name: str) -> None:
    require_model(fingerprint(), fingerprint())
    with pytest.raises(KVForeign, match=rf": {name} is "):
        require_model(fingerprint(), fingerprint() | {name: "other"})


def test_a_file_of_another_format_is_told_from_one_that_lacks_a_field(tmp_path: Path) -> None:
    """An earlier format had fewer fields: what is wrong is the format."""

    def change(header: dict[str, Any]) -> None:
        header["__metadata__"]["format"] = "memfs-kv-1"
        del header["__metadata__"][STORAGE]

    with pytest.raises(KVCorrupt, match="format is 'memfs-kv-1', not 'memfs-kv-2'"):
        check(tmp_path / "kv", edited(change))


def test_another_text_is_named() -> None:
    require_text(fingerprint(), "payload_sha256 of a test")
    with pytest.raises(KVStale, match="payload_sha256"):
        require_text(fingerprint(), "0" * 64)
    with pytest.raises(KVCorrupt, match="has no"):
        require_fields({})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("format", "memfs-kv-0"),
        ("layers", "3"),
        ("layers", "-2"),
        ("layers", "٢"),  # a digit, but not one of ours
        ("kv_heads", "1"),
        ("head_dim", "8"),
        ("token_count", "4"),
        ("token_count", "99999999999"),
        ("base_position", "x"),
        ("dtype", "float16"),
        ("dtype", "int8"),
        (STORAGE, "int8"),
        (STORAGE, "int4"),
        (STORAGE, ""),
        (CHECKSUMS, "{"),
        (CHECKSUMS, "{}"),
        (CHECKSUMS, "[]"),
    ],
)
def test_a_field_that_does_not_fit_the_tensors_is_refused(
    name: str, value: str, tmp_path: Path
) -> None:
    with pytest.raises(KVCorrupt):
        check(tmp_path / "kv", edited(lambda header: header["__metadata__"].update({name: value})))


@pytest.mark.parametrize("storage", STORAGES)
def test_every_truncation_is_refused(storage: str, tmp_path: Path) -> None:
    whole = written(storage)
    for length in {*range(0, len(whole), 97), 1, 7, 8, 9, len(whole) - 1}:
        with pytest.raises(KVCorrupt):
            check(tmp_path / "kv", whole[:length])
    with pytest.raises(KVCorrupt, match="tensors end at"):
        check(tmp_path / "kv", whole + b"\0")


@pytest.mark.parametrize("storage", STORAGES)
def test_every_flipped_bit_of_the_tensors_is_seen(storage: str, tmp_path: Path) -> None:
    whole = written(storage)
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    for at in range(start, len(whole), 53):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        with pytest.raises(KVCorrupt, match=r"do not match their checksum|not finite and above 0"):
            check(tmp_path / "kv", bytes(damaged))


@pytest.mark.parametrize("kind", [kvfile.KEY_SCALES, kvfile.VALUE_SCALES])
@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, -1.0])
@pytest.mark.parametrize("at", [0, -1])
def test_a_scale_that_is_none_is_named(kind: str, scale: float, at: int, tmp_path: Path) -> None:
    data, name = tensors("int8"), f"layers.001{kind}"
    check(tmp_path / "kv", written("int8", data))
    data[name].flat[at] = scale
    with pytest.raises(KVCorrupt, match=f"{name} has one that is not finite and above 0"):
        check(tmp_path / "kv", written("int8", data))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(at=st.integers(0), value=st.integers(1, 255), storage=st.sampled_from(STORAGES))
def test_a_damaged_header_never_passes_as_another_one(
    at: int, value: int, storage: str, tmp_path: Path
) -> None:
    """Whatever byte of it changes: a refusal, or another fingerprint of the same tensors."""
    whole = written(storage)
    length = 8 + struct.unpack("<Q", whole[:8])[0]
    damaged = bytearray(whole)
    damaged[at % length] ^= value
    try:
        header = check(tmp_path / "kv", bytes(damaged))
    except KVCorrupt:
        return
    good = check(tmp_path / "whole", whole)
    assert header.tensors == good.tensors
    assert header.fingerprint != good.fingerprint


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda h: h["__metadata__"].update(note="x"), "'note', which is none of its fields"),
        (lambda h: h["__metadata__"].update({"\x1b[2J": "x"}), r"'\\x1b\[2J'"),
        (lambda h: _tensor(h).update(note=1), "'layers.000' has 'note'"),
        (lambda h: h.update({"layers.000": h.pop("layers.000")}), "not written as"),
        (lambda h: h["__metadata__"].update(format=h["__metadata__"].pop("format")), "not written"),
        (lambda h: _tensor(h).update(dtype=_tensor(h).pop("dtype")), "not written as"),
        (lambda h: _respaced(h["__metadata__"]), f"{CHECKSUMS} is not written as"),
    ],
)
def test_a_header_with_more_or_in_another_order_is_refused(
    edit: Callable[[dict[str, Any]], None], named: str, tmp_path: Path
) -> None:
    with pytest.raises(KVCorrupt, match=named):
        check(tmp_path / "kv", edited(edit))


def _respaced(metadata: dict[str, str]) -> None:
    metadata[CHECKSUMS] = json.dumps(json.loads(metadata[CHECKSUMS]), indent=1)


@pytest.mark.parametrize("other", [b"\t", b"\n"])
def test_what_fills_the_header_up_counts_too(other: bytes, tmp_path: Path) -> None:
    whole = edited(lambda header: header["__metadata__"].update(adapter="another"))
    length = 8 + struct.unpack("<Q", whole[:8])[0]
    assert whole[length - 1 : length] == b" "
    check(tmp_path / "kv", whole)
    with pytest.raises(KVCorrupt, match="not written as"):
        check(tmp_path / "kv", whole[: length - 1] + other + whole[length:])


def _tensor(header: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = header["layers.000"]
    return found


@pytest.mark.parametrize(
    "edit",
    [
        lambda h: h.update({"layers.000": 3}),
        lambda h: _tensor(h).update(dtype="F64"),
        lambda h: _tensor(h).update(dtype=["F32"]),
        lambda h: _tensor(h).update(shape=[2, HEADS, TOKENS, -HEAD_DIM]),
        lambda h: _tensor(h).update(shape=[2, HEADS, TOKENS, HEAD_DIM + 0.5]),
        lambda h: _tensor(h).update(shape=[2, HEADS, TOKENS, True]),
        lambda h: _tensor(h).update(shape=[2, HEADS * TOKENS, HEAD_DIM]),
        lambda h: _tensor(h).update(shape=[1 << 47, 1 << 47]),
        lambda h: _tensor(h).update(shape=None),
        lambda h: _tensor(h).update(data_offsets=[0]),
        lambda h: _tensor(h).update(data_offsets=[1 << 40, (1 << 40) + 320]),
        lambda h: _tensor(h).update(data_offsets=h["layers.001"]["data_offsets"]),
        lambda h: h.update({"layers.002": h["layers.001"]}),
        lambda h: h.pop("layers.001"),
        lambda h: h.update({"layers.1": h.pop("layers.001")}),
        lambda h: h.pop("__metadata__"),
        lambda h: h.update(__metadata__=[]),
        lambda h: h["__metadata__"].update(layers=2),
    ],
)
def test_a_lying_header_is_refused(edit: Callable[[dict[str, Any]], None], tmp_path: Path) -> None:
    with pytest.raises(KVCorrupt):
        check(tmp_path / "kv", edited(edit))


def _scales(header: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = header["layers.000.key_scales"]
    return found


@pytest.mark.parametrize(
    "edit",
    [
        lambda h: h["__metadata__"].update(storage="exact"),
        lambda h: h.pop("layers.000.key_scales"),
        lambda h: h.update({"layers.002.key_scales": h.pop("layers.001.key_scales")}),
        lambda h: _scales(h).update(dtype="I32"),
        lambda h: _scales(h).update(dtype="F16"),
        lambda h: _scales(h).update(shape=[HEADS, HEAD_DIM]),
        lambda h: _scales(h).update(shape=[HEADS, HEAD_DIM, 1]),
        lambda h: _scales(h).update(shape=[HEADS, 2, HEAD_DIM]),
        lambda h: _scales(h).update(shape=[1 << 47, 1 << 47]),
        lambda h: _scales(h).update(data_offsets=h["layers.001.key_scales"]["data_offsets"]),
        lambda h: h["layers.000.value_scales"].update(shape=[TOKENS, HEADS]),
        lambda h: _tensor(h).update(dtype="BF16", shape=[HEADS, TOKENS, HEAD_DIM]),
        lambda h: h["__metadata__"].update(token_count="0"),
        lambda h: h["__metadata__"].update(token_count=str(TOKENS + kvfile.KEY_GROUP)),
    ],
)
def test_a_header_that_lies_about_int8_is_refused(
    edit: Callable[[dict[str, Any]], None], tmp_path: Path
) -> None:
    with pytest.raises(KVCorrupt):
        check(tmp_path / "kv", edited(edit, "int8"))


@pytest.mark.parametrize(
    "header",
    [b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"__metadata__": {}, "__metadata__": {}}'],
)
def test_what_is_no_header_is_refused(header: bytes, tmp_path: Path) -> None:
    with pytest.raises(KVCorrupt):
        check(tmp_path / "kv", struct.pack("<Q", len(header)) + header)


def test_a_header_that_says_it_is_huge_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(KVCorrupt, match="at most"):
        check(tmp_path / "kv", struct.pack("<Q", 1 << 60) + b"{}")


def test_token_ids_have_a_digest_too(tmp_path: Path) -> None:
    with pytest.raises(KVCorrupt, match="token_ids_sha256"):
        check(tmp_path / "kv", kv_bytes(fingerprint() | {"token_ids_sha256": "0" * 64}, tensors()))


def test_a_file_cut_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "kv"
    path.write_bytes(written())
    fd = os.open(path, os.O_RDONLY)
    header = kvfile.read_header(fd)
    os.truncate(path, header.data_offset + 10)
    with pytest.raises(KVCorrupt, match="ends within"):
        kvfile.check_tensors(fd, header)
    os.close(fd)
