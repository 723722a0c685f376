"""Names of sockets and models, and lines."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memfs.config import Config
from memfs.errors import InvalidRequest
from memfs.runtime.protocol import decode, encode, model_key, model_spec, socket_path


def test_one_model_has_one_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to("model")
    monkeypatch.chdir(tmp_path)
    keys = {model_key(Config(model=m)) for m in ("model", "./model", str(tmp_path / "link"))}
    assert len(keys) == 1
    assert model_key(Config(model="model", dtype="float32")) not in keys
    assert model_key(Config(model="model", device="cpu")) not in keys


def test_a_directory_called_default_is_not_the_default_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = model_key(Config())
    (tmp_path / "default").mkdir()
    monkeypatch.chdir(tmp_path)
    assert model_spec(Config()) == "default"
    assert model_key(Config()) == before
    assert model_spec(Config(model="./default")) == str(tmp_path / "default")


@given(st.text(min_size=1).filter(lambda name: "\0" not in name))
def test_any_name_makes_a_socket_path(name: str) -> None:
    path = socket_path(Config(model=f"/nonexistent/{name}"))
    assert len(bytes(path)) < 108, "what a Unix socket's address takes"
    assert path.name.startswith("runtime-")


def test_lines_come_back() -> None:
    message = {"op": "ask", "question": "Où ?\n", "cubes": None}
    line = encode(message)
    assert line.count(b"\n") == 1
    assert decode(line) == message
    with pytest.raises(InvalidRequest):
        decode(b"7\n")
