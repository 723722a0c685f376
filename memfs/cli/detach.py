"""``memfs detach``: takes cubes out of the model."""

from __future__ import annotations

import argparse

from memfs.cli import output, targets
from memfs.errors import RuntimeUnavailable

HELP = "take a cube out of the model"
EPILOG = """\
examples:
  memfs detach handbook
  memfs detach --all
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("cubes", nargs="*", default=[], metavar="CUBE", help="a path, or its name")
    what.add_argument("--all", action="store_true", help="everything you have mounted")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    targets.add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    cubes = [targets.cube(given) for given in args.cubes]
    client = targets.running(targets.config_of(args, cubes))
    if client is None:
        raise RuntimeUnavailable("so nothing is in the model")
    gone: list[str] = []
    with client:
        requests = [cube.named() for cube in cubes] or [{}]
        for request in requests:
            gone += client.call("unmount", **request)["unmounted"]
    if args.json:
        output.print_json(gone)
    else:
        for path in gone:
            print(f"{output.plain(path)}: out of the model")
    return 0
