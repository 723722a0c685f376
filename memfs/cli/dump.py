"""``memfs dump``: cubes as one file that any machine can check and unpack."""

from __future__ import annotations

import argparse
import contextlib
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from memfs.cli import output, targets
from memfs.cube import layout
from memfs.cube.access import Caller
from memfs.errors import InvalidRequest, NotAllowed
from memfs.operation.governance import Governed, denial, granted_by
from memfs.vault.archive import signing
from memfs.vault.archive.dump import Choice, Dump, Source
from memfs.vault.identity import read_meta
from memfs.vault.store import Store

HELP = "write cubes into an archive"
EPILOG = """\
examples:
  memfs dump ~/mem/handbook -o handbook.tar            for memfs load, anywhere
  memfs dump ~/mem/notes/* -o notes.tar --sign         signed by your own ssh key
  memfs dump handbook -o - --redact --text-only | ssh other memfs load - mem

  tar xf handbook.tar && sha256sum -c SHA256SUMS       unpacked and checked without memfs
  ssh-keygen -Y verify -n memfs -f allowed_signers -I ann@example.org \\
      -s SHA256SUMS.sig < SHA256SUMS                   and its signature

The archive is an uncompressed tar. The same cubes give the same file, and a dump mounts, makes and
counts nothing. Owners do not travel: who loads a cube owns it. Links are left out, and named.

--redact leaves out the access list, the machine it comes from, what it was copied from, counters
and times of use, earlier texts' digests, unknown keys of meta.json, and files that are no memory. A
cube that is confidential or secret is then refused. The text itself is never changed.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("cubes", nargs="+", metavar="CUBE", help="a path to a cube, or its name")
    parser.add_argument(
        "-o", "--output", required=True, metavar="FILE", help="the archive; - is standard output"
    )
    parser.add_argument(
        "--sign",
        nargs="?",
        const="",
        metavar="KEY",
        help="sign it with this ssh key, a public one where an agent has the private; "
        "without KEY your own in ~/.ssh (write --sign last, or --sign=KEY)",
    )
    parser.add_argument("--redact", action="store_true", help="leave out what is not for others")
    parser.add_argument(
        "--text-only", action="store_true", help="leave out kv.safetensors and adapter/"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    to_stdout = args.output == "-"
    if to_stdout and args.json:
        raise InvalidRequest("--json and -o - both write to standard output")
    if to_stdout and sys.stdout.isatty():
        raise InvalidRequest("an archive is nothing to read on a terminal: -o FILE")
    sign = None if args.sign is None else _signer(args.sign)
    named = [targets.cube(given) for given in args.cubes]
    choice = Choice(redacted=args.redact, text_only=args.text_only)
    with contextlib.ExitStack() as stack:
        stores: dict[str, Store] = {}
        for target in named:
            if target.store not in stores:
                stores[target.store] = stack.enter_context(targets.open_store(target.store))
        progress = stack.enter_context(output.Progress())
        sources = [Source(stores[target.store], target.path) for target in named]
        for source in sources:
            _require_share(source)
        dump = Dump(sources, choice, lambda done: progress.update(f"{output.size(done)} read"))
        out = stack.enter_context(_stdout() if to_stdout else _published(Path(args.output)))
        size = dump.write(out, sign)
    for path in dump.left_out:
        print(f"left out: {output.plain(path)} is no file or directory", file=sys.stderr)
    if args.json:
        output.print_json(
            {
                "archive": args.output,
                "bytes": size,
                "signed": sign is not None,
                "left_out": dump.left_out,
                "cubes": [_said(cube) for cube in dump.cubes],
            }
        )
    elif not to_stdout:
        count = f"{len(dump.cubes)} cubes" if len(dump.cubes) > 1 else "1 cube"
        print(f"{args.output}: {count}, {output.size(size)}")
    return 0


def _require_share(source: Source) -> None:
    """Raises NotAllowed where the cube's access list lets others share it, and not the caller."""
    caller = Caller.of_process(os.getuid(), os.getgid(), os.getpid())
    text = layout.join(source.path, layout.PAYLOAD)
    try:
        access = read_meta(source.store, source.path).get("governance", {}).get("access", [])
        owner = source.store.stat(text).st_uid
    except FileNotFoundError:
        return  # no header, so no list; or no text: there is nobody whose it is
    why = denial(caller, "share", Governed(owner, readable=True, granted=granted_by(access)))
    if why is not None:
        raise NotAllowed(f"{source.path}: {why}")


def _said(cube: Any) -> dict[str, Any]:
    return {"path": cube.path, "id": cube.id, "files": cube.files, "bytes": cube.size}


def _signer(key: str) -> Callable[[bytes], bytes]:
    path = Path(key) if key else signing.default_key()
    if not path.exists():
        raise InvalidRequest(f"{key} is no ssh key; write --sign last, or --sign=KEY")
    return lambda sums: signing.sign(sums, path)


@contextlib.contextmanager
def _stdout() -> Iterator[BinaryIO]:
    yield sys.stdout.buffer
    sys.stdout.buffer.flush()


@contextlib.contextmanager
def _published(path: Path) -> Iterator[BinaryIO]:
    """A file that is there, whole, once all is written; a device or pipe is written as it is."""
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        with open(path, "wb") as file:
            yield file
        return
    # Only for its owner: what it is made of may be.
    with tempfile.NamedTemporaryFile(
        dir=path.parent, prefix=f".{path.name[:40]}.", delete=False
    ) as file:
        try:
            yield file  # type: ignore[misc]
            file.flush()
            os.fsync(file.fileno())
            os.rename(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
