"""``memfs attach``: puts a cube's KV cache into the model by name, without reading the file."""

from __future__ import annotations

import argparse

from memfs.cli import output, targets
from memfs.cli.encode import encode
from memfs.errors import KVCorrupt, KVForeign, KVStale, NotFound

HELP = "put a cube into the model by name"
EPILOG = """\
examples:
  memfs attach handbook            as `cat handbook/kv.safetensors > /dev/null` does
  memfs attach --pin handbook      and it stays, whatever else is read
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("cubes", nargs="+", metavar="CUBE", help="a path to a cube, or its name")
    parser.add_argument("--pin", action="store_true", help="never evict it to make room")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    targets.add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    cubes = [targets.cube(given) for given in args.cubes]
    done = []
    with targets.runtime(targets.config_of(args, cubes)) as client:
        for cube in cubes:
            try:
                reply = client.call("mount", **cube.named(), pin=args.pin)
            except (NotFound, KVStale, KVForeign, KVCorrupt):  # made from the text
                encode(client, cube)
                reply = client.call("mount", **cube.named(), pin=args.pin)
            mounted = reply["mounted"]
            done.append(mounted)
            if not args.json:
                tokens, size = output.number(mounted["tokens"]), output.size(mounted["bytes"])
                print(f"{output.plain(mounted['cube'])}: {tokens} tokens, {size} in the model")
    if args.json:
        output.print_json(done)
    return 0
