"""Reading the header of an adapter's weights without trusting it.

The file is what PEFT writes: an ordinary safetensors file. ``safetensors`` itself checks its header
(bounds, dtypes, no gap, no overlap), by ``pread``: a file cut short under a mapping would kill the
process. Used by the vault; any thread.
"""

from __future__ import annotations

import os
import struct

from memfs.errors import AdapterCorrupt

MAX_HEADER = 8 << 20
"""A LoRA on every matrix of a 200-layer model takes under 1 MB; a longer header is not read."""


def read_metadata(fd: int) -> dict[str, str]:
    """The metadata in the open file's header, which is checked against itself and the file's size.

    Raises AdapterCorrupt, saying what is wrong.
    """
    from safetensors import SafetensorError, safe_open  # not needed where there is no adapter

    start = os.pread(fd, 8, 0)
    if len(start) < 8:
        raise AdapterCorrupt(f"the file is {os.fstat(fd).st_size} bytes long")
    (length,) = struct.unpack("<Q", start)
    if length > MAX_HEADER:
        raise AdapterCorrupt(f"its header says it is {length} bytes long; at most {MAX_HEADER}")
    try:
        with safe_open(f"/proc/self/fd/{fd}", framework="numpy", backend="pread") as opened:
            return dict(opened.metadata() or {})
    except (SafetensorError, UnicodeDecodeError) as e:
        raise AdapterCorrupt(str(e)) from e


def is_whole(fd: int) -> bool:
    """Whether the open file is a safetensors file (an adapter or not) that ends where it says."""
    try:
        read_metadata(fd)
    except AdapterCorrupt:
        return False
    return True
