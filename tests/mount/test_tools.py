"""The tools that people use on files do on a mount what they do on a disk.

Most tests run the same commands on the mount and on a native directory, and compare.
"""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from ..conftest import needs
from .conftest import Mount, until
from .kvmaker import kv_file
from .shell import shell
from .watching import Watch

TEXT = "The text of a cube.\n"


@pytest.fixture
def both(place: Path, tmp_path: Path) -> Callable[..., str]:
    """``both(script)`` runs it in a directory of the mount and in a native one: it prints the same.

    What it printed is what it gives.
    """
    native = tmp_path / "native"
    native.mkdir()

    def run(script: str, **env: str | Path) -> str:
        said = shell(script, place, **env)
        assert said == shell(script, native, **env)
        return said

    return run


@pytest.fixture
def git(tmp_path: Path) -> dict[str, str]:
    """The environment of a git that has no settings, and always the same clock."""
    when = "2026-01-01T00:00:00Z"
    return {
        "HOME": str(tmp_path),
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_AUTHOR_NAME": "n",
        "GIT_AUTHOR_EMAIL": "n@e",
        "GIT_COMMITTER_NAME": "n",
        "GIT_COMMITTER_EMAIL": "n@e",
        "GIT_AUTHOR_DATE": when,
        "GIT_COMMITTER_DATE": when,
    }


@needs("git")
def test_git(both: Callable[..., str], tmp_path: Path, git: dict[str, str]) -> None:
    said = both(
        """
        git init -q -b main repo; cd repo
        mkdir -p notes; for i in $(seq 40); do echo "file $i" > notes/$i; done
        git add -A; git commit -qm one
        for i in 1 2 3; do echo "more $i" >> notes/$i; git commit -qam "$i"; done
        git checkout -q -b side HEAD~2; echo side > notes/side; git add -A; git commit -qm side
        git checkout -q main; git merge -q -m merged side
        git mv notes/10 notes/renamed; git rm -q notes/11; git commit -qm moved
        git gc -q --aggressive --prune=now; git fsck --full --strict --no-dangling
        echo more >> notes/12; git stash -q; git stash pop -q; git checkout -q notes/12
        git worktree add -q ../tree side; git -C ../tree status --short
        git worktree remove ../tree
        git clone -q . ../clone; git -C ../clone fsck --full --no-dangling
        git clone -q --no-local . "$OUT"; git -C "$OUT" fsck --full --no-dangling
        git clone -q "file://$OUT" ../in; cd ../in
        echo pushed >> notes/side; git commit -qam pushed; git push -q origin HEAD:pushed
        git fsck --full --no-dangling; git status --short
        git -C "$OUT" rev-parse pushed; git rev-parse HEAD HEAD^{tree}
        cd ..; rm -rf "$OUT" clone in; ls
        """,
        OUT=tmp_path / "out",
        **git,
    )
    pushed, head, *_, left = said.split()
    assert (pushed, left) == (head, "repo")


@needs("git")
@pytest.mark.parametrize("beside", [False, True], ids=["on the mount", "in the store"])
def test_git_keeps_cubes(
    shared_mount: Mount, place: Path, git: dict[str, str], *, beside: bool
) -> None:
    """Through the mount a header shows what changes by itself: there it is left out."""
    name = f"{place.name}/law"
    cube = shared_mount.cube(name, TEXT)
    meta = shared_mount.meta(name)
    where = shared_mount.store / place.name if beside else place
    shell(
        f"""
        git init -q -b main .
        {"" if beside else "echo meta.json > .git/info/exclude"}
        git add -A; git commit -qm one
        echo more >> law/payload.md; git commit -qam two; git status --short
        git checkout -q HEAD~1
        """,
        where,
        **git,
    )
    until(lambda: (cube / "payload.md").read_text() == TEXT)
    assert shared_mount.meta(name)["descriptive"] == meta["descriptive"]
    said = shell("git checkout -q main; git gc -q; git fsck; git status --short", where, **git)
    assert said == ""
    until(lambda: (cube / "payload.md").read_text() == TEXT + "more\n")
    assert shared_mount.meta(name)["descriptive"] == meta["descriptive"]
    assert {"meta.json", "payload.md"} == set(os.listdir(cube))


