"""``memfs status``: what is mounted where, and what is in the model."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from memfs.cli import output, targets
from memfs.cube import layout
from memfs.filesystem import registry
from memfs.runtime.client import log_path

HELP = "show what is in the model and what a store holds"
EPILOG = """\
examples:
  memfs status            the running mounts, the model and what is mounted into it
  memfs status ~/mem      of one mount
  memfs status --json     for a script: model, device, mounted, budget_bytes, mounts, …
"""

Facts = dict[str, Any]

_REFUSALS = 3
"""How many refusals are shown, the last ones."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", nargs="?", metavar="DIR", help="a mount, or a path in one")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    targets.add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    records = registry.running()
    if args.directory is not None:
        found = registry.find(args.directory)
        records = [found[0]] if found else []
        if found and args.model is None:
            args.model = found[0].model
    config = targets.config_of(args)
    client = targets.running(config)
    if client is None:
        facts = _stopped(config.model, config.budget_bytes)
    else:
        with client:
            facts = client.call("status", timeout=10)
    facts["mounts"] = [_mount(record) for record in records]
    if args.json:
        output.print_json(facts)
        return 0
    _print(facts, str(log_path(config)))
    return 0


def _stopped(model: str, budget_bytes: int) -> Facts:
    """The same fields where no runtime is running."""
    return {
        "state": "stopped",
        "model": None,
        "wanted_model": model,
        "device": None,
        "mounted": [],
        "nearby": [],
        "tiers": [],
        "rates": None,
        "refusals": [],
        "budget_bytes": budget_bytes,
        "used_bytes": 0,
    }


def _mount(record: registry.MountRecord) -> Facts:
    """One mount, with what its own status says where it can be read."""
    facts: Facts = {"store": record.store, "mountpoint": record.mountpoint, "pid": record.pid}
    try:
        with open(os.path.join(record.mountpoint, layout.CONTROL, "status.json")) as file:
            facts |= json.load(file)
    except (OSError, ValueError) as e:
        facts["error"] = f"its status cannot be read: {e}"
    return facts


def _print(facts: Facts, log: str) -> None:
    for mount in facts["mounts"]:
        cubes = mount.get("index", {}).get("cubes")
        noun = "cube" if cubes == 1 else "cubes"
        count = "" if cubes is None else f"  {output.number(cubes)} {noun}"
        print(f"{output.plain(mount['mountpoint'])}  on {output.plain(mount['store'])}{count}")
        headers = [found for found in mount.get("refusals", ()) if found.get("kind") == "meta"]
        for refusal in headers[-_REFUSALS:]:
            _print_refusal(refusal["path"], refusal)
    if not facts["mounts"]:
        print("no store is mounted (memfs mount STORE DIR)")
    if facts["state"] == "stopped":
        print(f"model {facts['wanted_model']}: not running; it starts when it is first needed")
        return
    print(_model_line(facts))
    if facts.get("error"):
        print(output.styled(f"  {facts['error']}", "red") + f"  (log: {log})")
    used, budget = output.size(facts["used_bytes"]), output.size(facts["budget_bytes"])
    print(f"mounted into the model: {used} of {budget}")
    for tier in facts["tiers"]:
        if tier["tier"] == "host":
            print(_host_line(tier))
    if facts.get("ahead") and facts["ahead"]["prefetched"]:
        ahead = facts["ahead"]
        print(f"read ahead: {ahead['prefetched']} cubes, {ahead['used']} of them used since")
    rows = [*map(_row, facts["mounted"]), *map(_row_nearby, facts["nearby"])]
    if rows:
        print(output.table(rows, ("cube", "kind", "tokens", "bytes", "tier", "hits", "")))
    for refusal in facts["refusals"][-_REFUSALS:]:
        _print_refusal(refusal["cube"], refusal)


def _print_refusal(cube: str, refusal: Facts) -> None:
    name, reason = output.plain(cube), output.plain(refusal["reason"])
    print(f"refused {name} at {refusal['time']}: {reason}")


def _model_line(facts: Facts) -> str:
    line = f"model {facts['model']}: {facts['state']}"
    if facts.get("device"):
        line += f", {facts['dtype']} on {facts['device']}"
        line += f", context {output.number(facts['context'])} tokens"
        line += f", loaded in {output.seconds(facts['load_s'])}"
    return line


def _host_line(tier: Facts) -> str:
    if tier["off"]:
        return f"kept in host memory: nothing; {tier['off']}"
    used, budget = output.size(tier["bytes"]), output.size(tier["budget_bytes"])
    return f"kept in host memory: {used} of {budget}"


def _row_nearby(line: Facts) -> tuple[str, ...]:
    """A memory that is not in the model and could soon be."""
    tier = line["tier"]
    if tier == "page cache" and line["cached_bytes"] < line["bytes"]:
        tier = f"page cache {line['cached_bytes'] / line['bytes']:.0%}"
    tokens = "" if line["tokens"] is None else output.number(line["tokens"])
    return line["cube"], line["kind"], tokens, output.size(line["bytes"]), tier, "", ""


def _row(line: Facts) -> tuple[str, ...]:
    marks = [mark for mark in ("pinned", "protected") if line[mark]]
    if line["storage"] == "int8":
        marks.append("int8")
    if line["composed"]:
        marks.append(line["composed"])
    if line["joint"] is not None:
        marks.append(f"exact: {line['joint']:.0%} done")
    return (
        line["cube"] or "(several, placed together)",
        line["kind"],
        output.number(line["tokens"]),
        output.size(line["bytes"]),
        line["tier"],
        output.number(line["hits"]),
        ", ".join(marks),
    )
