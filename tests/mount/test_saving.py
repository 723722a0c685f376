"""Programs that save a text or a header without a terminal, each in its way.

VS Code cannot be installed for a test: its two ways of writing are done here call by call, with a
watcher such as it has beside it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ..conftest import needs
from .desk import OTHER, TEXT, Desk, open_desk
from .watching import Watch

Save = Callable[[Path, bytes], None]
"""Makes a file hold these bytes. Raises OSError or CalledProcessError where that fails."""


def in_place(file: Path, data: bytes) -> None:
    """VS Code: the file is emptied as it is opened, written, and flushed to the disk."""
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        os.write(fd, data)
        os.fdatasync(fd)
    finally:
        os.close(fd)


def over(suffix: str, prefix: str = "", *, like: bool = False) -> Save:
    """A new file beside it is written, flushed and renamed over it."""

    def save(file: Path, data: bytes) -> None:
        new = file.with_name(prefix + file.name + suffix)
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if like else 0o666)
        try:
            os.write(fd, data)
            if like:
                os.fchmod(fd, file.stat().st_mode & 0o7777)
            os.fsync(fd)
        finally:
            os.close(fd)
        try:
            os.rename(new, file)
        except OSError:
            new.unlink()
            raise

    return save


def gedit(file: Path, data: bytes) -> None:
    """As GLib does with a backup: the old file is linked away, a new one renamed over it."""
    backup = file.with_name(file.name + "~")
    backup.unlink(missing_ok=True)
    os.link(file, backup)
    over("-ABCDEF", ".goutputstream-", like=True)(file, data)


def shell(command: str) -> Save:
    """A command line; ``$NEW`` has the bytes, ``$FILE`` is to have them."""

    def save(file: Path, data: bytes) -> None:
        new = file.parent.parent / f"new for {file.parent.name}"
        new.write_bytes(data)
        env = os.environ | {"NEW": str(new), "FILE": file.name, "PERL_BADLANG": "0"}
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command],
            cwd=file.parent,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
        if new.exists():
            new.unlink()
        if done.returncode:
            raise OSError(done.stderr)

    return save


WAYS: dict[str, Save] = {
    "VS Code, in place": in_place,
    "VS Code, atomic": over(".vsctmp"),
    "Kate": over(".XyZ123", like=True),
    "gedit": gedit,
    "gio save": shell('gio save --backup "$FILE" < "$NEW"'),
    "sed -i": shell('''sed -i -e "1r $NEW" -e '1,$d' "$FILE"'''),
    "sed -i~": shell('''sed -i~ -e "1r $NEW" -e '1,$d' "$FILE"'''),
    "perl -i": shell('''perl -i -ne 'print(`cat "$ENV{NEW}"`) if eof' "$FILE"'''),
    "ed": shell('''printf '%s\\n' 1,\\$d "0r $NEW" w q | ed -s "$FILE"'''),
    "cat >": shell('cat "$NEW" > "$FILE"'),
    "tee": shell('tee "$FILE" < "$NEW" > /dev/null'),
    "sponge": shell('sponge "$FILE" < "$NEW"'),
    "dd": shell('dd status=none conv=fsync of="$FILE" if="$NEW"'),
    "dd conv=notrunc": shell(
        'dd status=none conv=notrunc of="$FILE" if="$NEW" && truncate -r "$NEW" "$FILE"'
    ),
    "cp": shell('cp "$NEW" "$FILE"'),
    "cp --backup": shell('cp --backup "$NEW" "$FILE"'),
    "cp --remove-destination": shell('cp --remove-destination "$NEW" "$FILE"'),
    "mv": shell('mv "$NEW" "$FILE"'),
    "mv --backup": shell('mv --backup "$NEW" "$FILE"'),
    "install": shell('install -m 644 "$NEW" "$FILE"'),
    "patch": shell('(diff -u "$FILE" "$NEW" || true) | patch -s "$FILE"'),
    "git checkout": shell(
        """
        export GIT_DIR=$PWD.git GIT_WORK_TREE=$PWD GIT_CONFIG_COUNT=0
        git init -q . && git config user.email a@b && git config user.name a
        blob=$(git hash-object -w "$NEW")
        git update-index --add --cacheinfo "100644,$blob,$FILE"
        git checkout-index -f "$FILE"
        """
    ),
}

SILENT = ("git checkout",)
"""git does not look at what its close says."""

REFUSAL = "Invalid argument|subdirectory of itself"
"""The second is mv's idea of an invalid argument."""

PROGRAMS = {
    "gio save": "gio",
    "sponge": "sponge",
    "ed": "ed",
    "patch": "patch",
    "git checkout": "git",
    "perl -i": "perl",
}


@pytest.fixture(scope="module")
def desk() -> Iterator[Desk]:
    with open_desk() as desk:
        yield desk


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    """The name of a way to save, whose program is there."""
    program = PROGRAMS.get(request.param)
    if program is not None and shutil.which(program) is None:
        pytest.skip(f"needs {program}")
    return str(request.param)


def test_a_text_is_saved(desk: Desk, way: str) -> None:
    pair, save = desk.pair(way), WAYS[way]
    for text, kv in ((TEXT, "ready"), (OTHER, "stale"), (TEXT, "ready")):
        desk.both(lambda there, text=text: save(there / "payload.md", text.encode()), pair)
        desk.require(way, text, kv)


def test_a_header_is_saved(desk: Desk, way: str) -> None:
    pair, save = desk.pair(f"header by {way}"), WAYS[way]
    before = (pair.cube / "meta.json").read_bytes()
    desk.both(lambda there: save(there / "meta.json", before), pair)
    desk.require(pair.name, TEXT, "ready")
    # Of the same length: a header is to be whole at each close, and dd cuts it in a second step.
    after = before.replace(b'"title": "header', b'"title": "HEADER')
    desk.both(lambda there: save(there / "meta.json", after), pair)
    desk.made[pair.name]["title"] = pair.name.replace("header", "HEADER")
    desk.require(pair.name, TEXT, "ready")
    assert not (pair.cube / "meta.json.rejected").exists()


def test_a_bad_header_is_refused(desk: Desk, way: str) -> None:
    pair, save = desk.pair(f"bad header by {way}"), WAYS[way]
    before = (pair.cube / "meta.json").read_bytes()
    bad = before.replace(b'"memfs": 1', b'"memfs": 0')
    if way in SILENT:
        save(pair.cube / "meta.json", bad)
    else:
        with pytest.raises(OSError, match=REFUSAL):
            save(pair.cube / "meta.json", bad)
    desk.require_refused(pair.name, bad.decode())
    assert (pair.cube / "meta.json").read_bytes() == before
    desk.both(lambda there: save(there / "meta.json", before), pair)
    desk.require(pair.name, TEXT, "ready")


@needs("inotifywait")
@pytest.mark.parametrize("way", ["VS Code, in place", "VS Code, atomic"])
def test_a_watcher_sees_what_is_saved(desk: Desk, way: str) -> None:
    pair, save = desk.pair(f"watched {way}"), WAYS[way]
    with Watch(pair.cube) as directory, Watch(pair.cube / "payload.md") as file:
        save(pair.cube / "payload.md", OTHER.encode())
        if "atomic" in way:
            directory.wait("CREATE payload.md.vsctmp")
            directory.wait("MOVED_TO payload.md")
            file.wait("DELETE_SELF ")
        else:
            directory.wait("MODIFY payload.md")
            directory.wait("CLOSE_WRITE,CLOSE payload.md")
            file.wait("MODIFY ")
        assert (pair.cube / "payload.md").read_text() == OTHER
    desk.require(pair.name, OTHER, "stale")
