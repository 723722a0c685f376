"""``memfs dump`` and ``memfs load`` as they are typed, on stores that are not mounted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from memfs.cli import main as cli
from memfs.config import config_file
from memfs.cube import metadata
from memfs.vault.lock import lock
from memfs.vault.store import Store
from tests.users import open_way

from .conftest import Run


def make_store(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "payload.md").write_text(f"The text of {name}.\n")
        (root / name / "meta.json").write_bytes(metadata.render(metadata.new(title=name)))
    root.mkdir(exist_ok=True)
    Store.open(root).close()  # as a first mount leaves it
    return root


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return make_store(tmp_path / "store", "law", "work/note")


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return make_store(tmp_path / "other")


@pytest.fixture
def dumped(store: Path, tmp_path: Path, run: Run) -> Path:
    path = tmp_path / "cubes.tar"
    assert run("dump", store / "law", store / "work/note", "-o", path)[0] == 0
    return path


def text(cube: Path) -> str:
    return (cube / "payload.md").read_text()


def test_there_and_back(store: Path, other: Path, tmp_path: Path, run: Run) -> None:
    archive = tmp_path / "cubes.tar"
    status, out, err = run("dump", store / "law/payload.md", store / "work/note", "-o", archive)
    assert (status, out, err) == (0, f"{archive}: 2 cubes, 20.0 KiB\n", "")
    assert archive.stat().st_mode & 0o777 == 0o600
    status, out, err = run("load", archive, other)
    assert (status, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == ["CUBE", "law", "work/note"]
    assert text(other / "work/note") == "The text of work/note.\n"
    again = tmp_path / "again.tar"
    run("dump", other / "law", other / "work/note", "-o", again)
    assert again.read_bytes() == archive.read_bytes()


def test_as_json(store: Path, other: Path, tmp_path: Path, run: Run) -> None:
    archive = tmp_path / "cube.tar"
    os.symlink("payload.md", store / "law/link")
    status, out, err = run("dump", store / "law", "-o", archive, "--json")
    said = json.loads(out)
    assert (status, said["left_out"], said["signed"]) == (0, ["law/link"], False)
    assert err == "left out: law/link is no file or directory\n"
    assert said["bytes"] == archive.stat().st_size
    status, out, _ = run("load", archive, other, "--as", "new/name", "--json")
    said = json.loads(out)
    assert (status, said["loaded"], said["signer"], said["store"]) == (0, True, None, str(other))
    cube_id = metadata.cube_id(metadata.parse((store / "law/meta.json").read_bytes()))
    assert said["cubes"] == [
        {
            "path": "law",
            "id": cube_id,
            "files": 2,
            "bytes": said["cubes"][0]["bytes"],
            "place": "new/name",
            "replaces": False,
        }
    ]
    assert text(other / "new/name") == "The text of law.\n"


@pytest.mark.parametrize("option", ["--list", "--dry-run", "-n"])
def test_a_look_writes_nothing(dumped: Path, other: Path, run: Run, option: str) -> None:
    assert run("load", dumped, option)[1].splitlines()[1].split()[:2] == ["law", "2"]
    status, out, _ = run("load", dumped, other, option, "--json")
    assert (status, json.loads(out)["loaded"]) == (0, False)
    assert os.listdir(other) == [".memfs"]
    shutil.copytree(dumped.parent / "store/law", other / "law")
    assert run("load", dumped, other, option)[0] == 7
    assert json.loads(run("load", dumped, other, option, "--force", "--json")[1])["cubes"][0][
        "replaces"
    ]


def test_through_pipes(store: Path, other: Path) -> None:
    memfs = [sys.executable, "-m", "memfs.cli.main"]
    with subprocess.Popen(
        [*memfs, "dump", store / "law", "-o", "-"], stdout=subprocess.PIPE
    ) as dump:
        done = subprocess.run([*memfs, "load", "-", other], stdin=dump.stdout, check=True)
    assert (dump.returncode, done.returncode) == (0, 0)
    assert text(other / "law") == "The text of law.\n"
    done = subprocess.run(
        [*memfs, "load", "-", other], input=b"junk" * 5000, capture_output=True, check=False
    )
    assert done.returncode == 7
    assert b"no tar header" in done.stderr


def test_a_pipe_without_end_that_is_no_archive(other: Path) -> None:
    with open("/dev/zero", "rb") as endless:
        done = subprocess.run(
            [sys.executable, "-m", "memfs.cli.main", "load", "-", other],
            stdin=endless,
            capture_output=True,
            timeout=20,
            check=False,
        )
    assert done.returncode == 7


def test_names(dumped: Path, store: Path, other: Path, run: Run) -> None:
    run("load", dumped, other)
    (other / "law/payload.md").write_text("Mine.\n")
    status, _, err = run("load", dumped, other)
    assert (status, "law is there already: --force" in err) == (7, True)
    assert text(other / "law") == "Mine.\n"
    assert run("load", dumped, other, "--force")[0] == 0
    assert text(other / "law") == "The text of law.\n"
    status, _, err = run("load", dumped, other, "--as", "one")
    assert (status, "without --as" in err) == (7, True)


def test_where_it_goes(
    dumped: Path, other: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (other / "deep/er").mkdir(parents=True)
    monkeypatch.chdir(other / "deep/er")
    assert run("load", dumped)[0] == 0
    assert sorted(os.listdir(".")) == ["law", "work"]
    status, _, err = run("load", dumped, tmp_path)
    assert (status, "in no mount and no store" in err) == (3, True)
    assert run("load", dumped, other / "nowhere")[0] == 3
    assert run("load", dumped, other / "deep/er/law")[0] == 7
    assert run("load", tmp_path / "no.tar", other)[0] == 1
    with Store.open(other) as opened, lock(opened, "is in use by a test"):
        status, _, err = run("load", dumped, other)
    assert (status, "is in use by a test" in err) == (9, True)


def test_a_dump_that_fails_leaves_what_was_there(store: Path, tmp_path: Path, run: Run) -> None:
    archive = tmp_path / "out" / "cube.tar"
    archive.parent.mkdir()
    archive.write_bytes(b"an older one")
    (store / "law/a\\b").write_text("")
    status, _, err = run("dump", store / "law", "-o", archive)
    assert (status, "backslash" in err) == (7, True)
    meta = metadata.new()
    meta["governance"]["sensitivity"] = "secret"
    (store / "work/note/meta.json").write_bytes(metadata.render(meta))
    assert run("dump", store / "work/note", "-o", archive, "--redact")[0] == 8
    assert run("dump", store / "work", "-o", archive)[0] == 3
    assert run("dump", store / "law", "-o", "-", "--json")[0] == 7
    assert archive.read_bytes() == b"an older one"
    assert os.listdir(archive.parent) == ["cube.tar"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_who_may_not_share(store: Path, tmp_path: Path) -> None:
    open_way(tmp_path)
    header = store / "law/meta.json"
    meta = metadata.parse(header.read_bytes())

    def dump_as(uid: int) -> int:
        child = os.fork()
        if not child:
            try:
                os.setgroups([])
                os.setgid(uid)
                os.setuid(uid)
                os.environ["XDG_RUNTIME_DIR"] = ""
                os._exit(cli.main(["dump", str(store / "law"), "-o", "/dev/null"]))
            finally:
                os._exit(1)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert dump_as(4321) == 0
    meta["governance"]["access"] = [{"who": "user:0", "rights": ["share"]}]
    header.write_bytes(metadata.render(meta))
    assert (dump_as(4321), dump_as(0)) == (8, 0)
    meta["governance"]["access"] += [{"who": "user:4321", "rights": ["share"]}]
    header.write_bytes(metadata.render(meta))
    assert dump_as(4321) == 0


def test_a_device_is_written_as_it_is(store: Path, run: Run) -> None:
    assert run("dump", store / "law", "-o", "/dev/null")[0] == 0
    assert Path("/dev/null").is_char_device()


needs_ssh = pytest.mark.skipif(
    shutil.which("ssh-keygen") is None, reason="ssh-keygen (openssh-client) is not installed"
)


@pytest.fixture
def key(tmp_path: Path) -> Path:
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", tmp_path / "key"],
        check=True,
    )
    return tmp_path / "key"


@needs_ssh
def test_a_signature_is_checked_by_hand_and_on_load(
    store: Path, other: Path, tmp_path: Path, key: Path, run: Run
) -> None:
    archive, allowed = tmp_path / "cube.tar", tmp_path / "allowed"
    allowed.write_text(f"ann@example.org {key.with_suffix('.pub').read_text()}")
    assert run("dump", store / "law", "-o", archive, "--sign", key)[0] == 0
    once = archive.read_bytes()
    run("dump", store / "law", "-o", archive, "--sign", key)
    assert archive.read_bytes() == once
    subprocess.run(["tar", "xf", archive, "-C", other], check=True)
    by_hand = "ssh-keygen -Y verify -n memfs -f ../allowed -I ann@example.org"
    by_hand += " -s SHA256SUMS.sig < SHA256SUMS && sha256sum -c SHA256SUMS"
    subprocess.run(by_hand, shell=True, cwd=other, check=True, capture_output=True)
    shutil.rmtree(other / "law")
    status, _, err = run("load", archive, other)
    assert (status, err.startswith("signed by SHA256:")) == (0, True)
    chosen = ("--allowed-signers", allowed, "--force")
    assert run("load", archive, other, *chosen)[2] == "signed by ann@example.org\n"
    assert run("load", archive, other, *chosen, "--signer", "ann@example.org")[0] == 0
    assert run("load", archive, other, *chosen, "--signer", "bob")[0] == 8
    assert run("load", archive, other, "--force", "--signer", "bob")[0] == 7
    archive.write_bytes(once.replace(b"SIGNATURE-----\nU1", b"SIGNATURE-----\nU2"))
    assert run("load", archive, other, "--force")[0] == 8


@needs_ssh
def test_where_signers_are_configured_all_must_be_theirs(
    store: Path, dumped: Path, other: Path, key: Path, run: Run
) -> None:
    allowed = config_file().with_name("allowed_signers")
    allowed.parent.mkdir(parents=True, exist_ok=True)
    allowed.write_text(f"eve {key.with_suffix('.pub').read_text()}")
    try:
        status, _, err = run("load", dumped, other)
        assert (status, "it is not signed" in err) == (8, True)
        run("dump", store / "law", "-o", dumped, "--sign", key)
        assert run("load", dumped, other)[0] == 0
        allowed.write_text("")
        assert run("load", dumped, other, "--force")[0] == 8
    finally:
        allowed.unlink()


@needs_ssh
def test_the_key_is_no_cube(store: Path, tmp_path: Path, run: Run, capsys: Any) -> None:
    status, _, err = run("dump", store / "law", "-o", tmp_path / "x", "--sign", tmp_path / "none")
    assert (status, "write --sign last" in err) == (7, True)
    assert not (tmp_path / "x").exists()
