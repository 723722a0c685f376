"""Digests of model directories: by content and name, kept, and never stale."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from memfs.errors import ModelUnusable
from memfs.runtime.model import model_digest
from memfs.runtime.model.model_digest import file_digest, tokenizer_digest, weights_digest


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory of this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "memfs" / "digests.json"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    for name, data in (("a.safetensors", b"one"), ("b.safetensors", b"two")):
        (directory / name).write_bytes(data)
    (directory / "tokenizer.json").write_bytes(b"{}")
    return directory


@pytest.fixture
def old_files_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as settled at once."""
    monkeypatch.setattr(model_digest, "_SETTLED_NS", -1)


def test_content_and_names_make_the_digest(model: Path) -> None:
    first = weights_digest(model)
    assert first == weights_digest(model)
    (model / "config.json").write_text("{}")
    assert weights_digest(model) == first, "only weights count"
    (model / "a.safetensors").write_bytes(b"onE")
    changed = weights_digest(model)
    assert changed != first
    (model / "b.safetensors").rename(model / "c.safetensors")
    assert weights_digest(model) not in (first, changed)


def test_the_same_weights_elsewhere_have_the_same_digest(model: Path, tmp_path: Path) -> None:
    first = weights_digest(model), tokenizer_digest(model)
    moved = model.rename(tmp_path / "moved")
    assert (weights_digest(moved), tokenizer_digest(moved)) == first


@pytest.mark.usefixtures("old_files_count")
def test_a_kept_digest_is_used_until_the_file_changes(model: Path, cache: Path) -> None:
    path = model / "a.safetensors"
    right = file_digest(path)
    known = json.loads(cache.read_text())
    known[str(path)][-1] = "kept"
    cache.write_text(json.dumps(known))
    assert file_digest(path) == "kept", "the file was not read again"
    before = path.stat()
    path.write_bytes(b"ONE")  # as long as before, and with the same mtime
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file_digest(path) not in ("kept", right)


def test_a_file_changed_just_now_is_not_kept(model: Path, cache: Path) -> None:
    file_digest(model / "a.safetensors")
    assert not cache.exists()


@pytest.mark.usefixtures("old_files_count")
@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b'{"x": 3}', b"\xff\xfe"])
def test_a_damaged_cache_is_replaced(model: Path, cache: Path, damage: bytes) -> None:
    right = weights_digest(model)
    cache.write_bytes(damage)
    assert weights_digest(model) == right
    assert len(json.loads(cache.read_text())) == 2


@pytest.mark.usefixtures("old_files_count")
def test_concurrent_writers_lose_nothing(tmp_path: Path, cache: Path) -> None:
    paths = [tmp_path / f"{i}.bin" for i in range(40)]
    for path in paths:
        path.write_text(path.name)
    with ThreadPoolExecutor(8) as pool:
        digests = list(pool.map(file_digest, paths))
    known = json.loads(cache.read_text())
    assert [known[str(p)][-1] for p in paths] == digests
    assert list(cache.parent.glob(".digests-*")) == []


@pytest.mark.usefixtures("old_files_count")
def test_files_that_are_gone_leave_the_cache(model: Path, cache: Path) -> None:
    weights_digest(model)
    (model / "a.safetensors").unlink()
    file_digest(model / "tokenizer.json")
    assert set(json.loads(cache.read_text())) == {
        str(model / "b.safetensors"),
        str(model / "tokenizer.json"),
    }


def test_nothing_to_digest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelUnusable, match="no weights"):
        weights_digest(tmp_path)
    with pytest.raises(ModelUnusable, match="no tokenizer"):
        tokenizer_digest(tmp_path)