ADD = """
    import sqlite3, sys
    base = sqlite3.connect(sys.argv[1], timeout=60, isolation_level=None)
    for _ in range(25):
        base.execute("BEGIN IMMEDIATE")
        (count,) = base.execute("SELECT count FROM counter").fetchone()
        base.execute("UPDATE counter SET count = ?", (count + 1,))
        base.execute("INSERT INTO added (data) VALUES (randomblob(3000))")
        base.execute("COMMIT")
"""


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_sqlite_with_several_writers(place: Path, mode: str) -> None:
    file = place / "base.db"
    base = sqlite3.connect(file, timeout=60, isolation_level=None)
    assert base.execute(f"PRAGMA journal_mode={mode}").fetchone() == (mode,)
    base.execute("CREATE TABLE counter (count)")
    base.execute("INSERT INTO counter VALUES (0)")
    base.execute("CREATE TABLE added (id INTEGER PRIMARY KEY, data)")
    code = textwrap.dedent(ADD)
    writers = [subprocess.Popen([sys.executable, "-c", code, file]) for _ in range(4)]
    seen = 0
    while any(writer.poll() is None for writer in writers):
        (count,) = base.execute("SELECT count FROM counter").fetchone()
        assert count >= seen
        seen = count
    assert [writer.returncode for writer in writers] == [0] * 4
    assert base.execute("SELECT count FROM counter").fetchone() == (100,)
    assert base.execute("SELECT count(*) FROM added").fetchone() == (100,)
    base.close()
    assert os.listdir(place) == ["base.db"]
    in_store = place.parent.parent / "store" / place.name / "base.db"
    for where in (file, in_store):
        with sqlite3.connect(where) as base:
            assert base.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        base.close()


@needs("sqlite3")
def test_sqlite_goes_back(both: Callable[..., str]) -> None:
    """A writer that dies leaves a hot journal, which the next one plays back."""
    said = both(
        """
        sqlite3 b.db "PRAGMA journal_mode=delete; CREATE TABLE t(x); INSERT INTO t VALUES(1)"
        sqlite3 b.db "PRAGMA cache_size=1; BEGIN;
            INSERT INTO t SELECT randomblob(9999) FROM generate_series(1, 300);
            UPDATE t SET x = 2;" ".shell kill -9 \\$PPID" || echo killed
        test -s b.db-journal
        sqlite3 b.db "SELECT count(*), max(x) FROM t; PRAGMA integrity_check"
        ls
        """
    )
    assert said.split() == ["delete", "killed", "1|1", "ok", "b.db"]


FIND = "find . -printf '%P %y %s %m %U:%G %n %l\\n' | grep -v 'd [0-9]* ' | sort"


@needs("rsync", "setfacl")
def test_looking_through_a_store_starts_nothing(
    shared_mount: Mount, place: Path, tmp_path: Path
) -> None:
    """grep, find, du and a backup see what they see on a disk, and make no KV cache."""
    for name in ("one", "two", "deep/three"):
        shared_mount.cube(f"{place.name}/{name}", f"The text of {name}.\n")
    native = tmp_path / "native"
    shell('rsync -aHA . "$TO/"', place, TO=native)
    for command in (
        "grep -rc text . | sort",
        "grep -rl 'of two' .",
        FIND,
        "find . -type f -mmin -60 ! -empty | sort",
        "du -a --apparent-size . | grep -v '/$' | sort",
        "du -s .",
        "ls -RA . | sort",
        "tar --sort=name -cf - . | tar -tf -",
        "wc -c */payload.md",
    ):
        assert shell(command, place) == shell(command, native), command
    assert shared_mount.status()["runtime"] == "absent"
    assert not (shared_mount.store / place.name / "two/kv.safetensors").exists()
    assert shared_mount.meta(f"{place.name}/two")["state"]["kv"]["state"] == "none"
    # A KV cache that is there is read by a backup without a trace.
    (place / "one/kv.safetensors").write_bytes(kv_file(b"The text of one.\n"))
    sync = 'rsync -aHAX --open-noatime --checksum -i "$FROM/" "$TO/"'
    assert "one/kv.safetensors" in shell(sync, place, FROM=place, TO=native)
    assert shell(sync, place, FROM=place, TO=native) == ""
    assert shell(sync, place, FROM=native, TO=place) == ""
    assert shared_mount.meta(f"{place.name}/one")["behavioural"]["reads"] == 0


CHANGES = """
    mkdir directory; echo one > directory/file; echo two >> directory/file
    mv directory/file directory/moved; chmod 600 directory/moved; cp directory/moved copied
    mv copied directory/moved; ln directory/moved linked; ln -s linked symlink
    truncate -s 1 linked; touch linked; rm linked symlink; rm directory/moved; rmdir directory
"""


@needs("inotifywait")
def test_a_watcher_is_told_what_it_is_told_on_a_disk(place: Path, tmp_path: Path) -> None:
    told = []
    for directory in (place, tmp_path):
        with Watch(directory, recursive=True) as watch:
            for line in CHANGES.replace("\n", ";").split(";"):
                shell(line, directory)
                # inotifywait needs a moment to watch a directory that is new.
                (directory / "next").touch()
                watch.wait("CLOSE_WRITE,CLOSE next")
                (directory / "next").unlink()
                watch.wait("DELETE next")
                told.append([event for event in watch.events if "next" not in event])
                watch.events.clear()
    steps = len(told) // 2
    for on_mount, on_disk in zip(told[:steps], told[steps:], strict=True):
        assert _without_looks(on_mount) == _without_looks(on_disk)


