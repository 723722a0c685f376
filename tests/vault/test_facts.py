"""Facts are what the files say; only what changed is read; nothing that a file can be does harm."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from memfs.cube import metadata
from memfs.vault import facts as facts_module
from memfs.vault.facts import CubeFacts, inspect, judge
from memfs.vault.sig import Sig
from memfs.vault.store import Store

MakeKV = Callable[..., bytes]
Model = dict[str, str]


class Cube:
    """A cube in a store, as the tests make and look at it."""

    def __init__(self, store: Store, path: str = "work/law") -> None:
        self.store, self.path = store, path
        self.root = store.root / path
        self.root.mkdir(parents=True)

    def write(self, name: str, data: bytes) -> Path:
        path = self.root / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        return path

    def look(
        self,
        previous: CubeFacts | None = None,
        model: Model | None = None,
        *,
        check_kv: bool = True,
    ) -> CubeFacts:
        found = inspect(self.store, self.path, previous, model, check_kv=check_kv)
        assert found is not None
        return found

    def settled(self, model: Model | None = None) -> CubeFacts:
        """The facts once every file is old enough to be known by its Sig."""
        time.sleep(0.06)
        return self.look(self.look(None, model), model)


@pytest.fixture
def cube(tmp_path: Path) -> Iterator[Cube]:
    with Store.open(tmp_path) as store:
        yield Cube(store)


def test_what_is_no_cube(cube: Cube) -> None:
    store = cube.store
    cube.write("notes.txt", b"x")
    (store.root / "payload.md").write_bytes(b"x")
    (store.root / "link").symlink_to("work")
    for path in ("work/law", "work", "missing", "missing/too", "link", "link/law", ""):
        assert inspect(store, path, None, None) is None
    assert inspect(store, "payload.md", None, None) is None


def test_a_text_alone(cube: Cube) -> None:
    path = cube.write("payload.md", b"text")
    path.chmod(0o640)
    os.utime(path, ns=(0, 1_500_000_000_000_000_000))
    found = cube.settled()
    assert found.payload_state == "ready"
    assert found.payload_bytes == 4
    assert found.payload_sha256 == hashlib.sha256(b"text").hexdigest()
    assert (found.id, found.meta_sig, found.kv_state, found.adapter_state) == (
        None,
        None,
        "none",
        "none",
    )
    assert (found.uid, found.gid, found.mode) == (os.getuid(), os.getgid(), 0o640)
    assert found.changed == 1_500_000_000.0


@pytest.mark.parametrize("name", ["payload.md", "kv.safetensors", "adapter/x", "meta.json"])
def test_each_mark_makes_a_cube(cube: Cube, name: str) -> None:
    cube.write(name, b"")
    assert cube.look() is not None


def test_the_header(cube: Cube) -> None:
    meta = metadata.new(title="Law")
    meta["descriptive"] |= {"tags": ["a", "ü"], "type": "note"}
    meta["governance"]["priority"] = 7
    meta["state"] |= {"lifecycle": "archived", "frozen": True, "pinned": True}
    cube.write("meta.json", metadata.render(meta))
    found = cube.look()
    assert found.id == metadata.cube_id(meta)
    assert (found.title, found.tags, found.type) == ("Law", ("a", "ü"), "note")
    assert found.created == meta["descriptive"]["created"]
    assert (found.priority, found.lifecycle, found.frozen, found.pinned) == (
        7,
        "archived",
        True,
        True,
    )
    least = {"memfs": 1, "descriptive": {"id": found.id}}
    cube.write("meta.json", metadata.render(least))
    found = cube.look(found)
    assert (found.title, found.tags, found.priority, found.frozen) == (None, (), 0, False)


@pytest.mark.parametrize(
    "text", [b"", b"{", b'{"memfs": 2}', b"\xff", b" " * (metadata.MAX_BYTES + 1)]
)
def test_an_invalid_header_is_noted_and_what_was_known_stands(cube: Cube, text: bytes) -> None:
    meta = metadata.new(title="Law")
    cube.write("meta.json", metadata.render(meta))
    before = cube.look()
    cube.write("meta.json", text)
    found = cube.look(before)
    assert found.meta_reason
    assert (found.id, found.title) == (before.id, "Law")
    assert cube.look().id is None
    assert (cube.root / "meta.json").read_bytes() == text
    cube.write("meta.json", metadata.render(meta))
    assert cube.look(found).meta_reason is None


def test_without_its_header_a_cube_keeps_its_id_alone(cube: Cube) -> None:
    meta = metadata.new(title="Law")
    cube.write("payload.md", b"x")
    cube.write("meta.json", metadata.render(meta))
    before = cube.look()
    (cube.root / "meta.json").unlink()
    found = cube.look(before)
    assert (found.id, found.title, found.meta_sig) == (before.id, None, None)


@pytest.mark.parametrize("name", ["payload.md", "kv.safetensors", "meta.json"])
@pytest.mark.parametrize("kind", ["symlink", "fifo", "directory", "dangling"])
def test_what_is_no_regular_file_is_not_read(
    cube: Cube, tmp_path_factory: pytest.TempPathFactory, name: str, kind: str
) -> None:
    place = cube.root / name
    if kind == "symlink":
        outside = tmp_path_factory.mktemp("outside") / name
        outside.write_bytes(metadata.render(metadata.new(title="secret")))
        place.symlink_to(outside)
    elif kind == "fifo":
        os.mkfifo(place)
    elif kind == "directory":
        place.mkdir()
    else:
        place.symlink_to("nowhere")
    found = cube.look()
    assert (found.payload_state, found.payload_sha256, found.title) == ("none", None, None)
    if name == "kv.safetensors":
        assert found.kv_state == "corrupt"
        assert "not a regular file" in (found.kv_reason or "")
    if name == "meta.json":
        assert "not a regular file" in (found.meta_reason or "")
    assert cube.look(found) == found


def test_a_text_too_long_to_be_one_is_not_hashed_whole(
    cube: Cube, make_kv: MakeKV, kv_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facts_module, "MAX_PAYLOAD", 3 << 20)
    os.truncate(cube.write("payload.md", b"x"), 1 << 40)
    cube.write("kv.safetensors", make_kv(b"x"))
    found = cube.look(None, kv_model)
    assert (found.payload_state, found.payload_bytes) == ("ready", 1 << 40)
    assert found.payload_sha256 is None
    assert found.kv_state == "unchecked"


def test_the_states_of_a_kv_cache(cube: Cube, make_kv: MakeKV, kv_model: Model) -> None:
    cube.write("payload.md", b"text")
    cube.write("kv.safetensors", make_kv(b"text"))
    ready = cube.settled(kv_model)
    assert (ready.kv_state, ready.kv_reason, ready.kv_tokens) == ("ready", None, 3)
    assert ready.kv_bytes == (cube.root / "kv.safetensors").stat().st_size
    unchecked = judge(ready, None)
    assert (unchecked.kv_state, unchecked.kv_reason) == ("unchecked", None)
    assert judge(unchecked, kv_model) == ready

    foreign = judge(ready, kv_model | {"weights_sha256": "other"})
    assert foreign.kv_state == "foreign"
    assert "weights_sha256" in (foreign.kv_reason or "")
    assert judge(ready, {"format": "x"}).kv_state == "unchecked"  # from another memfs

    cube.write("payload.md", b"other")
    stale = cube.look(ready, kv_model)
    assert stale.kv_state == "stale"
    assert "payload_sha256" in (stale.kv_reason or "")
    assert judge(stale, None).kv_state == "stale"
    cube.write("payload.md", b"text")
    assert cube.look(stale, kv_model).kv_state == "ready"

    (cube.root / "payload.md").unlink()
    assert cube.look(ready, kv_model).kv_state == "ready"
    (cube.root / "kv.safetensors").unlink()
    cube.write("payload.md", b"text")
    gone = cube.look(ready, kv_model)
    assert (gone.kv_state, gone.kv_bytes, gone.kv_sig, gone.kv_model) == ("none", 0, None, None)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text"])
def test_a_damaged_kv_cache(cube: Cube, make_kv: MakeKV, kv_model: Model, damage: str) -> None:
    whole = make_kv(b"text")
    data = {
        "cut": whole[:-1],
        "flipped": whole[:-1] + bytes([whole[-1] ^ 1]),
        "empty": b"",
        "text": b"hello, world",
    }[damage]
    cube.write("payload.md", b"text")
    cube.write("kv.safetensors", data)
    found = cube.look(None, kv_model)
    assert found.kv_state == "corrupt"
    assert found.kv_reason
    assert judge(found, kv_model) == found
    cube.write("kv.safetensors", whole)
    assert cube.look(found, kv_model).kv_state == "ready"


def test_a_kv_cache_may_be_left_for_later(cube: Cube, make_kv: MakeKV, kv_model: Model) -> None:
    cube.write("payload.md", b"text")
    cube.write("kv.safetensors", make_kv(b"text"))
    later = cube.look(None, kv_model, check_kv=False)
    assert (later.kv_state, later.kv_tokens) == ("unchecked", None)
    assert cube.look(later, kv_model, check_kv=False) == later
    young = cube.look(later, kv_model)
    assert young.kv_state == "ready"
    # Read while it was young, it is read once more; until then it is what it was found to be.
    assert cube.look(young, kv_model, check_kv=False).kv_state == "ready"


def test_the_states_of_an_adapter(cube: Cube) -> None:
    sha = hashlib.sha256(b"text").hexdigest()
    cube.write("payload.md", b"text")
    (cube.root / "adapter").mkdir()
    assert cube.look().adapter_state == "none"
    weights = {"lora_A": np.ones((2, 2), np.float32)}
    cube.write("adapter/adapter_model.safetensors", save(weights, {"payload_sha256": sha}))
    found = cube.settled()
    assert (found.adapter_state, found.adapter_reason) == ("unchecked", None)
    assert found.adapter_payload_sha256 == sha
    cube.write("payload.md", b"other")
    assert cube.look(found).adapter_state == "stale"
    cube.write("adapter/adapter_model.safetensors", b"\x80\x04pickle")
    found = cube.look(found)
    assert found.adapter_state == "corrupt"
    assert found.adapter_reason


def test_a_temporary_file_beside_an_adapter_changes_nothing(cube: Cube) -> None:
    cube.write("payload.md", b"text")
    (cube.root / "adapter").mkdir()
    weights = {"lora_A": np.ones((2, 2), np.float32)}
    cube.write("adapter/adapter_model.safetensors", save(weights))
    os.utime(cube.root / "payload.md", (1e9, 1e9))
    os.utime(cube.root / "adapter/adapter_model.safetensors", (1.5e9, 1.5e9))
    found = cube.settled()
    assert found.changed == 1.5e9
    (cube.root / "adapter/.memfs-tmp-1").touch()
    assert cube.look(found) == found


def test_an_adapter_elsewhere_is_none(cube: Cube, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside")
    (outside / "adapter_model.safetensors").write_bytes(save({"a": np.ones(2, np.float32)}))
    (cube.root / "adapter").symlink_to(outside)
    assert cube.look().adapter_state == "none"
    (cube.root / "adapter").unlink()
    (cube.root / "adapter").mkdir()
    link = cube.root / "adapter" / "adapter_model.safetensors"
    link.symlink_to(outside / "adapter_model.safetensors")
    assert cube.look().adapter_state == "corrupt"


def test_an_unchanged_cube_is_not_read_again(
    cube: Cube, make_kv: MakeKV, kv_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    cube.write("payload.md", b"text")
    cube.write("kv.safetensors", make_kv(b"text"))
    cube.write("meta.json", metadata.render(metadata.new()))
    cube.write("adapter/adapter_model.safetensors", save({"a": np.ones(2, np.float32)}))
    known = cube.settled(kv_model)

    def opened(*args: object, **kwargs: object) -> int:
        raise AssertionError(f"{args} was opened")

    with monkeypatch.context() as patch:
        patch.setattr(facts_module, "open_regular_at", opened)
        assert cube.look(known, kv_model) == known
    for name in ("payload.md", "kv.safetensors", "meta.json", "adapter/adapter_model.safetensors"):
        os.utime(cube.root / name, ns=(0, 10**18))
        assert cube.look(known, kv_model) != known


def test_a_change_in_the_tick_of_the_look_is_seen_at_the_next(cube: Cube) -> None:
    """Same inode, size and, where the clock is slow, times: only a second look can tell."""
    path = cube.write("payload.md", b"one")
    for new in (b"two", b"one", b"six") * 50:
        known = cube.look()
        with open(path, "r+b") as file:
            file.write(new)
        assert cube.look(known).payload_sha256 == hashlib.sha256(new).hexdigest()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to become another user")
def test_what_may_not_be_read_is_no_error(cube: Cube, make_kv: MakeKV, kv_model: Model) -> None:
    for name in ("payload.md", "kv.safetensors", "meta.json"):
        cube.write(name, make_kv(b"text")).chmod(0)
    cube.store.root.chmod(0o755)
    os.seteuid(65534)
    try:
        found = cube.look(None, kv_model)
    finally:
        os.seteuid(0)
    assert (found.payload_state, found.payload_sha256) == ("ready", None)
    assert (found.kv_state, found.kv_reason) == ("unchecked", "Permission denied")
    assert found.meta_reason == "Permission denied"
    # Rights leave no trace in a Sig that was never read by: it is tried again.
    assert cube.look(found, kv_model).payload_sha256 is not None
    for mode in (0o700, 0o744):
        cube.root.chmod(mode)
        os.seteuid(65534)
        try:
            assert inspect(cube.store, cube.path, found, kv_model) is None
        finally:
            os.seteuid(0)


sigs = st.none() | st.builds(Sig, *[st.integers(0, 2**63 - 1)] * 4)
texts = st.none() | st.text(st.characters(), max_size=20)


@given(
    st.builds(
        CubeFacts,
        id=texts,
        title=texts,
        tags=st.lists(st.text(st.characters()), max_size=3).map(tuple),
        frozen=st.booleans(),
        mode=st.integers(0, 0o7777),
        payload_sig=sigs,
        kv_sig=sigs,
        kv_tokens=st.none() | st.integers(0),
        kv_model=st.none() | st.dictionaries(st.text(), st.text()),
        changed=st.floats(allow_nan=False, allow_infinity=False),
    )
)
def test_facts_are_the_same_after_json(facts: CubeFacts) -> None:
    assert CubeFacts.from_json(facts.to_json()) == facts


def test_every_field_is_documented_by_its_group() -> None:
    assert CubeFacts().to_json() == {}
    assert all(field.default is not dataclasses.MISSING for field in dataclasses.fields(CubeFacts))
