"""``memfs versions``, ``diff`` and ``restore``: through a mount, and in a store without one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import until

from .conftest import Run, needs_fuse

pytestmark = needs_fuse


def command(*args: object) -> None:
    environment = os.environ | {"MEMFS_AUTOSTART": "off"}
    line = [sys.executable, "-m", "memfs.cli.main", *map(str, args)]
    subprocess.run(line, check=True, capture_output=True, env=environment)


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("versions")
    command("mount", root / "store", root / "mem")
    yield root / "mem"
    command("umount", root / "mem")


def from_json(run: Run, *args: object) -> Any:
    return json.loads(run(*args, "--json")[1])


@pytest.fixture
def cube(mount: Path, request: pytest.FixtureRequest) -> Path:
    """A cube with two texts and two titles."""
    directory = mount / request.node.name
    directory.mkdir()
    (directory / "payload.md").write_text("one\nsame\n")
    retitled(directory, "First")
    (directory / "payload.md").write_text("two\nsame\n")
    return directory


def retitled(cube: Path, title: str) -> None:
    meta = json.loads((cube / "meta.json").read_text())
    meta["descriptive"]["title"] = title
    (cube / "meta.json").write_text(json.dumps(meta))


def title(cube: Path) -> str:
    return str(json.loads((cube / "meta.json").read_text())["descriptive"]["title"])


def test_versions_are_listed(cube: Path, run: Run) -> None:
    said = from_json(run, "versions", cube)
    assert said["cube"] == cube.name
    assert [v["event"] for v in said["versions"]] == ["created", "changed", "changed"]
    changed = [v["changed"] for v in said["versions"]]
    assert changed == [["meta.json", "payload.md"], ["meta.json"], ["payload.md"]]
    assert [v["version"] for v in said["versions"]] == sorted(os.listdir(cube / ".versions"))
    status, out, err = run("versions", cube / "payload.md")
    assert (status, err) == (0, "")
    assert len(out.splitlines()) == 4
    assert out.splitlines()[0].split() == ["VERSION", "EVENT", "SIZE", "CHANGED"]


def test_the_last_change_is_shown(cube: Path, run: Run) -> None:
    status, out, _ = run("diff", cube)
    assert status == 1
    assert out.splitlines()[2:] == ["@@ -1,2 +1,2 @@", "-one", "+two", " same"]
    assert out.splitlines()[0].startswith(f"--- {cube.name}/.versions/")
    assert out.splitlines()[1] == f"+++ {cube.name}/payload.md"
    first, second, third = sorted(os.listdir(cube / ".versions"))
    assert run("diff", cube, third) == (0, "", "")
    out = run("diff", cube, first, second)[1]
    assert [line for line in out.splitlines()[2:] if line[0] in "+-"] == [
        f'-    "title": "{cube.name}",',
        '+    "title": "First",',
    ]
    said = from_json(run, "diff", cube, first, third)
    assert [change["file"] for change in said["changes"]] == ["meta.json", "payload.md"]
    assert '+    "title": "First"' in said["changes"][0]["diff"]
    assert "reads" not in said["changes"][0]["diff"]


def test_a_patch_can_be_made_of_it(cube: Path, run: Run, tmp_path: Path) -> None:
    if not shutil.which("patch"):
        pytest.skip("patch is not installed")
    (tmp_path / "text").write_text("one\nsame\n")
    (tmp_path / "patch").write_text(run("diff", cube)[1])
    subprocess.run(["patch", tmp_path / "text", tmp_path / "patch"], check=True)
    assert (tmp_path / "text").read_text() == "two\nsame\n"


def test_a_patch_splits_lines_where_patch_does(cube: Path, run: Run, tmp_path: Path) -> None:
    if not shutil.which("patch"):
        pytest.skip("patch is not installed")
    old = "one\x0cpage\u2028two\x85three\x1c\v\rfour\nsame\nlast\x0c"
    new = old.replace("page", "PAGE").replace("last", "end\u2029")
    for text in (old, new):
        (cube / "payload.md").write_bytes(text.encode())
    (tmp_path / "text").write_bytes(old.encode())
    (tmp_path / "patch").write_bytes(run("diff", cube)[1].encode())
    done = subprocess.run(
        ["patch", tmp_path / "text", tmp_path / "patch"], check=False, capture_output=True
    )
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "text").read_bytes() == new.encode()


def test_adapters_are_compared_by_digest(cube: Path, run: Run) -> None:
    (cube / "adapter").mkdir()
    (cube / "adapter/adapter_model.safetensors").write_bytes(b"one")
    (cube / "adapter/adapter_model.safetensors").write_bytes(b"another")
    (change,) = from_json(run, "diff", cube)["changes"]
    assert change["file"] == "adapter/adapter_model.safetensors"
    assert change["old_sha256"] != change["new_sha256"]
    assert change["diff"].count("sha256") == 2


def test_restoring_undoes_the_last_change_and_is_a_change(cube: Path, run: Run) -> None:
    (cube / "payload.md").chmod(0o640)
    first, second, _ = sorted(os.listdir(cube / ".versions"))
    status, out, _ = run("restore", cube)
    assert (status, out) == (0, f"{cube.name} is as it was at {second}: payload.md\n")
    assert (cube / "payload.md").read_text() == "one\nsame\n"
    assert (cube / "payload.md").stat().st_mode & 0o777 == 0o640
    assert sorted(os.listdir(cube)) == ["meta.json", "payload.md"]
    said = from_json(run, "versions", cube)["versions"]
    assert [v["event"] for v in said] == ["created", "changed", "changed", "restored"]
    assert said[-1]["origin"] == second
    run("restore", cube)  # which undoes that
    assert (cube / "payload.md").read_text() == "two\nsame\n"
    assert from_json(run, "restore", cube, first)["changed"] == ["meta.json", "payload.md"]
    assert title(cube) == cube.name
    assert (cube / "payload.md").read_text() == "one\nsame\n"
    assert "already" in run("restore", cube, first)[1]


def test_counters_rights_and_identity_stay(cube: Path, run: Run) -> None:
    before = json.loads((cube / "meta.json").read_text())
    (cube / "payload.md").chmod(0o600)
    first = min(os.listdir(cube / ".versions"))
    run("restore", cube, first)
    after = json.loads((cube / "meta.json").read_text())
    assert after["descriptive"]["id"] == before["descriptive"]["id"]
    assert after["governance"]["mode"] == "600"
    assert len(after["behavioural"]["versions"]) == 3


def test_an_adapter_comes_back_and_goes(cube: Path, run: Run) -> None:
    (cube / "adapter").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (cube / "adapter" / name).write_text("{}")
    *_, without, _, _ = sorted(os.listdir(cube / ".versions"))
    with_both = max(os.listdir(cube / ".versions"))
    run("restore", cube, without)
    assert os.listdir(cube / "adapter") == []
    run("restore", cube, with_both)
    assert sorted(os.listdir(cube / "adapter")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert from_json(run, "diff", cube, with_both)["changes"] == []


def test_a_frozen_cube_is_not_restored(cube: Path, run: Run) -> None:
    meta = json.loads((cube / "meta.json").read_text())
    meta["state"]["frozen"] = True
    (cube / "meta.json").write_text(json.dumps(meta))
    status, _, err = run("restore", cube)
    assert status == 8
    assert "is frozen" in err
    assert (cube / "payload.md").read_text() == "two\nsame\n"
    assert sorted(os.listdir(cube)) == ["meta.json", "payload.md"]


def test_times_name_versions(cube: Path, run: Run) -> None:
    first, second, third = sorted(os.listdir(cube / ".versions"))
    year = datetime.now(UTC).year
    assert from_json(run, "restore", cube, "--at", second)["version"] == second
    assert run("diff", cube, str(year + 1), third)[0] == 1  # the restored one is the last
    for wrong, code in (("1999", 3), ("yesterday", 3)):
        assert run("restore", cube, wrong)[0] == code
        assert run("diff", cube, wrong)[0] == code
    assert run("restore", cube, first, "--at", first)[0] == 7
    assert run("diff", cube, first, second, third)[0] == 7


def test_a_deleted_cube_comes_back(cube: Path, mount: Path, run: Run) -> None:
    cube_id = os.getxattr(cube, "user.memfs.id")
    (cube / "payload.md").chmod(0o600)
    (cube / "payload.md").write_text("three\n")
    shutil.rmtree(cube)

    def gone() -> bool:
        return cube.name in [
            line["path"] for line in from_json(run, "versions", "--deleted", mount)
        ]

    until(gone)
    assert cube.name in run("versions", "--deleted", mount)[1]
    assert [v["event"] for v in from_json(run, "versions", cube)["versions"]][-1] == "deleted"
    status, out, _ = run("restore", cube)
    assert status == 0
    assert "is back" in out
    assert (cube / "payload.md").read_text() == "three\n"
    assert (cube / "payload.md").stat().st_mode & 0o777 == 0o600
    assert os.getxattr(cube, "user.memfs.id") == cube_id
    assert title(cube) == "First"
    until(lambda: from_json(run, "versions", cube)["versions"][-1]["event"] == "restored")
    assert not gone()
    shutil.rmtree(cube)
    until(gone)
    older = from_json(run, "versions", cube)["versions"][0]["version"]
    assert from_json(run, "restore", cube, older)["version"] == older
    assert (cube / "payload.md").read_text() == "one\nsame\n"


def test_a_deleted_cube_is_not_the_one_it_lay_in(cube: Path, mount: Path, run: Run) -> None:
    (cube / "inner").mkdir()
    (cube / "inner/payload.md").write_text("inner\n")
    shutil.rmtree(cube / "inner")
    assert run("restore", cube / "nothing")[0] == 3
    until(lambda: run("restore", cube / "inner")[0] == 0)
    assert (cube / "inner/payload.md").read_text() == "inner\n"
    assert (cube / "payload.md").read_text() == "two\nsame\n"


def test_what_has_no_version_yet_is_not_replaced(cube: Path, mount: Path, run: Run) -> None:
    store = mount.parent / "store" / cube.name
    newest = max(os.listdir(cube / ".versions"))
    (store / "payload.md").write_text("beside\n")
    said = run("restore", cube, newest)
    assert said[1].endswith("payload.md\n")
    events = [v["event"] for v in from_json(run, "versions", cube)["versions"]]
    assert events == ["created", "changed", "changed", "changed", "restored"]
    assert (cube / "payload.md").read_text() == "two\nsame\n"


def test_access_lists_are_no_difference(cube: Path, run: Run) -> None:
    done = subprocess.run(
        ["setfacl", "-m", "u:1234:r", cube / "payload.md"], check=False, capture_output=True
    )
    if done.returncode:
        pytest.skip("no access lists here")
    newest = max(os.listdir(cube / ".versions"))
    assert run("diff", cube, newest) == (0, "", "")
    assert run("restore", cube)[0] == 0
    acl = subprocess.run(
        ["getfacl", "-n", cube / "payload.md"], check=True, capture_output=True, text=True
    )
    assert "user:1234:r--" in acl.stdout


def test_what_never_was(mount: Path, run: Run, tmp_path: Path) -> None:
    (mount / "collection").mkdir()
    for name in ("nothing", "collection"):
        for word in ("versions", "diff", "restore"):
            status, out, err = run(word, mount / name)
            assert (status, out) == (3, "")
            assert "not a MemCube" in err
    assert run("versions", tmp_path)[0] == 3


def test_a_store_that_is_not_mounted(tmp_path: Path, run: Run) -> None:
    store, mem = tmp_path / "store", tmp_path / "mem"
    command("mount", store, mem)
    for name in ("law", "work/gone"):
        (mem / name).mkdir(parents=True)
        for text in ("one\n", "two\n"):
            (mem / name / "payload.md").write_text(text)
    until(lambda: len(os.listdir(mem / "work/gone/.versions")) == 2)
    shutil.rmtree(mem / "work")
    command("umount", mem)
    assert len(from_json(run, "versions", store / "law")["versions"]) == 2
    assert run("diff", store / "law")[0] == 1
    assert run("restore", store / "law")[0] == 0
    assert (store / "law/payload.md").read_text() == "one\n"
    assert from_json(run, "versions", store / "law")["versions"][-1]["event"] == "restored"
    (line,) = from_json(run, "versions", "--deleted", store)
    assert line["path"] == "work/gone"
    assert run("restore", store / "work/gone")[0] == 0
    assert (store / "work/gone/payload.md").read_text() == "two\n"
    assert from_json(run, "versions", "--deleted", store) == []
    command("mount", store, mem)
    try:
        for name in ("law", "work/gone"):
            said = from_json(run, "versions", mem / name)["versions"]
            assert [v["event"] for v in said if v["event"] != "deleted"] == [
                "created",
                "changed",
                "restored",
            ]
        meta = json.loads((store / "law/meta.json").read_text())
        meta["state"]["frozen"] = True
        (store / "law/meta.json").write_text(json.dumps(meta))
    finally:
        command("umount", mem)
    assert run("restore", store / "law")[0] == 8
    assert (store / "law/payload.md").read_text() == "one\n"


@pytest.mark.parametrize(("budget", "mounted"), [("1000", True), ("1000", False), ("0", False)])
def test_what_no_version_holds_is_not_replaced(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, budget: str, mounted: bool
) -> None:
    """It is larger than all versions may be, or none are made any more."""
    store, mem = tmp_path / "store", tmp_path / "mem"
    command("mount", store, mem)
    (mem / "law").mkdir()
    (mem / "law/payload.md").write_text("one\n")
    (mem / "law/payload.md").write_text("two\n")
    first = min(os.listdir(mem / "law/.versions"))
    command("umount", mem)
    monkeypatch.setenv("MEMFS_VERSIONS_BUDGET_BYTES", budget)
    command("mount", store, mem)
    lost = "three\n" * 1000
    (mem / "law/payload.md").write_text(lost)
    newest = mem / "law/.versions" / max(os.listdir(mem / "law/.versions"))
    if budget != "0" and (newest / "payload.md").exists():
        command("umount", mem)
        pytest.skip("this disk shares blocks, so that every version is kept")
    place = mem if mounted else store
    if not mounted:
        command("umount", mem)
    try:
        status, out, err = run("restore", place / "law", first)
        assert (status, out) == (1, "")
        assert "payload.md as it is now is in no version" in err
        assert (place / "law/payload.md").read_text() == lost
        assert sorted(os.listdir(place / "law")) == ["meta.json", "payload.md"]
        (place / "law/payload.md").write_text("two\n")
        if budget == "1000":
            assert run("restore", place / "law", first)[0] == 0
            assert (place / "law/payload.md").read_text() == "one\n"
    finally:
        if mounted:
            command("umount", mem)
