"""A KV cache that does not fit exactly is refused, by name of what differs."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memfs.cube import kvfile
from memfs.cube.fingerprint import CHECKSUMS, MODEL_FIELDS, STORAGE, STORAGES, TEXT_FIELDS
from memfs.errors import KVCorrupt, KVForeign, KVStale, Refused
from memfs.runtime.client import RuntimeClient
from memfs.runtime.kv import kv_store
from memfs.runtime.kv.encoding import prefill
from memfs.runtime.model.resident import Resident
from tests.waiting import until

from .conftest import Shop, ask, how, prose, run_all

SHA = "a" * 64


@pytest.fixture(scope="module")
def resident(tiny_model_dir: Path, load_model: Callable[[Path], Resident]) -> Resident:
    return load_model(tiny_model_dir)


@pytest.fixture(scope="module", params=STORAGES)
def good(
    resident: Resident,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> bytes:
    """A whole and fitting file, in each way of storing it."""
    path = tmp_path_factory.mktemp("good") / "kv.safetensors"
    made = run_all(prefill(resident, prose(60), None))
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    kv_store.write(fd, made.cache, resident, made.ids, SHA, request.param)
    os.close(fd)
    return path.read_bytes()


def read(resident: Resident, path: Path, data: bytes) -> None:
    path.write_bytes(data)
    fd = os.open(path, os.O_RDONLY)
    try:
        kv_store.read(fd, resident, SHA)
    finally:
        os.close(fd)


def with_header(data: bytes, change: Callable[[dict], None]) -> bytes:
    """The file with its header changed, its tensors as they were."""
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % kvfile.ALIGNMENT)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def test_the_good_file_is_read(resident: Resident, good: bytes, tmp_path: Path) -> None:
    read(resident, tmp_path / "kv", good)


@pytest.mark.parametrize("field", [*MODEL_FIELDS, *TEXT_FIELDS, STORAGE, CHECKSUMS])
@pytest.mark.parametrize("how_changed", ["other", "empty", "missing"])
def test_every_field_is_checked(
    resident: Resident, good: bytes, tmp_path: Path, field: str, how_changed: str
) -> None:
    def change(header: dict) -> None:
        metadata = header["__metadata__"]
        if how_changed == "missing":
            del metadata[field]
        elif how_changed == "empty":
            metadata[field] = ""
        else:
            metadata[field] = "1" + metadata[field][1:] if metadata[field][0] != "1" else "2"

    with pytest.raises(Refused, match=field):
        read(resident, tmp_path / "kv", with_header(good, change))


def test_another_models_file_is_foreign(
    resident: Resident,
    tiny_qwen_dir: Path,
    load_model: Callable[[Path], Resident],
    good: bytes,
    tmp_path: Path,
) -> None:
    with pytest.raises(KVForeign, match="weights_sha256"):
        read(load_model(tiny_qwen_dir), tmp_path / "kv", good)


def test_a_kv_cache_made_under_an_adapter_is_used_under_that_adapter_alone(
    resident: Resident, tmp_path: Path
) -> None:
    made = run_all(prefill(resident, prose(60), None))
    adapters = ["base", "a" * 64, "b" * 64]
    under = {
        a: replace(resident, fingerprint=resident.fingerprint | {"adapter": a}) for a in adapters
    }
    for maker in adapters:
        fd = os.open(tmp_path / maker, os.O_RDWR | os.O_CREAT)
        kv_store.write(fd, made.cache, under[maker], made.ids, SHA)
        for reader in adapters:
            if reader == maker:
                assert kv_store.read(fd, under[reader], SHA)[1] == made.ids
                continue
            with pytest.raises(
                KVForeign, match=f"adapter is {maker[:4]}.* in the file, {reader[:4]}"
            ):
                kv_store.read(fd, under[reader], SHA)
        os.close(fd)


def test_another_texts_file_is_stale(resident: Resident, good: bytes, tmp_path: Path) -> None:
    (tmp_path / "kv").write_bytes(good)
    fd = os.open(tmp_path / "kv", os.O_RDONLY)
    with pytest.raises(KVStale, match="payload_sha256"):
        kv_store.read(fd, resident, "b" * 64)
    os.close(fd)


def test_every_tensor_is_checked(resident: Resident, good: bytes, tmp_path: Path) -> None:
    (length,) = struct.unpack("<Q", good[:8])
    header = json.loads(good[8 : 8 + length])
    del header["__metadata__"]
    for name, entry in header.items():
        for at in (entry["data_offsets"][0], entry["data_offsets"][1] - 1):
            damaged = bytearray(good)
            damaged[8 + length + at] ^= 0x10
            with pytest.raises(KVCorrupt, match=f"{name} "):
                read(resident, tmp_path / "kv", bytes(damaged))


HOSTILE = {
    "gap": lambda h: h["layers.001"].update(data_offsets=[0, 8]),
    "negative": lambda h: h["layers.000"].update(data_offsets=[-8, 0]),
    "huge": lambda h: h["layers.000"].update(shape=[2, 2, 1 << 60, 16]),
    "float shape": lambda h: h["layers.000"].update(shape=[2, 2, 1.5, 16]),
    "true shape": lambda h: h["layers.000"].update(shape=[True, 2, 2, 16]),
    "dtype": lambda h: h["layers.000"].update(dtype="I64"),
    "unhashable dtype": lambda h: h["layers.000"].update(dtype=["F32"]),
    "transposed": lambda h: h["layers.000"].update(shape=h["layers.000"]["shape"][::-1]),
    "no layer": lambda h: h.pop("layers.001"),
    "one more": lambda h: h.update(extra={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}),
    "not an object": lambda h: h.update({"layers.000": 7}),
    "no metadata": lambda h: h.pop("__metadata__"),
    "metadata of numbers": lambda h: h["__metadata__"].update(layers=2),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_lying_header_is_refused(
    resident: Resident, good: bytes, tmp_path: Path, name: str
) -> None:
    with pytest.raises(KVCorrupt):
        read(resident, tmp_path / "kv", with_header(good, HOSTILE[name]))


def test_more_tokens_than_the_model_takes_are_refused_unread(
    resident: Resident, good: bytes, tmp_path: Path
) -> None:
    """A file that says so consistently, and is mostly a hole: gigabytes that cost nothing."""
    tokens, shape = 4_000_000, resident.shape
    header = kvfile.read_header(_open(tmp_path / "good", good))
    sums = dict.fromkeys(header.tensors, "0" * 16)
    sizes = (header.storage, "F32", shape.kv_heads, tokens, shape.head_dim)
    shapes: kvfile.Shapes = {}
    for index in range(shape.layers):
        shapes |= kvfile.layer_tensors(index, *sizes)
    shapes[kvfile.TOKEN_IDS] = ("I32", (tokens,))
    nbytes = sum(
        math.prod(extents) * kvfile.ITEM_BYTES[dtype] for dtype, extents in shapes.values()
    )
    fields = header.fingerprint | {
        "token_count": str(tokens),
        CHECKSUMS: kvfile.checksums_text(sums),
    }
    start = kvfile.header_bytes(fields, shapes)
    fd = _open(tmp_path / "holes", start)
    os.truncate(tmp_path / "holes", len(start) + nbytes)
    with pytest.raises(KVCorrupt, match="token_count is 4000000; the model takes 8192"):
        kv_store.read(fd, resident, SHA)


def _open(path: Path, data: bytes) -> int:
    path.write_bytes(data)
    return os.open(path, os.O_RDONLY)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 7,
        struct.pack("<Q", 100 << 20) + b"{}",
        struct.pack("<Q", 1 << 63),
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 6) + b"{}",
        struct.pack("<Q", 3) + b"\xff\xfe\xfd",
        struct.pack("<Q", 200000) + b"[" * 200000,
    ],
    ids=["empty", "short", "100 MB", "2^63", "list", "cut", "not UTF-8", "deep"],
)
def test_what_is_no_safetensors_file_is_refused(
    resident: Resident, tmp_path: Path, data: bytes
) -> None:
    with pytest.raises(KVCorrupt):
        read(resident, tmp_path / "kv", data)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_is_refused(
    resident: Resident, good: bytes, tmp_path: Path, data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(good) - 1))
    damaged = bytearray(good)
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "zero"]))
    if kind == "flip":
        damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del damaged[at:]
    elif kind == "insert":
        damaged.insert(at, data.draw(st.integers(0, 255)))
    else:
        damaged[at : at + 64] = bytes(len(damaged[at : at + 64]))
    if bytes(damaged) == good:
        return
    with pytest.raises(Refused):
        read(resident, tmp_path / "kv", bytes(damaged))


# Through the daemon: the refusal names the field, and a question has it made again from the text.


def put(kv: Path, data: bytes) -> None:
    """Another file in its place."""
    new = kv.with_name("new")
    new.write_bytes(data)
    new.replace(kv)


def refused(client: RuntimeClient, shop: Shop, path: str, name: str) -> str:
    """The answer that there is all the same, when the file has been made again."""
    cube, bad = shop.named(path), shop.digest(path)
    with pytest.raises(Refused, match=name):
        client.call("mount", **cube)
    assert shop.digest(path) == bad
    report = ask(client, [cube])
    assert how(report) == ["kv"]
    assert report["cubes"][0]["chose"]["way"] == "made again"
    assert name in report["cubes"][0]["chose"]["why"]
    assert any(name in line["reason"] for line in client.call("status")["refusals"])
    until(lambda: shop.digest(path) != bad)
    return str(report["answer"])


def test_the_daemon_makes_it_again_from_the_text(runtime: RuntimeClient, shop: Shop) -> None:
    cube = shop.cube("a", prose(80))
    expected = ask(runtime, [cube])["answer"]
    runtime.call("encode", **cube)
    assert how(ask(runtime, [cube])) == ["kv"]
    good = shop.kv("a").read_bytes()
    (length,) = struct.unpack("<Q", good[:8])

    for field in (*MODEL_FIELDS, STORAGE, "payload_sha256", "token_ids_sha256"):
        changed = with_header(good, lambda h, f=field: h["__metadata__"].update({f: "9"}))
        put(shop.kv("a"), changed)
        assert refused(runtime, shop, "a", field) == expected
        assert shop.kv("a").read_bytes() == good
    flipped = bytearray(good)
    flipped[8 + length + 5000] ^= 1
    put(shop.kv("a"), bytes(flipped))
    assert refused(runtime, shop, "a", "layers.000") == expected
    put(shop.kv("a"), good[:-100])
    assert refused(runtime, shop, "a", "bytes long") == expected
    assert shop.kv("a").read_bytes() == good


def test_files_swapped_between_cubes_are_refused(runtime: RuntimeClient, shop: Shop) -> None:
    one, other = shop.cube("a", prose(50, 1)), shop.cube("b", prose(50, 2))
    for cube in (one, other):
        runtime.call("encode", **cube)
        runtime.call("mount", **cube)
    first, second = shop.kv("a"), shop.kv("b")
    first.rename(first.with_name("x"))
    second.rename(first)
    first.with_name("x").rename(second)
    for path in "ab":
        refused(runtime, shop, path, "payload_sha256")
