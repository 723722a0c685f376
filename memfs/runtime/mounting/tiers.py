"""The four places where a memory can be, as ``status`` tells of them. In the event loop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from memfs.config import Config
from memfs.cube.access import Caller
from memfs.errors import MemfsError
from memfs.runtime.cubes import Cube
from memfs.runtime.model.resident import Resident
from memfs.runtime.mounting.memory import Memory
from memfs.runtime.mounting.mounted import Mounted
from memfs.runtime.mounting.page_cache import cached_bytes
from memfs.runtime.mounting.residency import Entry

DEVICE, HOST, PAGE_CACHE, DISK = "device", "host", "page cache", "disk"


def has_host_tier(config: Config, resident: Resident) -> bool:
    """Whether what leaves the device is kept in host memory: on a CPU they are the same."""
    return resident.shape.device.type != "cpu" and config.host_budget_bytes > 0


def tiers(
    config: Config, resident: Resident | None, lines: Iterable[dict[str, Any]]
) -> list[dict[str, Any]]:
    """What of the memories in ``lines`` is in each tier, the fastest first.

    Returns:
        Lines with ``tier``, ``memories``, ``bytes``, ``budget_bytes`` (None where nothing limits
        it) and ``off``: why there is no such tier, or None.
    """
    off = None
    if resident is not None and not has_host_tier(config, resident):
        on_cpu = resident.shape.device.type == "cpu"
        off = "the device's memory is the host's" if on_cpu else "host_budget_bytes is 0"
    budgets = {DEVICE: config.budget_bytes, HOST: config.host_budget_bytes}
    found: dict[str, dict[str, Any]] = {
        tier: {
            "tier": tier,
            "memories": 0,
            "bytes": 0,
            "budget_bytes": budgets.get(tier),
            "off": off if tier == HOST else None,
        }
        for tier in (DEVICE, HOST, PAGE_CACHE, DISK)
    }
    for line in lines:
        found[line["tier"]]["memories"] += 1
        found[line["tier"]]["bytes"] += line["bytes"]
    return list(found.values())


def in_model(mounted: Mounted) -> list[dict[str, Any]]:
    """One line for each memory that is in the model."""
    return [_line(mounted, entry) for entry in mounted.residency]


async def in_model_for(mounted: Mounted, caller: Caller) -> list[dict[str, Any]]:
    """The same for a user: of what he may mount, and without other users' sessions."""
    told = []
    for cube, line in [(e.value.cube, _line(mounted, e)) for e in mounted.residency]:
        if cube is not None and await mounted.in_io(cube.visible, caller):
            own = [uid for uid in line["sessions"] if uid == caller.uid]
            told.append({**line, "sessions": own})
    return told


def _line(mounted: Mounted, entry: Entry[Memory]) -> dict[str, Any]:
    cube = entry.value.cube
    return {
        "cube": cube.path if cube else None,
        "store": str(cube.store.root) if cube else None,
        "kind": "kv" if cube else "placed",
        "tokens": entry.tokens,
        "bytes": entry.value.nbytes,
        "storage": entry.value.storage,
        "tier": DEVICE,
        "hits": entry.hits,
        "composed": entry.value.composed,
        "joint": entry.value.joint,
        "pinned": entry.pinned,
        "protected": entry.protected,
        "sessions": mounted.sessions_with(entry.key),
    }


async def nearby(mounted: Mounted, caller: Caller | None) -> list[dict[str, Any]]:
    """One line for each cube that is not in the model and was lately, or is in a session.

    Args:
        caller: where given, who is told of what is theirs to mount, and of no other session.
    """
    lines = []
    for key, cube in mounted.absent(caller.uid if caller else None).items():
        found = await mounted.in_io(_on_disk, cube, caller)
        if found is None:
            continue
        kept = mounted.host.residency.peek(key) if mounted.host else None
        nbytes, cached = found
        lines.append(
            {
                "cube": cube.path,
                "store": str(cube.store.root),
                "kind": "kv",
                "tokens": kept.tokens if kept else None,
                "bytes": kept.value.nbytes if kept else nbytes,
                "tier": HOST if kept else PAGE_CACHE if cached else DISK,
                "cached_bytes": cached,
            }
        )
    return lines


def _on_disk(cube: Cube, caller: Caller | None) -> tuple[int, int] | None:
    """Bytes of a cube's KV file, and how many of them are in the page cache; None where there is
    none, or the caller may not mount it."""
    try:
        with cube.open(caller, "mount") as files:
            fd, (_, size, *_) = files.open_kv()
            return size, cached_bytes(fd)
    except (MemfsError, OSError):
        return None
