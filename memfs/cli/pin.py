"""``memfs pin``: has cubes stay in the model, by their header; tells a runtime that is running."""

from __future__ import annotations

import argparse
import contextlib
from typing import Any

from memfs.cli import output, targets
from memfs.cli.encode import encode
from memfs.cli.headers import set_state
from memfs.errors import KVCorrupt, KVForeign, KVStale, MemfsError, NotFound
from memfs.runtime.client import RuntimeClient

HELP = "have cubes stay in the model"
EPILOG = """\
examples:
  memfs pin handbook              it is loaded now, and never evicted to make room
  memfs pin --off handbook        it may be evicted again
  memfs pin --json ~/mem/law/*    for a script

It is `"pinned": true` under `state` in the cube's meta.json, and stays so: a model that is started
later loads what is pinned as soon as it is ready. Pinned cubes may take 80% of the budget.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("cubes", nargs="+", metavar="CUBE", help="a path to a cube, or its name")
    parser.add_argument("--off", action="store_true", help="no longer")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    targets.add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    cubes = [targets.cube(given) for given in args.cubes]
    done: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        client = targets.running(targets.config_of(args, cubes))
        if client is not None:
            stack.enter_context(client)
        for cube in cubes:
            said: dict[str, Any] = {"cube": cube.path, "pinned": not args.off}
            if args.off:
                _release(client, cube)
            else:
                said["in_model"] = _pin(client, cube)
            done.append(said)
            if not args.json:
                print(_line(said))
    if args.json:
        output.print_json(done)
    return 0


def _pin(client: RuntimeClient | None, cube: targets.Target) -> dict[str, Any] | None:
    """What was loaded; None where no runtime is running. The model first: it may say no."""
    loaded: dict[str, Any] | None = None
    if client is not None:
        try:
            loaded = client.call("pin", **cube.named())["pinned"]
        except (NotFound, KVStale, KVForeign, KVCorrupt):  # made from the text
            encode(client, cube)
            loaded = client.call("pin", **cube.named())["pinned"]
    try:
        set_state(cube, "pinned", True)
    except (MemfsError, OSError):
        if client is not None:
            client.call("pin", **cube.named(), on=False)
        raise
    return loaded


def _release(client: RuntimeClient | None, cube: targets.Target) -> None:
    set_state(cube, "pinned", False)
    if client is not None:
        client.call("pin", **cube.named(), on=False)


def _line(said: dict[str, Any]) -> str:
    name = output.plain(said["cube"])
    if not said["pinned"]:
        return f"{name}: no longer pinned"
    loaded = said["in_model"]
    if loaded is None:
        return f"{name}: pinned; no model is running, the next one loads it"
    tokens, size = output.number(loaded["tokens"]), output.size(loaded["bytes"])
    return f"{name}: pinned, {tokens} tokens, {size} in the model"
