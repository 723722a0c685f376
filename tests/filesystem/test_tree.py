"""The tree beside a plain directory, and what it adds to one; no FUSE."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from memfs.cube import layout
from memfs.errors import InvalidMetadata
from memfs.filesystem.syscalls import UTIME_OMIT
from memfs.vault.rename import RENAME_EXCHANGE, RENAME_NOREPLACE

from .conftest import Forest, number_of, until


def meta(forest: Forest, cube: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(forest.read(f"{cube}/meta.json"))
    return loaded


def path_of(forest: Forest, cube_id: str) -> str | None:
    """Where the index has a cube."""
    found = forest.catalogue.keeper.ask(lambda index: index.by_id(cube_id), None)
    return found[0] if found else None


def cube(forest: Forest, name: str = "law", text: bytes = b"Text.\n") -> str:
    forest.tree.names.mkdir(name, 0o755)
    forest.write(f"{name}/payload.md", text)
    return name


NAMES = st.sampled_from(["a", "b", "c", "a/a", "a/b", "b/a", "a/a/b"])


class BesideADirectory(RuleBasedStateMachine):
    """The same operations on a tree and on a plain directory end the same, in the same state."""

    def __init__(self) -> None:
        super().__init__()
        self.tmp = Path(os.environ["TREE_TEST_DIR"])
        self.count = len(list(self.tmp.iterdir()))
        self.plain = self.tmp / f"{self.count}-plain"
        self.plain.mkdir()
        root = self.tmp / f"{self.count}-store"
        root.mkdir()
        self.forest = Forest(root, indexed=False)

    def teardown(self) -> None:
        self.forest.close()

    def same(self, ours: Any, theirs: Any) -> None:
        found, wanted = number_of(ours), number_of(theirs)
        # The kernel walks through symlinks by itself, and asks for what they lead to. Of two names
        # that are both wrong, either may be told of.
        assert found in (wanted, "ELOOP") or {found, wanted} == {"ENOENT", "ENOTDIR"}

    @rule(name=NAMES)
    def mkdir(self, name: str) -> None:
        names = self.forest.tree.names
        self.same(lambda: names.mkdir(name, 0o755), lambda: os.mkdir(self.plain / name))

    @rule(name=NAMES, data=st.binary(max_size=20))
    def write(self, name: str, data: bytes) -> None:
        if (self.plain / name).is_dir() or (self.plain / name).is_symlink():
            return  # the kernel asks for neither
        self.same(
            lambda: self.forest.write(name, data), lambda: (self.plain / name).write_bytes(data)
        )

    @rule(name=NAMES)
    def unlink(self, name: str) -> None:
        names = self.forest.tree.names
        self.same(lambda: names.unlink(name), lambda: os.unlink(self.plain / name))

    @rule(name=NAMES)
    def rmdir(self, name: str) -> None:
        names = self.forest.tree.names
        self.same(lambda: names.rmdir(name), lambda: os.rmdir(self.plain / name))

    @rule(old=NAMES, new=NAMES)
    def rename(self, old: str, new: str) -> None:
        names = self.forest.tree.names
        self.same(
            lambda: names.rename(old, new, 0),
            lambda: os.rename(self.plain / old, self.plain / new),
        )

    @rule(old=NAMES, new=NAMES)
    def link(self, old: str, new: str) -> None:
        names = self.forest.tree.names
        self.same(
            lambda: names.link(old, new),
            lambda: os.link(self.plain / old, self.plain / new, follow_symlinks=False),
        )

    @rule(name=NAMES)
    def symlink(self, name: str) -> None:
        names = self.forest.tree.names
        self.same(
            lambda: names.symlink(name, "target"), lambda: os.symlink("target", self.plain / name)
        )

    @rule(name=NAMES, length=st.integers(0, 30))
    def truncate(self, name: str, length: int) -> None:
        if (self.plain / name).is_symlink():
            return
        tree = self.forest.tree
        self.same(
            lambda: tree.truncate(name, length), lambda: os.truncate(self.plain / name, length)
        )

    @rule(name=NAMES, mode=st.integers(0, 0o7777))
    def chmod(self, name: str, mode: int) -> None:
        if (self.plain / name).is_symlink():
            return
        tree = self.forest.tree
        self.same(
            lambda: tree.chmod(name, mode | 0o700),
            lambda: os.chmod(self.plain / name, mode | 0o700),
        )

    @invariant()
    def they_are_the_same(self) -> None:
        for directory, subs, files in os.walk(self.plain):
            path = os.path.relpath(directory, self.plain).removeprefix(".")
            assert self.forest.names(path) == sorted([*subs, *files])
            for name in (*subs, *files):
                theirs = os.lstat(os.path.join(directory, name))
                ours = self.forest.tree.status(layout.join(path, name))
                assert ours.st_mode == theirs.st_mode
                if not stat.S_ISDIR(theirs.st_mode):
                    assert (ours.st_size, ours.st_nlink) == (theirs.st_size, theirs.st_nlink)
                if stat.S_ISREG(theirs.st_mode):
                    with open(os.path.join(directory, name), "rb") as file:
                        assert self.forest.read(layout.join(path, name)) == file.read()


def test_beside_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREE_TEST_DIR", str(tmp_path))
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        BesideADirectory,
        settings=settings(
            max_examples=40,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )


def test_who_is_told_of_what(forest: Forest) -> None:
    cube(forest)
    assert "law" in forest.changed
    forest.changed.clear()
    forest.write("law/notes", b"not a memory")
    forest.tree.names.mkdir("law/pictures", 0o755)
    forest.tree.utimens("law/payload.md", (0, UTIME_OMIT), (5, 0))
    assert forest.changed == []
    forest.write("law/payload.md", b"other")
    assert forest.changed == ["law"]
    forest.tree.names.unlink("law/payload.md")
    assert forest.changed == ["law", "law"]


def test_memfs_own_names_are_nobody_elses(forest: Forest) -> None:
    cube(forest)
    (forest.root / "law/.memfs-tmp-x").touch()
    assert forest.names("law") == ["meta.json", "payload.md"]
    assert forest.names("") == ["law"]
    tree = forest.tree
    for path in ("law/.memfs-tmp-x", "law/.memfs-tmp-new"):
        assert number_of(tree.status, path) == "ENOENT"
        assert number_of(tree.opening.create, path, 0o644, 0) == "EPERM"
        assert number_of(tree.names.rename, "law/payload.md", path, 0) == "EPERM"
        assert number_of(tree.chmod, path, 0o777) == "ENOENT"
    for verb in (tree.names.unlink, tree.names.rmdir):
        assert number_of(verb, ".memfs") == "EPERM"
        assert number_of(verb, ".memfs/status") == "EPERM"
    assert number_of(tree.names.mkdir, ".memfs", 0o755) == "EPERM"
    assert number_of(tree.truncate, ".memfs/status", 0) == "EPERM"
    assert number_of(tree.setxattr, ".memfs/status", "user.a", b"", 0) == "EPERM"
    assert number_of(tree.getxattr, ".memfs/status", "user.a") == "ENODATA"
    tree.names.mkdir("law/.memfs", 0o755)  # at the root alone it is memfs's own
    assert ".memfs" in forest.names("law")


def test_a_file_unlinked_while_open(forest: Forest) -> None:
    cube(forest)
    number, handle = forest.opened("law/payload.md", os.O_RDWR)
    hidden = forest.hide("law/payload.md", 1)
    assert forest.names("law") == ["meta.json"]
    assert forest.tree.status(hidden).st_nlink == 0
    assert handle.write(memoryview(bytearray(b"T")), 0) == 1
    forest.tree.chmod(hidden, 0o600)
    forest.closed(number)
    forest.tree.names.unlink(hidden)
    assert number_of(forest.tree.status, hidden) == "ENOENT"
    assert os.listdir(forest.root / ".memfs/unlinked") == []


def test_a_refused_header_puts_the_hidden_one_back(forest: Forest) -> None:
    cube(forest)
    before = forest.read("law/meta.json")
    number, _ = forest.opened("law/meta.json")
    forest.write("law/new", b"{ bad")
    forest.tree.status("law/meta.json")
    hidden = forest.hide("law/meta.json", 1)
    with pytest.raises(InvalidMetadata):
        forest.tree.names.rename("law/new", "law/meta.json", 0)
    assert forest.read("law/meta.json") == before
    assert forest.read("law/new") == b"{ bad"
    forest.closed(number)
    assert number_of(forest.tree.names.unlink, hidden) == "ENOENT"
    assert forest.read("law/meta.json") == before


def test_a_text_that_was_taken_aside_comes_back(forest: Forest) -> None:
    """Where it cannot be known that the caller renames, it is taken from its name first."""
    cube(forest)
    number, handle = forest.opened("law/payload.md", os.O_RDWR)
    hidden = forest.hide("law/payload.md", 1)
    assert "payload.md" not in forest.names("law")
    assert number_of(forest.tree.names.rename, "law/gone", "law/payload.md", 0) == "ENOENT"
    assert forest.names("law") == ["meta.json", "payload.md"]
    assert handle.write(memoryview(bytearray(b"Back")), 0) == 4
    forest.closed(number)
    assert number_of(forest.tree.names.unlink, hidden) == "ENOENT"
    assert forest.read("law/payload.md").startswith(b"Back")
    assert os.listdir(forest.root / ".memfs/unlinked") == []


@pytest.mark.parametrize("there", [False, True])
def test_what_is_written_beside_a_taken_place_comes_back(forest: Forest, there: bool) -> None:
    cube(forest)
    if there:
        forest.write("law/kv.safetensors", b"before")
    number, handle = (
        forest.opened("law/kv.safetensors", os.O_WRONLY)
        if there
        else (forest.created("law/kv.safetensors"))
    )
    handle.write(memoryview(bytearray(b"behind")), 0)
    hidden = forest.hide("law/kv.safetensors", 1)
    assert number_of(forest.tree.names.rename, "law/gone", "law/kv.safetensors", 0) == "ENOENT"
    assert forest.read("law/kv.safetensors") == b"behind"
    if there:
        assert (forest.root / "law/kv.safetensors").read_bytes() == b"before"
    handle.write(memoryview(bytearray(b"!")), 6)
    forest.closed(number)
    assert number_of(forest.tree.names.unlink, hidden) == "ENOENT"
    assert (forest.root / "law/kv.safetensors").read_bytes() == b"behind!"
    assert os.listdir(forest.root / ".memfs/unlinked") == []


def test_what_is_written_beside_its_place_is_replaced(forest: Forest) -> None:
    cube(forest)
    forest.write("law/kv.safetensors", b"before")
    forest.write("law/new", b"new")
    number, handle = forest.opened("law/kv.safetensors", os.O_WRONLY)
    handle.write(memoryview(bytearray(b"lost")), 0)
    hidden = forest.hide("law/kv.safetensors", 1)
    forest.tree.names.rename("law/new", "law/kv.safetensors", 0)
    assert os.listdir(forest.root / ".memfs/unlinked") == [hidden.rpartition("/")[2]]
    forest.closed(number)
    assert forest.read("law/kv.safetensors") == b"new"
    assert os.listdir(forest.root / ".memfs/unlinked") == []
    assert sorted(os.listdir(forest.root / "law")) == ["kv.safetensors", "meta.json", "payload.md"]


def test_a_header_that_was_deleted_does_not_come_back(forest: Forest) -> None:
    cube(forest)
    number, _ = forest.opened("law/meta.json")
    forest.tree.status("law/meta.json")
    hidden = forest.hide("law/meta.json", 1)  # rm, by somebody who reads it
    forest.write("law/new", b"{ bad")
    assert number_of(forest.tree.status, "law/meta.json") == "ENOENT"
    with pytest.raises(InvalidMetadata):
        forest.tree.names.rename("law/new", "law/meta.json", 0)
    assert "meta.json" not in forest.names("law")
    forest.closed(number)
    forest.tree.names.unlink(hidden)


def test_exchanging_two_cubes(forest: Forest) -> None:
    for name in ("one", "two"):
        cube(forest, name, name.encode())
    ids = [meta(forest, name)["descriptive"]["id"] for name in ("one", "two")]
    forest.tree.names.rename("one", "two", RENAME_EXCHANGE)
    assert forest.read("one/payload.md") == b"two"
    assert [meta(forest, name)["descriptive"]["id"] for name in ("two", "one")] == ids
    until(lambda: path_of(forest, ids[0]) == "two")
    with pytest.raises(FileExistsError):
        forest.tree.names.rename("one", "two", RENAME_NOREPLACE)


def test_exchanging_a_header_for_what_is_none(forest: Forest) -> None:
    cube(forest)
    before = forest.read("law/meta.json")
    forest.write("law/new", b"[]")
    with pytest.raises(InvalidMetadata):
        forest.tree.names.rename("law/new", "law/meta.json", RENAME_EXCHANGE)
    assert forest.read("law/meta.json") == before


def test_a_header_of_another_version_of_itself(forest: Forest) -> None:
    """Renamed into place it is rendered anew: the live parts are left out, unknown ones kept."""
    cube(forest)
    header = meta(forest, "law") | {"mine": [1, 2]}
    forest.write("law/new", json.dumps(header).encode())
    forest.tree.utimens("law/new", (7, 0), (8, 9))
    forest.tree.names.rename("law/new", "law/meta.json", 0)
    assert meta(forest, "law")["mine"] == [1, 2]
    stored = json.loads((forest.root / "law/meta.json").read_text())
    assert "payload" not in stored["state"]
    assert (forest.root / "law/meta.json").stat().st_mtime_ns == 8_000_000_009


def test_before_there_is_an_index_everything_works(tmp_path: Path) -> None:
    root = tmp_path / "store"
    root.mkdir()
    forest = Forest(root)
    forest.catalogue.keeper.index = None
    try:
        cube(forest)
        header = meta(forest, "law")
        assert header["behavioural"]["reads"] == 0
        header["descriptive"]["tags"] = ["x"]
        forest.write("law/meta.json", json.dumps(header).encode())
        assert meta(forest, "law")["descriptive"]["tags"] == ["x"]
        forest.tree.names.rename("law", "moved", 0)
        wanted = header["descriptive"]["id"]
        assert forest.tree.getxattr("moved", "user.memfs.id").decode() == wanted
        until(lambda: forest.catalogue.cubes() == 1)
        until(lambda: path_of(forest, wanted) == "moved")
    finally:
        forest.close()


def test_two_who_open_at_once_share_what_they_write(forest: Forest) -> None:
    """The second one comes before the first is among the open files."""
    cube(forest)
    for path in ("law/kv.safetensors", "law/meta.json"):
        forest.write("law/kv.safetensors", b"before")
        first = forest.tree.opening.open(path, os.O_RDWR)
        second = forest.tree.opening.open(path, os.O_RDWR)
        assert second is first
        numbers = [forest.added(handle)[0] for handle in (first, second)]
        forest.closed(numbers[0])
        forest.closed(numbers[1])
        number, third = forest.opened(path, os.O_RDWR)
        assert third is not first
        forest.closed(number)


def test_a_freeze_while_a_file_is_opened_reaches_it(forest: Forest) -> None:
    cube(forest)
    forest.write("law/notes", b"notes")
    names = ("law/payload.md", "law/notes")
    opening = [forest.tree.opening.open(name, os.O_RDWR) for name in names]
    header = meta(forest, "law")
    header["state"]["frozen"] = True
    forest.write("law/meta.json", json.dumps(header).encode())
    for handle in opening:
        number, _ = forest.added(handle)
        assert number_of(handle.write, memoryview(bytearray(b"x")), 0) == "EPERM"
        forest.closed(number)
    assert (forest.root / "law/notes").read_bytes() == b"notes"


def test_usage_is_counted_and_shown(forest: Forest) -> None:
    cube(forest)
    forest.catalogue.count("law", reads=2)
    forest.catalogue.count("law", questions=1)
    shown = meta(forest, "law")["behavioural"]
    assert (shown["reads"], shown["questions"]) == (2, 1)
    assert forest.tree.getxattr("law", "user.memfs.questions") == b"1"
    assert forest.tree.getxattr("law", "user.memfs.last_used").decode() == shown["last_used"]
    assert number_of(forest.tree.getxattr, "law", "user.memfs.nonsense") == "ENODATA"


def test_errors_have_numbers(forest: Forest) -> None:
    cube(forest)
    with pytest.raises(InvalidMetadata) as raised:
        forest.write("law/meta.json", b"{}")
    assert raised.value.errno == errno.EINVAL
    assert forest.read("law/meta.json.rejected") == b"{}"
    assert number_of(forest.tree.handles.get, 12345) == "EBADF"
    number, handle = forest.opened("law/meta.json")
    assert number_of(handle.write, memoryview(b""), 0) == "EBADF"
    forest.closed(number)
