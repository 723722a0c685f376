"""Which libfuse is used, and whether it and the kernel can pass reads through.

With passthrough the kernel reads a file of the store by itself for whoever has it open in the
mount: at the disk's own speed, cached once, and nobody in between. It needs libfuse 3.17, Linux 6.9
and the right to administrate. Used by ``fuse`` and ``memfs doctor``; any thread.
"""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

SONAMES = ("libfuse3.so.4", "libfuse3.so.3")
"""The newest first. FUSE_LIBRARY_PATH, where it is set, names another."""

PASSTHROUGH_LIBFUSE = (3, 17)
PASSTHROUGH_LINUX = (6, 9)
CAP_SYS_ADMIN = 21


def find() -> str | None:
    """The name by which the library is loaded; None where there is none."""
    chosen = os.environ.get("FUSE_LIBRARY_PATH")
    for name in (chosen,) if chosen else SONAMES:
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return name
    return None


def version(name: str) -> tuple[int, int]:
    """Major and minor version of the library."""
    number = int(ctypes.CDLL(name).fuse_version())
    return divmod(number, 10) if number < 100 else divmod(number, 100)


def no_passthrough(library: tuple[int, int]) -> str:
    """Why files cannot be passed through with this version of libfuse; "" where they can."""
    if library < PASSTHROUGH_LIBFUSE:
        return f"libfuse {_dotted(library)} is older than {_dotted(PASSTHROUGH_LIBFUSE)}"
    release = os.uname().release
    found = re.match(r"(\d+)\.(\d+)", release)
    if found is None or (int(found[1]), int(found[2])) < PASSTHROUGH_LINUX:
        return f"Linux {release} is older than {_dotted(PASSTHROUGH_LINUX)}"
    if not capabilities() >> CAP_SYS_ADMIN & 1:
        return "only root may (CAP_SYS_ADMIN)"
    return ""


def capabilities() -> int:
    """The effective capabilities of this process, as a bit mask."""
    match = re.search(r"^CapEff:\s*([0-9a-f]+)", Path("/proc/self/status").read_text(), re.M)
    return int(match[1], 16) if match else 0


def _dotted(numbers: tuple[int, int]) -> str:
    return f"{numbers[0]}.{numbers[1]}"
