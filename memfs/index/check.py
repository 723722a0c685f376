"""Checking an index, and saving what can be read of a damaged one, in a process of its own.

LMDB trusts its file: a truncated or overwritten one kills the process that reads or writes it by a
bus error or an abort, or goes unnoticed. So a child goes through it first, ``python -m
memfs.index.check``: every page by lmdb's own verifier, which maps nothing, then every checksum.
Called by ``rebuild`` before the index is opened; any thread.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmdb.verify import VerifyError, verify

import memfs
from memfs.errors import IndexDamaged, MemfsError
from memfs.index.environment import DATA, Environment, torn
from memfs.index.records import (
    DATABASES,
    FORMAT,
    dump,
    load,
    unseal,
    unseal_cube,
    unseal_usage,
)

LIMIT_S = 300
"""Seconds after which a child ends itself: a damaged tree may lead in a circle."""


def sound(directory: Path, *, live: bool = False) -> str | None:
    """None where the index may be opened and trusted, else the reason why not.

    Args:
        live: whether another process may be writing it. Its pages are then read through LMDB, as of
            one instant, by which less damage is found: of what is only written, none.
    """
    if not (directory / DATA).is_file():
        return "there is none"
    if torn(directory):
        return "the machine stopped while it was open"
    ended = subprocess.run(
        _command("live" if live else "rest", directory),
        env=_environment(),
        capture_output=True,
        check=False,
    )
    if ended.returncode < 0:
        return f"reading it ends by {signal.Signals(-ended.returncode).name}"
    if ended.returncode:
        said = ended.stderr.decode(errors="replace").strip().splitlines()
        return said[-1] if said else f"reading it ends with {ended.returncode}"
    return None


def salvage(directory: Path, table: str) -> Iterator[Any]:
    """What a child can read of a table before it ends, however it ends; damaged records left out.

    Args:
        table: ``usage``: lists of id, reads, questions, last use, still unwritten. ``cubes``: pairs
            of path and id. ``info``: pairs of name and value.
    """
    if not (directory / DATA).is_file():
        return
    with subprocess.Popen(
        _command(table, directory),
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as child:
        for line in child.stdout or ():
            try:
                yield json.loads(line)
            except ValueError:
                return  # it was killed within the line


def main(argv: list[str] | None = None) -> int:
    """The child: walks the index, or prints what it can read of one table, a JSON text a line."""
    parser = argparse.ArgumentParser(prog="python -m memfs.index.check", description=sound.__doc__)
    parser.add_argument("what", choices=["rest", "live", *_TABLES])
    parser.add_argument("directory", type=Path)
    args = parser.parse_args(argv)
    signal.alarm(LIMIT_S)
    try:
        if args.what == "rest":
            _verify(args.directory)
        environment = Environment(args.directory, DATABASES, read_only=True)
        if args.what in _TABLES:
            _print_table(environment, args.what)
        else:
            if args.what == "live":
                environment.walk_pages()
            _unseal(environment)
    except (MemfsError, OSError) as e:
        sys.stderr.write(f"{e.detail if isinstance(e, MemfsError) else e.strerror}\n")
        return 1
    return 0


def _verify(directory: Path) -> None:
    try:
        problems = verify(os.fspath(directory))  # type: ignore[no-untyped-call]
    except VerifyError as e:
        raise IndexDamaged(str(e)) from e
    if problems:
        raise IndexDamaged(problems[0])


def _unseal(environment: Environment) -> None:
    found = dict(environment.pairs("info", b"")).get(b"format")
    if found is None or load(unseal(b"format", found)) != FORMAT:
        raise IndexDamaged(f"its format is not {FORMAT}")
    for name in ("cubes", "usage", "info"):
        for key, value in environment.pairs(name, b""):
            unseal(key, value)
    cubes, times = environment.read(
        lambda txn: [txn.stat(environment.db[name])["entries"] for name in ("cubes", "times")]
    )
    if cubes != times:
        raise IndexDamaged("its secondary keys do not match its records")


def _print_table(environment: Environment, name: str) -> None:
    lines = 0
    for key, value in environment.pairs(name, b""):
        try:
            row = _TABLES[name](key, value)
        except IndexDamaged:
            continue
        # Flushed now and then, since the next page may be the last that this process reads.
        sys.stdout.write(dump(row).decode("ascii") + "\n")
        if lines % 64 == 0:
            sys.stdout.flush()
        lines += 1


def _usage_row(key: bytes, value: bytes) -> list[Any]:
    usage, unwritten = unseal_usage(key, value)
    return [key.decode(), *usage, unwritten]


def _cube_row(key: bytes, value: bytes) -> list[Any]:
    path, facts = unseal_cube(key, value)
    return [path, facts.id]


def _info_row(key: bytes, value: bytes) -> list[Any]:
    return [key.decode(), load(unseal(key, value))]


_TABLES = {"usage": _usage_row, "cubes": _cube_row, "info": _info_row}


def _command(what: str, directory: Path) -> list[str]:
    # -P: nothing is imported from the directory that memfs was started in.
    return [sys.executable, "-P", "-m", "memfs.index.check", what, os.fspath(directory)]


def _environment() -> dict[str, str]:
    """Ours, with the memfs that is running found first, and nothing by where we are."""
    ours = os.fspath(Path(memfs.__file__).resolve().parent.parent)
    others = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [ours, *(path for path in others if os.path.isabs(path))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


if __name__ == "__main__":
    sys.exit(main())