def _without_looks(events: list[str]) -> list[str]:
    return [event for event in events if not event.startswith(("OPEN", "ACCESS", "CLOSE_NOWRITE"))]


@needs("gcc", "make")
def test_a_program_is_built(both: Callable[..., str]) -> None:
    said = both(
        r"""
        rule='prog: main.o\n\tcc -o prog main.o\nmain.o: main.c name.h\n\tcc -c main.c\n'
        printf '#define NAME "%s"\n' one > name.h
        printf '#include <stdio.h>\n#include "name.h"\nint main(void) { puts(NAME); }\n' > main.c
        printf "$rule" > Makefile
        make; ./prog; make
        sleep 0.02; printf '#define NAME "%s"\n' two > name.h
        make; ./prog; make -q; ar rc lib.a main.o; strip prog; ./prog
        """
    )
    assert said.split("\n")[-2:] == ["two", ""]
    assert said.count("cc -c main.c") == 2


@needs("zip", "unzip")
def test_archives(both: Callable[..., str]) -> None:
    both(
        """
        mkdir -p tree/below; seq 5000 > tree/numbers; echo x > tree/below/x; chmod 640 tree/below/x
        zip -qr tree.zip tree; unzip -tq tree.zip; unzip -q tree.zip -d out; diff -r tree out/tree
        zip -q tree.zip tree/numbers -d; unzip -Z1 tree.zip
        tar -czf tree.tgz tree; tar -xzf tree.tgz -C out; tar -df tree.tgz; diff -r tree out/tree
        tar -cf a.tar tree/below; tar -rf a.tar tree/numbers; tar -uf a.tar tree; tar -tf a.tar
        gzip -k tree/numbers; gunzip -t tree/numbers.gz; stat -c '%a %s %n' out/tree/below/x
        """
    )


def test_an_environment_of_pythons(place: Path) -> None:
    said = shell(
        """
        "$PYTHON" -m venv --without-pip env
        mkdir package; echo 'NAME = "found"' > package/__init__.py
        env/bin/python -m compileall -q package
        env/bin/python -c 'import package, sys; print(package.NAME, sys.prefix)'
        ls package/__pycache__ | wc -l
        """,
        place,
        PYTHON=sys.executable,
    )
    assert said.split() == ["found", str(place / "env"), "1"]


def test_the_small_tools(both: Callable[..., str]) -> None:
    said = both(
        """
        dd if=/dev/zero of=zeros bs=4k count=64 conv=fsync status=none
        dd if=/dev/zero of=direct bs=4k count=8 oflag=direct status=none
        dd if=zeros bs=1000 skip=3 count=2 status=none | wc -c
        printf abc | dd of=zeros bs=1 seek=5000 conv=notrunc status=none; od -A d -c zeros
        seq 20000 > numbers; split -n 7 numbers part.; cat part.* | cmp - numbers; ls part.*
        csplit -s numbers 100 200; wc -l xx*
        sort -R numbers | sort -n -o sorted; cmp sorted numbers
        sort -rn -o sorted sorted; head -1 sorted
        install -D -m 751 numbers deep/er/installed; stat -c '%a %s' deep/er/installed
        made=$(mktemp -p . XXXXXX); stat -c '%a %s' "$made"; rm "$made"
        made=$(mktemp -d -p . XXXXXX); stat -c '%a' "$made"; rmdir "$made"
        fallocate -l 100000 reserved; fallocate -p -o 0 -l 50000 reserved; stat -c %s reserved
        truncate -s 3G huge; stat -c %s huge; du huge | cut -f1; tail -c1 huge | od -c; rm huge
        shred -u sorted; ln numbers other; ln -sr deep/er/installed here; readlink here
        cp --sparse=always zeros sparse; cmp zeros sparse
        cp --reflink=auto numbers again; cmp numbers again
        tail -n +1 -s 0.05 -F grows 2> /dev/null | head -n2 > followed & sleep 0.1
        echo a > grows; sleep 0.1; echo b >> grows; wait; cat followed
        find . -name 'part.*' -delete; find . -type f | sort | xargs -d '\\n' md5sum
        """
    )
    assert "3221225472" in said
    assert said.count("part.") == 7


@needs("flock")
def test_flock_keeps_programs_apart(place: Path) -> None:
    said = shell(
        """
        echo 0 > count
        add() {
            for _ in $(seq 20); do
                flock lock sh -c 'read n < count; echo $((n + 1)) > count'
            done
        }
        add & add & add & wait; cat count
        flock lock sh -c 'touch held; while [ -e held ]; do sleep .05; done' &
        until [ -e held ]; do sleep .05; done
        flock -n lock true || echo busy; rm held; wait
        """,
        place,
    )
    assert said.split() == ["60", "busy"]
