"""What the kernel knows of a process: of one that asks its groups, and the context that it runs in;
of our own its age.

The **calling context** is the unit that a process was started in: the first part of its control
group's path, from the root, that ends in ``.service`` or ``.scope``. Only root puts processes there
and takes them out; what a user makes within the part that was handed to them
(``user@1000.service/…``) is not looked at, so nobody can claim a context by a name. Any thread.
"""

from __future__ import annotations

import os
import time

_DAC = 1 << 1 | 1 << 2
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
_UNITS = (".service", ".scope")


def groups_of(pid: int) -> frozenset[int] | None:
    """The supplementary groups of a process; None where it has ended."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            for line in file:
                if line.startswith(b"Groups:"):
                    return frozenset(map(int, line.split()[1:]))
    except OSError:
        pass
    return None


def overrides(pid: int) -> bool:
    """Whether a process may read, write or search what it has no right to (CAP_DAC_*)."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            for line in file:
                if line.startswith(b"CapEff:"):
                    return bool(int(line.split()[1], 16) & _DAC)
    except OSError:
        pass
    return False


def context_of(pid: int) -> str | None:
    """The calling context of a process; None where it runs in none, or has ended."""
    try:
        with open(f"/proc/{pid}/cgroup", encoding="utf-8", errors="surrogateescape") as file:
            return unit_in(file.read())
    except OSError:
        return None


def unit_in(text: str) -> str | None:
    """The unit that ``/proc/PID/cgroup`` tells of.

    Of version 2 of control groups, else of systemd's own hierarchy of version 1. The others are
    not asked: they may put a process elsewhere.
    """
    paths: dict[str, str] = {}
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if (number, controllers) == ("0", "") or controllers == "name=systemd":
            paths[controllers] = path
    for controllers in ("", "name=systemd"):
        for part in paths.get(controllers, "").split("/"):
            if part == "..":
                break  # outside of what we see of the tree
            if part.endswith(_UNITS) and part not in _UNITS:
                return part
    return None


def age() -> float:
    """Seconds since this process was started, its imports included."""
    with open("/proc/self/stat") as file:
        ticks = int(file.read().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
