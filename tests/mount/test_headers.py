"""meta.json through a mount: made, shown live, edited, refused."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import subprocess
import uuid
from pathlib import Path
from typing import Any

import pytest

from tests.users import open_way

from .conftest import Mount, memfs, needs_root, until
from .kvmaker import kv_file
from .test_posix import as_user


def rewritten(file: Path, **descriptive: Any) -> None:
    """Edits a header as an editor does that writes in place."""
    meta = json.loads(file.read_text())
    meta["descriptive"] |= descriptive
    file.write_text(json.dumps(meta))


def test_a_new_text_has_a_header_when_the_close_returns(mount: Mount) -> None:
    cube = mount.cube("law", "Text.\n")
    assert sorted(os.listdir(cube)) == ["meta.json", "payload.md"]
    meta = mount.meta("law")
    assert meta["descriptive"]["title"] == "law"
    digest = hashlib.sha256(b"Text.\n").hexdigest()
    assert meta["state"]["payload"] == {"state": "ready", "bytes": 6, "sha256": digest}
    assert meta["state"]["kv"]["state"] == "none"
    assert json.loads((mount.store / "law/meta.json").read_text())["memfs"] == 1


def test_its_size_is_what_is_read(mount: Mount) -> None:
    cube = mount.cube("law")
    for _ in range(3):
        file = cube / "meta.json"
        size = file.stat().st_size
        with file.open("rb") as opened:
            assert os.fstat(opened.fileno()).st_size == size
            assert len(opened.read()) == size
        (cube / "payload.md").write_text("longer than before " * size)


def test_an_open_header_stays_what_it_was(mount: Mount) -> None:
    cube = mount.cube("law")
    with (cube / "meta.json").open() as opened:
        before = opened.read()
        (cube / "payload.md").write_text("other")
        opened.seek(0)
        assert opened.read() == before
    assert (cube / "meta.json").read_text() != before


def test_the_owner_and_mode_shown_are_the_files(mount: Mount) -> None:
    cube = mount.cube("law")
    (cube / "payload.md").chmod(0o640)
    assert mount.meta("law")["governance"]["mode"] == "640"


def test_an_edit_is_taken(mount: Mount) -> None:
    cube = mount.cube("law")
    rewritten(cube / "meta.json", tags=["a", "b"], extra={"kept": [1, None]})
    meta = mount.meta("law")
    assert meta["descriptive"]["tags"] == ["a", "b"]
    assert meta["descriptive"]["extra"] == {"kept": [1, None]}
    assert os.getxattr(cube, "user.memfs.id").decode() == meta["descriptive"]["id"]


def test_an_edit_by_rename_is_taken(mount: Mount) -> None:
    cube = mount.cube("law")
    shutil.copy(cube / "meta.json", cube / ".meta.swp")
    rewritten(cube / ".meta.swp", title="Renamed")
    os.rename(cube / ".meta.swp", cube / "meta.json")
    assert mount.meta("law")["descriptive"]["title"] == "Renamed"
    assert sorted(os.listdir(cube)) == ["meta.json", "payload.md"]


def test_live_parts_are_not_taken_from_an_edit(mount: Mount) -> None:
    cube = mount.cube("law")
    meta = mount.meta("law")
    meta["behavioural"]["reads"] = 1000
    meta["state"]["kv"] = {"state": "ready", "tokens": 5}
    meta["state"]["pinned"] = True
    (cube / "meta.json").write_text(json.dumps(meta))
    shown = mount.meta("law")
    assert shown["behavioural"]["reads"] == 0
    assert shown["state"]["kv"]["state"] == "none"
    assert shown["state"]["pinned"] is True
    assert "kv" not in json.loads((mount.store / "law/meta.json").read_text())["state"]


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"memfs": 1}', '{"memfs": 2, "descriptive": {"id": "x"}}', "\udcff"]
)
def test_a_bad_edit_fails_the_close(mount: Mount, text: str) -> None:
    cube = mount.cube("law")
    before = (cube / "meta.json").read_text()
    file = (cube / "meta.json").open("w", errors="surrogateescape")
    file.write(text)
    with pytest.raises(OSError, match="Invalid argument"):
        file.close()
    assert (cube / "meta.json").read_text() == before
    rejected = cube / "meta.json.rejected"
    assert rejected.read_bytes() == text.encode(errors="surrogateescape")


def test_a_bad_header_cannot_be_renamed_into_place(mount: Mount) -> None:
    cube = mount.cube("law")
    before = (cube / "meta.json").read_text()
    (cube / "new").write_text("{ bad")
    for watched in (False, True):
        with (cube / "meta.json").open() as opened:
            if not watched:
                opened.close()
            with pytest.raises(OSError, match="Invalid") as raised:
                os.rename(cube / "new", cube / "meta.json")
            assert raised.value.errno == errno.EINVAL
        assert (cube / "meta.json").read_text() == before
        assert (cube / "meta.json.rejected").read_text() == "{ bad"
        assert (cube / "new").read_text() == "{ bad"


def test_a_header_cannot_be_cut_or_grow_without_end(mount: Mount) -> None:
    cube = mount.cube("law")
    before = (cube / "meta.json").read_text()
    with pytest.raises(OSError, match="Invalid"):
        os.truncate(cube / "meta.json", 10)
    with pytest.raises(OSError, match="too large"):
        os.truncate(cube / "meta.json", 2 << 20)
    assert (cube / "meta.json").read_text() == before


def test_opening_to_write_and_changing_nothing_changes_nothing(mount: Mount) -> None:
    cube = mount.cube("law")
    before = (mount.store / "law/meta.json").stat()
    os.close(os.open(cube / "meta.json", os.O_RDWR))
    with (cube / "meta.json").open("r+") as opened:
        text = opened.read()
        opened.seek(0)
        opened.write(text)
    assert (mount.store / "law/meta.json").stat().st_ino == before.st_ino
    os.utime(cube / "meta.json", (5, 5))
    assert (cube / "meta.json").stat().st_mtime == 5


def test_a_change_of_mode_is_carried_out(mount: Mount) -> None:
    cube = mount.cube("law")
    meta = mount.meta("law")
    meta["governance"]["mode"] = "600"
    (cube / "meta.json").write_text(json.dumps(meta))
    assert stat.S_IMODE((cube / "payload.md").stat().st_mode) == 0o600
    assert mount.meta("law")["governance"]["mode"] == "600"


@needs_root
def test_a_change_of_owner_is_carried_out_for_root(mount: Mount) -> None:
    cube = mount.cube("law")
    meta = mount.meta("law")
    meta["governance"] |= {"owner": "1234", "group": "nogroup"}
    (cube / "meta.json").write_text(json.dumps(meta))
    assert (cube / "payload.md").stat().st_uid == 1234
    assert mount.meta("law")["governance"]["group"] == "nogroup"
    meta["governance"]["owner"] = "nobody-of-this-name"
    with pytest.raises(OSError, match="Invalid"):
        (cube / "meta.json").write_text(json.dumps(meta))


@needs_root
def test_nobody_gives_files_away_through_a_header(mount: Mount) -> None:
    cube = mount.cube("law")
    for path in (cube, *cube.iterdir()):
        path.chmod(0o777)
    open_way(mount.dir.parent)
    code = """
        import json, sys
        meta = json.load(open(sys.argv[1]))
        meta["governance"][sys.argv[2]] = sys.argv[3]
        with open(sys.argv[1], "w") as file:
            file.write(json.dumps(meta))
    """
    for name, value in (("owner", "1234"), ("mode", "777"), ("mode", "600")):
        done = as_user(1234, 1234, code, cube / "meta.json", name, value)
        unchanged = value == "777"
        assert ("PermissionError" in done.stderr) != unchanged, done.stderr
    assert (cube / "payload.md").stat().st_uid == 0
    assert stat.S_IMODE((cube / "payload.md").stat().st_mode) == 0o777


def test_deleting_a_cube_leaves_nothing(mount: Mount) -> None:
    mount.cube("law")
    shutil.rmtree(mount.dir / "law")
    assert os.listdir(mount.dir) == []
    until(lambda: mount.status()["index"]["cubes"] == 0)
    assert not (mount.store / "law").exists()


def test_a_header_made_invalid_beside_the_mount_is_shown_valid(mount: Mount) -> None:
    mount.cube("law")
    wanted = mount.meta("law")["descriptive"]["id"]
    (mount.store / "law/meta.json").write_text("{ broken")
    assert mount.meta("law")["descriptive"]["id"] == wanted


def test_renaming_a_cube_keeps_its_id_and_usage(mount: Mount) -> None:
    mount.cube("law")
    wanted = mount.meta("law")["descriptive"]["id"]
    (mount.dir / "work").mkdir()
    os.rename(mount.dir / "law", mount.dir / "work/law")
    assert mount.meta("work/law")["descriptive"]["id"] == wanted
    os.rename(mount.dir / "work", mount.dir / "play")
    assert mount.meta("play/law")["descriptive"]["id"] == wanted
    assert mount.status()["index"]["cubes"] == 1


def test_states_follow_the_files_at_once(mount: Mount) -> None:
    cube = mount.cube("law", "Text.\n")
    (cube / "kv.safetensors").write_bytes(kv_file(b"Text.\n"))
    kv = mount.meta("law")["state"]["kv"]
    assert (kv["state"], kv["tokens"]) == ("unchecked", 8)  # no model was ever known here
    (cube / "payload.md").write_text("Other.\n")
    kv = mount.meta("law")["state"]["kv"]
    assert kv["state"] == "stale"
    assert kv["reason"].startswith("payload_sha256")
    (cube / "payload.md").write_text("Text.\n")
    assert mount.meta("law")["state"]["kv"]["state"] == "unchecked"
    with (cube / "payload.md").open("a") as opened:
        opened.write("more")
        opened.flush()
        os.fsync(opened.fileno())
        assert mount.meta("law")["state"]["kv"]["state"] == "stale"
    (cube / "new").write_text("Text.\n")
    os.rename(cube / "new", cube / "payload.md")
    assert mount.meta("law")["state"]["kv"]["state"] == "unchecked"
    os.truncate(cube / "payload.md", 2)
    assert mount.meta("law")["state"]["kv"]["state"] == "stale"


def test_extended_attributes_tell_of_a_cube(mount: Mount) -> None:
    cube = mount.cube("law", "Text.\n")
    (cube / "kv.safetensors").write_bytes(kv_file(b"Text.\n"))
    meta = mount.meta("law")
    for path in (cube, cube / "payload.md", cube / "meta.json", cube / "kv.safetensors"):
        assert sorted(os.listxattr(path)) == [
            "user.memfs.id",
            "user.memfs.kv",
            "user.memfs.payload_sha256",
            "user.memfs.title",
            "user.memfs.tokens",
        ]
        assert os.getxattr(path, "user.memfs.id").decode() == meta["descriptive"]["id"]
        assert os.getxattr(path, "user.memfs.reads") == b"0"
        assert os.getxattr(path, "user.memfs.mounted") == b"no"
        os.setxattr(path, "user.memfs.id", b"forged")
        os.removexattr(path, "user.memfs.id")
        assert os.getxattr(path, "user.memfs.id").decode() == meta["descriptive"]["id"]
    (cube / "other").touch()
    assert os.listxattr(cube / "other") == []
    assert os.listxattr(mount.dir) == []
    assert "user.memfs.kv" in os.listxattr(mount.cube("two") / "kv.safetensors")


@pytest.mark.parametrize(
    "program", ["cat {new} > {meta}", "bash -c 'echo \"$(cat {new})\" > {meta}'"]
)
def test_a_shell_writes_a_header(mount: Mount, program: str) -> None:
    """A shell closes a duplicate of the descriptor before anything is written."""
    cube = mount.cube("law")
    new = mount.dir / "new"
    meta = mount.meta("law")
    meta["descriptive"]["title"] = "Short"
    new.write_text(json.dumps(meta))
    command = program.format(new=new, meta=cube / "meta.json")
    subprocess.run(["sh", "-c", command], check=True)
    assert mount.meta("law")["descriptive"]["title"] == "Short"
    assert not (cube / "meta.json.rejected").exists()
    new.write_text("{ bad")
    subprocess.run(["sh", "-c", command], check=False, capture_output=True)
    until(lambda: mount.meta("law")["descriptive"]["title"] == "Short")
    assert (cube / "meta.json.rejected").read_text().rstrip() == "{ bad"


def test_a_header_that_is_only_emptied_stands(mount: Mount) -> None:
    cube = mount.cube("law")
    before = (cube / "meta.json").read_text()
    subprocess.run(["sh", "-c", f": > {cube}/meta.json"], check=True)
    assert not (cube / "meta.json.rejected").exists()
    until(lambda: (cube / "meta.json").read_text() == before)
    with pytest.raises(OSError, match="Invalid"):
        os.truncate(cube / "meta.json", 0)
    assert (cube / "meta.json").read_text() == before


def test_what_is_refused_can_be_mended_before_it_is_closed_for_good(mount: Mount) -> None:
    cube = mount.cube("law")
    text = (cube / "meta.json").read_text().replace('"law"', '"mended"')
    fd = os.open(cube / "meta.json", os.O_RDWR | os.O_TRUNC)
    os.write(fd, text[:50].encode())
    for close in (lambda: os.close(os.dup(fd)), lambda: os.close(os.dup(fd)), lambda: os.fsync(fd)):
        with pytest.raises(OSError, match="Invalid"):
            close()
    assert mount.meta("law")["descriptive"]["title"] == "law"
    os.write(fd, text[50:].encode())
    os.close(fd)
    assert mount.meta("law")["descriptive"]["title"] == "mended"


def test_an_editor_that_renames_the_old_header_away(mount: Mount) -> None:
    cube = mount.cube("law")
    meta = mount.meta("law")
    meta["governance"]["mode"] = "600"
    meta["behavioural"]["reads"] = 99
    os.rename(cube / "meta.json", cube / "meta.json~")
    (cube / "meta.json").write_text(json.dumps(meta))
    (cube / "meta.json~").unlink()
    shown = mount.meta("law")
    assert shown["descriptive"] == meta["descriptive"]
    assert shown["behavioural"]["reads"] == 0
    assert stat.S_IMODE((cube / "payload.md").stat().st_mode) == 0o600


def test_the_old_header_comes_back_while_a_refused_one_is_still_open(mount: Mount) -> None:
    """As vim does it: it closes, is refused, and renames its backup back at once."""
    cube = mount.cube("law")
    before = (cube / "meta.json").read_text()
    os.rename(cube / "meta.json", cube / "meta.json~")
    with (cube / "meta.json").open("w") as opened:
        opened.write("{ bad")
        opened.flush()
        with pytest.raises(OSError, match="Invalid"):
            os.close(os.dup(opened.fileno()))
        os.rename(cube / "meta.json~", cube / "meta.json")
        assert (cube / "meta.json").read_text() == before
    assert (cube / "meta.json").read_text() == before
    assert sorted(os.listdir(cube)) == ["meta.json", "meta.json.rejected", "payload.md"]


@pytest.mark.parametrize("take_away", ["unlink", "rename"])
def test_the_old_header_stands_though_it_was_taken_away(mount: Mount, take_away: str) -> None:
    """As git, install and sed -i~ do it, which do not bring it back."""
    cube = mount.cube("law")
    rewritten(cube / "meta.json", tags=["a"], extra=[1])
    before = (cube / "meta.json").read_text()
    if take_away == "unlink":
        (cube / "meta.json").unlink()
    else:
        os.rename(cube / "meta.json", cube / "meta.json~")
    file = (cube / "meta.json").open("x")
    file.write("{ bad")
    with pytest.raises(OSError, match="Invalid"):
        file.close()
    assert (cube / "meta.json").read_text() == before
    assert (cube / "meta.json.rejected").read_text() == "{ bad"
    shutil.rmtree(cube)
    cube.mkdir()
    with pytest.raises(OSError, match="Invalid"):
        (cube / "meta.json").write_text("{ bad")
    assert os.listdir(cube) == ["meta.json.rejected"]


def test_a_header_that_somebody_else_removed_stays_away(mount: Mount) -> None:
    cube = mount.cube("law")
    subprocess.run(["cat", cube / "meta.json"], check=True, capture_output=True)
    subprocess.run(["rm", cube / "meta.json"], check=True)
    with pytest.raises(OSError, match="Invalid"):
        (cube / "meta.json").write_text("{ bad")
    assert sorted(os.listdir(cube)) == ["meta.json.rejected", "payload.md"]


def test_a_refusal_is_told_of(mount: Mount) -> None:
    cube = mount.cube("law")
    with pytest.raises(OSError, match="Invalid"):
        (cube / "meta.json").write_text('{"memfs": 1}')
    (refusal,) = mount.status()["refusals"]
    assert (refusal["path"], refusal["kind"], refusal["uid"]) == ("law", "meta", os.getuid())
    assert "must contain ['descriptive']" in refusal["reason"]
    assert "what was written is in meta.json.rejected" in refusal["reason"]
    assert f"law: {refusal['reason']}" in (mount.dir / ".memfs/status").read_text()
    (event,) = [
        event
        for event in map(json.loads, (mount.dir / ".memfs/events").read_text().splitlines())
        if event["event"] == "refused"
    ]
    assert event["reason"] == refusal["reason"]
    shown = memfs("status", mount.dir, **mount.env).stdout
    assert f"refused law at {refusal['time']}: {refusal['reason']}" in shown


@needs_root
def test_the_rejected_text_is_the_writers(mount: Mount) -> None:
    cube = mount.cube("law")
    for path in (cube, *cube.iterdir()):
        path.chmod(0o777)
    open_way(mount.dir.parent)
    code = "import sys; open(sys.argv[1], 'w').write('bad')"
    as_user(1234, 2345, code, cube / "meta.json")
    found = until((cube / "meta.json.rejected").stat)
    assert (found.st_uid, found.st_gid) == (1234, 2345)


@pytest.mark.parametrize("name", ["new", "old"])
def test_an_empty_header_is_a_first_one_until_it_is_written(mount: Mount, name: str) -> None:
    """As tar unpacks one with attributes: made, given them, opened without truncating, written."""
    directory = mount.dir / name
    directory.mkdir()
    if name == "old":
        (directory / "payload.md").write_text("Text.\n")
    file, wanted = directory / "meta.json", str(uuid.uuid4())
    os.mknod(file, 0o600)
    assert mount.meta(name)["descriptive"]["title"] == name
    os.setxattr(file, "user.memfs.id", b"an id")
    fd = os.open(file, os.O_WRONLY)
    os.write(fd, json.dumps({"memfs": 1, "descriptive": {"id": wanted}}).encode())
    os.close(fd)
    assert mount.meta(name)["descriptive"]["id"] == wanted
    assert not (directory / "meta.json.rejected").exists()
    with file.open("r+") as opened:
        assert json.load(opened)["descriptive"]["id"] == wanted


@pytest.mark.parametrize(
    "name", ["meta.json", "kv.safetensors", "adapter/adapter_model.safetensors"]
)
def test_a_file_that_is_written_anew_keeps_its_own_attributes(mount: Mount, name: str) -> None:
    file = mount.cube("law") / name
    file.parent.mkdir(exist_ok=True)
    if name != "meta.json":
        file.write_bytes(b"some blob")
    os.setxattr(file, "user.note", b"mine")
    header = json.loads(file.read_bytes()) | {"mine": 1} if name == "meta.json" else None
    for data in (json.dumps(header).encode(), json.dumps(header, indent=1).encode()):
        file.write_bytes(data if header else data * 100)
        assert os.getxattr(file, "user.note") == b"mine"
    os.removexattr(file, "user.note")
    file.write_bytes(data if header else b"again")
    assert "user.note" not in os.listxattr(mount.store / "law" / name)


def test_a_header_keeps_its_own_attributes_when_memfs_writes_it(mount: Mount) -> None:
    file = mount.cube("law") / "meta.json"
    os.setxattr(file, "user.note", b"mine")
    renamed = file.with_name("new")
    renamed.write_text(json.dumps(mount.meta("law") | {"mine": 1}))
    os.setxattr(renamed, "user.note", b"the new one's")
    renamed.rename(file)  # rendered anew
    assert os.getxattr(file, "user.note") == b"the new one's"
