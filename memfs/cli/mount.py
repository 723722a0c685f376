"""``memfs mount``: a store of MemCubes as files, with the model behind them."""

from __future__ import annotations

import argparse
import re
from dataclasses import asdict
from pathlib import Path

from memfs.cli import output
from memfs.config import Config
from memfs.errors import InvalidRequest
from memfs.filesystem.mount import Wanted, mount

HELP = "mount a store of MemCubes on a directory"
EPILOG = """\
examples:
  memfs mount ~/store ~/mem                      the store's memories as files
  memfs mount -o mount_on_read=off ~/store ~/mem reading a KV cache puts nothing into the model
  memfs mount --model ./my-model ~/store ~/mem   for another model than the configured one
  memfs mount -f ~/store ~/mem                   stay in the foreground

Returns when the mount can be used. The store and the mountpoint are made where they are missing.
A store that cannot be written (a read-only disk, no right to its directory) is mounted read-only.
A mount by root is for every user, with the files' own permissions; a mount by anybody else is
for that user alone, unless -o allow_other is given (and /etc/fuse.conf has user_allow_other).
End it with memfs umount, fusermount3 -u or umount.

options for -o:
  mount_on_read=on|off   whether reading kv.safetensors or an adapter mounts it into the model
  ro                     no writes
  allow_other, ...       any other option of FUSE's
"""

_OPTION = re.compile(r"[a-z][a-z0-9_]*")
_RESERVED = ("fsname", "subtype", "default_permissions")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", help="directory that holds the cubes")
    parser.add_argument("mountpoint", metavar="DIR", help="empty directory to mount it on")
    parser.add_argument("-f", "--foreground", action="store_true", help="stay in the foreground")
    parser.add_argument(
        "-o", action="append", default=[], metavar="OPT,...", dest="options", help="see below"
    )
    parser.add_argument(
        "--model", metavar="MODEL", help="model directory, hub id or .gguf file (configuration)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    options = parse_options(args.options)
    on_read = options.pop("mount_on_read", None)
    if on_read is True:
        raise InvalidRequest("-o mount_on_read wants =on or =off")
    config = Config.load(model=args.model, mount_on_read=on_read)
    wanted = Wanted(Path(args.store), args.mountpoint, config, options)
    record = mount(wanted, foreground=args.foreground)
    note = ", read-only: the store cannot be written" if record.read_only else ""
    if args.json:
        output.print_json(asdict(record))
    elif not args.foreground:
        print(f"{output.plain(record.store)} is mounted at {output.plain(record.mountpoint)}{note}")
    return 0


def parse_options(given: list[str]) -> dict[str, str | bool]:
    """``-o`` options: a value after ``=``, True without one."""
    options: dict[str, str | bool] = {}
    for part in (part for text in given for part in text.split(",") if part):
        name, separator, value = part.partition("=")
        if not _OPTION.fullmatch(name) or name in _RESERVED:
            raise InvalidRequest(f"-o {part}: there is no such option")
        options[name] = value if separator else True
    return options
