"""What a command's arguments mean: which cube, in which store, and the runtime of which model.

Used by the commands that talk to a runtime; the main thread.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memfs.cli import output
from memfs.config import Config
from memfs.cube import layout
from memfs.errors import NotACube, NotFound, RuntimeUnavailable
from memfs.filesystem import registry
from memfs.runtime.client import RuntimeClient, connect
from memfs.vault.store import Store


@dataclass(frozen=True)
class Target:
    """A cube that was named on the command line."""

    given: str
    store: str
    path: str
    model: str | None
    """The model of the mount it was found in."""

    def named(self) -> dict[str, Any]:
        """As the protocol names a cube."""
        return {"store": self.store, "path": self.path}


@dataclass(frozen=True)
class Collection:
    """A directory that cubes can be put into."""

    store: str
    path: str
    mountpoint: str | None
    """Where the store is mounted."""


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """``--model``, ``--device`` and ``--dtype``: which runtime."""
    parser.add_argument(
        "--model", metavar="MODEL", help="model directory, hub id or .gguf file (configuration)"
    )
    parser.add_argument("--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", metavar="DTYPE", help="auto, float32, bfloat16 or float16")


def config_of(args: argparse.Namespace, targets: list[Target] | None = None) -> Config:
    """The configuration a command is to use: its options, else the mount's model, else the file."""
    model = args.model or next((t.model for t in targets or [] if t.model), None)
    if model is None and not targets:
        mounted = {record.model for record in registry.running()}
        model = mounted.pop() if len(mounted) == 1 else None
    return Config.load(model=model, device=args.device, dtype=args.dtype)


def cube(given: str) -> Target:
    """The cube at a path in a mount or in a store, or of that name in a running mount.

    A file of a cube names the cube. Raises NotACube, saying where it was looked for.
    """
    place = registry.find(given)
    if place is None:
        place = _in_a_mount(given)
    if place is not None:
        record, path = place
        root, model = record.store, record.model
        shown = os.path.join(record.mountpoint, path)
    else:
        root, path = _in_a_store(given)
        model, shown = None, given
    # Through the mount, as far as there is one: where the store lies need not be open to whoever
    # asks. Nor need a mount be, which root is not let into where it is another's.
    tops = [root] if place is None else [place[0].mountpoint, root]
    for candidate in (path, layout.split(path)[0], layout.split(layout.split(path)[0])[0]):
        if candidate and any(_is_cube(os.path.join(top, candidate)) for top in tops):
            return Target(given, root, candidate, model)
    raise NotACube(shown)


def collection(given: str | None) -> Collection:
    """The directory at a path in a mount or a store; without one the current, or the only mount.

    Raises NotFound.
    """
    place = registry.find(given or ".")
    if place is not None:
        record, path = place
        return Collection(record.store, path, record.mountpoint)
    try:
        root, path = _in_a_store(os.path.join(given or ".", "cube"))
    except NotACube:
        mounts = registry.running()
        if given is None and len(mounts) == 1:
            return Collection(mounts[0].store, "", mounts[0].mountpoint)
        raise NotFound(f"{given or 'this directory'} is in no mount and no store") from None
    return Collection(root, layout.split(path)[0], None)


def place(given: str) -> Collection:
    """Where a path is, whatever may be there: see ``collection``; or a name in the only mount."""
    found = registry.find(given) or _in_a_mount(given)
    if found is None:
        return Collection(*_in_a_store(given), None)
    record, path = found
    return Collection(record.store, path, record.mountpoint)


def open_store(root: str) -> Store:
    """A store as its files are to be read and written: through its mount, where it has one."""
    mountpoint = next((r.mountpoint for r in registry.running() if r.store == root), root)
    return Store.open(Path(mountpoint), create_control=mountpoint == root)


def _in_a_mount(given: str) -> tuple[registry.MountRecord, str] | None:
    """The running mount that has something of this name, where the path itself is nothing."""
    if os.path.lexists(given) or os.path.isabs(given):
        return None
    found = [
        r
        for r in registry.running()
        if any(os.path.lexists(os.path.join(top, given)) for top in (r.mountpoint, r.store))
    ]
    return (found[0], os.path.normpath(given)) if len(found) == 1 else None


def _in_a_store(given: str) -> tuple[str, str]:
    """(store, path in it) of a path in a store that is not mounted: one that memfs knows."""
    real = os.path.realpath(given)
    above = os.path.dirname(real)
    while above != "/":
        if os.path.isdir(os.path.join(above, layout.CONTROL)):
            return above, os.path.relpath(real, above)
        above = os.path.dirname(above)
    raise NotACube(f"{given} is in no mount and no store; see memfs status")


def _is_cube(directory: str) -> bool:
    try:
        return layout.is_cube(os.listdir(directory))
    except OSError:
        return False


def runtime(config: Config, *, start: bool = True) -> RuntimeClient:
    """A connection to the configuration's runtime, its model loaded.

    Waits for the model, saying so. Raises RuntimeUnavailable, ModelUnusable.
    """
    client = connect(config, start=start and config.autostart)
    with output.Progress() as progress:
        for event in client.stream("ready"):
            if event.get("event") == "loading":
                progress.update(f"the model is loading: {event['step']}")
    return client


def running(config: Config) -> RuntimeClient | None:
    """A connection to the configuration's runtime, or None where none is running."""
    try:
        return connect(config, start=False)
    except RuntimeUnavailable:
        return None
