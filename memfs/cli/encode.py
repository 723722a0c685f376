"""``memfs encode``: makes the KV cache of a cube from its text."""

from __future__ import annotations

import argparse
from typing import Any

from memfs.cli import output, targets
from memfs.cli.headers import set_state
from memfs.cube.fingerprint import STORAGES
from memfs.runtime.client import RuntimeClient

HELP = "make the KV cache of a cube"
EPILOG = """\
examples:
  memfs encode ~/mem/handbook           kv.safetensors for it, if it has none that fits
  memfs encode --force handbook         made anew in any case
  memfs encode ~/mem/notes/*            several, one after another
  memfs encode --storage int8 ~/mem/law half the bytes, from now on

An unchanged beginning of the text is not computed again, where the file is exact. --storage is
written into the cube's meta.json (state.storage): int8 rounds keys and values to 8 bits, so what
the model says with them is very nearly, and no longer exactly, what it says with the text.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("cubes", nargs="+", metavar="CUBE", help="a path to a cube, or its name")
    parser.add_argument("--force", action="store_true", help="even where one is there that fits")
    parser.add_argument(
        "--storage", choices=STORAGES, help="how it is stored, now and later (as meta.json says)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    targets.add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    cubes = [targets.cube(given) for given in args.cubes]
    with targets.runtime(targets.config_of(args, cubes)) as client:
        done = []
        for cube in cubes:
            if args.storage is not None:
                set_state(cube, "storage", args.storage)
            made = encode(client, cube, force=args.force)
            done.append(made)
            if not args.json:
                print(_line(made))
    if args.json:
        output.print_json(done)
    return 0


def encode(
    client: RuntimeClient, cube: targets.Target, *, force: bool = False, mount: bool = False
) -> dict[str, Any]:
    """Has a cube encoded, with a progress bar where somebody is looking; what was done."""
    from tqdm import tqdm  # a tenth of a second that the other commands need not pay

    event: dict[str, Any] = {}
    bar = None
    try:
        for event in client.stream("encode", **cube.named(), force=force, mount=mount):
            if event["event"] != "progress":
                continue
            if bar is None:
                bar = tqdm(
                    total=event["total"], desc=cube.path, unit=" tokens", leave=False, disable=None
                )
            bar.update(event["done"] - bar.n)
    finally:
        if bar is not None:
            bar.close()
    return event


def _line(made: dict[str, Any]) -> str:
    name, tokens = output.plain(made["path"]), output.number(made["tokens"])
    size = output.size(made["bytes"])
    if made["storage"] == "int8":
        size += " as int8"
    if not made["made"]:
        return f"{name}: {tokens} tokens, {size}: there already, and it fits"
    computed = made["tokens"] - made["kept_tokens"]
    rate = computed / made["seconds"] if made["seconds"] else 0
    kept = f", {output.number(made['kept_tokens'])} kept" if made["kept_tokens"] else ""
    return (
        f"{name}: {tokens} tokens, {size} in {output.seconds(made['seconds'])} "
        f"({rate:,.0f} tokens/s{kept})"
    )
