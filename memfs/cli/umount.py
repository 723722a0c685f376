"""``memfs umount``: the end of a mount, waited for."""

from __future__ import annotations

import argparse

from memfs.cli import output
from memfs.filesystem.mount import umount

HELP = "end a mount"
EPILOG = """\
examples:
  memfs umount ~/mem
  memfs umount --lazy ~/mem    also where it is in use: it ends when the last user closes it

Returns when the mount has ended and the usage counters are in the cubes' headers.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("mountpoint", metavar="DIR", help="where it is mounted")
    parser.add_argument("-z", "--lazy", action="store_true", help="do not mind who uses it")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    umount(args.mountpoint, lazy=args.lazy)
    if args.json:
        output.print_json({"unmounted": args.mountpoint})
    return 0
