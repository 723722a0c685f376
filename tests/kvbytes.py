"""A ``kv.safetensors`` from arrays, for tests that have no model, or forge one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xxhash

from memfs.cube import kvfile
from memfs.cube.fingerprint import CHECKSUMS

DTYPES = {"int32": "I32", "int8": "I8", **kvfile.DTYPES}


def kv_bytes(fields: Mapping[str, str], data: Mapping[str, np.ndarray[Any, Any]]) -> bytes:
    """The file of these tensors, in their order.

    Args:
        fields: of the fingerprint; the checksums are right unless they are among them.
    """
    sums = {name: xxhash.xxh3_64_hexdigest(array.tobytes()) for name, array in data.items()}
    header = kvfile.header_bytes(
        {CHECKSUMS: kvfile.checksums_text(sums), **fields},
        {name: (DTYPES[array.dtype.name], array.shape) for name, array in data.items()},
    )
    return header + b"".join(array.tobytes() for array in data.values())
