"""``memfs load``: cubes from an archive, checked as a whole before anything is written."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from memfs.cli import output, targets
from memfs.errors import InvalidRequest, Untrusted
from memfs.vault.archive import contents, signing
from memfs.vault.archive.check import Checked, check
from memfs.vault.archive.load import Place, load, plan
from memfs.vault.lock import lock

HELP = "load cubes from an archive"
EPILOG = """\
examples:
  memfs load handbook.tar ~/mem                 each cube where it lay in its own store
  memfs load handbook.tar ~/mem/work --as guide in a collection, under another name
  memfs load handbook.tar --list                check it, and show what is in it
  ssh other memfs dump handbook -o - | memfs load - ~/mem

DIR is a collection in a mount or in a store: where it is not given the directory you are in, else
the only mount. Nothing is written before the whole archive was checked, and each cube appears
whole. A name that is taken is refused; with --force that cube's directory is replaced, all of it. A
cube keeps its id where that is new in the store.

Where there is a file of allowed signers (--allowed-signers, else allowed_signers beside the
configuration), only archives signed by one of them are loaded. It is OpenSSH's: see ALLOWED SIGNERS
in `man ssh-keygen`.
"""

COPIED = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("archive", metavar="FILE", help="the archive; - is standard input")
    parser.add_argument("directory", nargs="?", metavar="DIR", help="where the cubes go")
    parser.add_argument("--as", dest="name", metavar="NAME", help="name of the archive's only cube")
    parser.add_argument("--force", action="store_true", help="replace cubes of the same name")
    parser.add_argument(
        "-n", "--list", "--dry-run", dest="dry", action="store_true", help="write nothing"
    )
    parser.add_argument("--allowed-signers", type=Path, metavar="FILE", help="who may have signed")
    parser.add_argument("--signer", metavar="IDENTITY", help="who must have signed")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    with output.Progress() as progress, _opened(args.archive) as file:
        size = os.fstat(file.fileno()).st_size
        checked = check(
            file.fileno(),
            lambda done: progress.update(f"{output.size(done)} of {output.size(size)} checked"),
        )
        signer = _signer(checked, args.allowed_signers, args.signer)
        if args.dry and args.directory is None:
            return _report(args, checked, signer, None, [])
        where = targets.collection(args.directory)
        with contextlib.ExitStack() as stack:
            store = stack.enter_context(targets.open_store(where.store))
            if where.mountpoint is None and not args.dry:
                stack.enter_context(lock(store, f"is being loaded into by process {os.getpid()}"))
            places = plan(store, where.path, checked.cubes, name=args.name, force=args.force)
            if not args.dry:
                load(
                    file.fileno(),
                    checked,
                    store,
                    where.path,
                    places,
                    lambda done: progress.update(f"{output.size(done)} written"),
                )
    return _report(args, checked, signer, where, places)


def _signer(checked: Checked, given: Path | None, signer: str | None) -> str | None:
    """Who signed, by what the file of allowed signers says; by the key where there is none."""
    allowed = given or signing.default_allowed_signers()
    if allowed is None:
        if signer is not None:
            raise InvalidRequest("--signer needs a file of allowed signers")
        if checked.signature is None:
            return None
        return signing.require_own(checked.sums, checked.signature)
    if checked.signature is None:
        raise Untrusted(f"it is not signed, and {allowed} says who may have signed what is loaded")
    return signing.verify(checked.sums, checked.signature, allowed, signer)


@contextlib.contextmanager
def _opened(name: str) -> Iterator[BinaryIO]:
    """The archive as an ordinary file: what comes through a pipe is kept in a temporary one."""
    if name != "-":
        with open(name, "rb") as file:
            yield file
        return
    with tempfile.TemporaryFile() as file:
        start = sys.stdin.buffer.read(contents.RECORD)
        file.write(start)
        if start.startswith(contents.SUMS.encode() + b"\0"):  # else it is no archive, and may go on
            while part := sys.stdin.buffer.read(COPIED):
                file.write(part)
        file.flush()
        yield file


def _report(
    args: argparse.Namespace,
    checked: Checked,
    signer: str | None,
    where: targets.Collection | None,
    places: list[Place],
) -> int:
    cubes = []
    for number, cube in enumerate(checked.cubes):
        said: dict[str, Any] = {
            "path": cube.path,
            "id": cube.id,
            "files": cube.files,
            "bytes": cube.size,
        }
        if places:
            place = places[number]
            said |= {"place": place.path, "replaces": place.replaces}
            if where is not None and where.mountpoint is not None and not args.dry:
                said["kv"] = _kv_state(os.path.join(where.mountpoint, place.path))
        cubes.append(said)
    if args.json:
        output.print_json(
            {
                "archive": args.archive,
                "loaded": not args.dry,
                "signer": signer,
                "store": where.store if where else None,
                "cubes": cubes,
            }
        )
        return 0
    print(output.table([_row(said) for said in cubes], ("CUBE", "FILES", "SIZE", "")))
    if checked.signature is not None:
        print(f"signed by {output.plain(signer or '')}", file=sys.stderr)
    return 0


def _row(said: dict[str, Any]) -> tuple[str, str, str, str]:
    notes = []
    if said.get("replaces"):
        notes.append("replaces the one that was there")
    if "kv" in said and said["kv"] != "none":
        notes.append(f"KV cache {said['kv']}")
    name = said.get("place", said["path"])
    return name, str(said["files"]), output.size(said["bytes"]), ", ".join(notes)


def _kv_state(cube: str) -> str:
    return os.getxattr(cube, "user.memfs.kv").decode()
