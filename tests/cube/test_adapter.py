"""An adapter's header: taken from what PEFT writes, refused where it lies."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from memfs.cube import adapter
from memfs.errors import AdapterCorrupt

WHOLE = save({"lora_A": np.ones((2, 3), np.float32)}, metadata={"payload_sha256": "ab"})


def read(path: Path, data: bytes) -> dict[str, str]:
    path.write_bytes(data)
    fd = os.open(path, os.O_RDONLY)
    try:
        return adapter.read_metadata(fd)
    finally:
        os.close(fd)


def with_header(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_the_metadata_of_a_whole_file(tmp_path: Path) -> None:
    assert read(tmp_path / "x", WHOLE) == {"payload_sha256": "ab"}
    assert read(tmp_path / "x", save({"a": np.ones(2, np.float32)})) == {}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        WHOLE[:4],
        WHOLE[:40],
        WHOLE[:-1],
        WHOLE + b"x",
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", adapter.MAX_HEADER + 1) + b" " * 100,
        with_header([]),
        with_header({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}, b"\0" * 8),
        with_header({"a": {"dtype": "??", "shape": [4], "data_offsets": [0, 16]}}, b"\0" * 16),
        with_header({"a": {"dtype": "F32", "shape": [1 << 62], "data_offsets": [0, 4]}}, b"\0" * 4),
        with_header({"__metadata__": {"x": 1}}),
        b"\x80\x04pickle.",
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(AdapterCorrupt):
        read(tmp_path / "x", data)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, len(WHOLE) - 1), byte=st.integers(0, 255))
def test_any_byte_may_be_wrong(tmp_path: Path, at: int, byte: int) -> None:
    try:
        read(tmp_path / "x", WHOLE[:at] + bytes([byte]) + WHOLE[at + 1 :])
    except AdapterCorrupt:
        pass  # refused, or harmless: never another error
