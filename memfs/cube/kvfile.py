"""Reading ``kv.safetensors`` without trusting it, and without torch.

The file is an ordinary safetensors file. Tensors: ``token_ids`` (int32, [tokens]) and one
``layers.NNN`` a layer, [2, kv_heads, tokens, head_dim], keys then values, so that a layer is one
contiguous block; in int8 storage its scales stand in front of it (``layer_tensors``). The metadata
is the fingerprint (see ``fingerprint``).

Why a reader and a writer of the header of our own: the blocks are read by ``preadv`` straight into
the buffers that the model attends to, which needs their offsets; the file is somebody else's, may
lie, and may be cut short while it is read; and it is written layer by layer, without a second copy
of the whole cache in memory. Used by the runtime and by the filesystem's check; any thread.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import xxhash

from memfs.cube.fingerprint import (
    CHECKSUMS,
    FIELDS,
    STORAGE,
    STORAGES,
    require_fields,
    require_model,
)
from memfs.errors import KVCorrupt

TOKEN_IDS = "token_ids"
MAX_HEADER = 1 << 20
"""A header of 200 layers takes under 130 kB; a longer one than this is refused unread."""
KEY_SCALES, VALUE_SCALES = ".key_scales", ".value_scales"
"""Behind a layer's name: its scales' in int8 storage."""
KEY_GROUP = 64
"""Tokens whose keys share a scale a channel, in int8 storage."""
BLOCK = 1 << 20
ALIGNMENT = 64
"""Where the data begins, and each layer with it: a copy across cache lines takes a third more."""
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4, "I8": 1}
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

Shapes = dict[str, tuple[str, tuple[int, ...]]]
"""Tensor name to dtype, as safetensors names it, and shape."""


def layer_name(index: int) -> str:
    """Tensor name of a layer."""
    return f"layers.{index:03d}"


def layer_tensors(
    index: int, storage: str, dtype: str, kv_heads: int, tokens: int, head_dim: int
) -> Shapes:
    """What a layer consists of, in the order it stands in.

    Args:
        dtype: of keys and values in exact storage, as safetensors names it.
    """
    name, rows = layer_name(index), (2, kv_heads, tokens, head_dim)
    if storage == "exact":
        return {name: (dtype, rows)}
    groups = -(-tokens // KEY_GROUP)
    return {
        f"{name}{KEY_SCALES}": ("F32", (kv_heads, groups, head_dim)),
        f"{name}{VALUE_SCALES}": ("F32", (kv_heads, tokens)),
        name: ("I8", rows),
    }


@dataclass(frozen=True)
class Tensor:
    """Where a tensor is: ``offset`` and ``nbytes`` in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """A checked header: the fingerprint, the tensors, and their checksums."""

    fingerprint: dict[str, str]
    tensors: dict[str, Tensor]
    checksums: dict[str, str]
    data_offset: int

    @property
    def tokens(self) -> int:
        """Rows in the cache."""
        return self.tensors[TOKEN_IDS].shape[0]

    @property
    def storage(self) -> str:
        """How keys and values are stored."""
        return self.fingerprint[STORAGE]

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values, scales included."""
        return sum(t.nbytes for name, t in self.tensors.items() if name != TOKEN_IDS)


def read_header(fd: int, model: Mapping[str, str] | None = None) -> Header:
    """The header of the open file, all of it checked against itself and against the file's size.

    Every byte counts: a header that says the same in other words is refused, too.

    Args:
        model: the resident model's part of the fingerprint, where it is to be compared: before
            anything is believed, so that a refusal names the field and not what follows from it.

    Raises:
        KVCorrupt, KVForeign: naming what is wrong. Nothing beyond the header is read.
    """
    size = os.fstat(fd).st_size
    start = os.pread(fd, 8, 0)
    if len(start) < 8:
        raise KVCorrupt(f"the file is {size} bytes long")
    (length,) = struct.unpack("<Q", start)
    if length > MAX_HEADER:
        raise KVCorrupt(f"its header says it is {length} bytes long; at most {MAX_HEADER}")
    text = os.pread(fd, length, 8)
    if len(text) < length:
        raise KVCorrupt("it ends within the header")
    try:
        raw = json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as e:
        raise KVCorrupt(f"its header is not JSON ({e})") from e
    if not isinstance(raw, dict):
        raise KVCorrupt("its header is not a JSON object")
    fingerprint = raw.pop("__metadata__", None)
    if not isinstance(fingerprint, dict) or not all(
        isinstance(v, str) for v in fingerprint.values()
    ):
        raise KVCorrupt("its header has no metadata of strings")
    require_fields(fingerprint)
    if model is not None:
        require_model(fingerprint, model)
    tensors = _tensors(raw, data_offset=8 + length, size=size)
    shapes = _checked_shapes(fingerprint, tensors)
    checksums = _checksums(fingerprint, shapes)
    if start + text != header_bytes(fingerprint, shapes):
        raise KVCorrupt("its header is not written as memfs writes it")
    return Header(fingerprint, tensors, checksums, 8 + length)


def header_bytes(
    fingerprint: Mapping[str, str], shapes: Mapping[str, tuple[str, Sequence[int]]]
) -> bytes:
    """The beginning of a file whose tensors follow in the order of ``shapes``, without a gap.

    Args:
        fingerprint: all its fields, in any order.
        shapes: tensor name to (dtype as safetensors names it, shape).
    """
    entries: dict[str, object] = {"__metadata__": {name: fingerprint[name] for name in FIELDS}}
    end = 0
    for name, (dtype, shape) in shapes.items():
        nbytes = math.prod(shape) * ITEM_BYTES[dtype]
        entries[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [end, end + nbytes],
        }
        end += nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)  # safetensors pads to 8
    return struct.pack("<Q", len(text)) + text


def checksums_text(checksums: Mapping[str, str]) -> str:
    """The field of the checksums; they stand in it as the tensors do in the file."""
    return json.dumps(dict(checksums))


def check_tensors(fd: int, header: Header) -> None:
    """Reads every tensor and raises KVCorrupt naming the first whose bytes are not right."""
    for name, tensor in header.tensors.items():
        digest, scales = xxhash.xxh3_64(), name.endswith((KEY_SCALES, VALUE_SCALES))
        for block in _blocks(fd, name, tensor):
            digest.update(block)
            if scales:
                _require_scales(name, block.cast("f"))
        require_checksum(header, name, digest.hexdigest())
    ids = header.tensors[TOKEN_IDS]
    require_token_ids(header, os.pread(fd, ids.nbytes, ids.offset))


def _blocks(fd: int, name: str, tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor, ``BLOCK`` at a time, each in the place of the one before."""
    buffer = memoryview(bytearray(min(BLOCK, tensor.nbytes)))
    for start in range(0, tensor.nbytes, BLOCK):
        block, done = buffer[: tensor.nbytes - start], 0
        while done < len(block):
            count = os.preadv(fd, [block[done:]], tensor.offset + start + done)
            if count == 0:
                raise KVCorrupt(f"it ends within {name}")
            done += count
        yield block


def require_token_ids(header: Header, raw: bytes | bytearray) -> None:
    """Raises KVCorrupt where the bytes read for ``token_ids`` are not those that it says."""
    if hashlib.sha256(raw).hexdigest() != header.fingerprint["token_ids_sha256"]:
        raise KVCorrupt("token_ids do not match token_ids_sha256")


def _require_scales(name: str, scales: memoryview[float]) -> None:
    # What is not finite stays in the sum; that of finite ones cannot overflow, as it is a double.
    if not (math.isfinite(sum(scales)) and min(scales) > 0):
        raise scales_error(name)


def scales_error(name: str) -> KVCorrupt:
    """What is raised for scales that are no scales."""
    return KVCorrupt(f"{name} has one that is not finite and above 0")


def require_checksum(header: Header, name: str, found: str) -> None:
    """Raises KVCorrupt where the bytes read for ``name`` hash to something else than it says."""
    if header.checksums[name] != found:
        raise KVCorrupt(f"the bytes of {name} do not match their checksum")


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands in it twice")
    return found


def _tensors(raw: Mapping[str, object], *, data_offset: int, size: int) -> dict[str, Tensor]:
    """The tensors of the header: known dtypes, honest sizes, no gap or overlap, all in the file."""
    found: dict[str, Tensor] = {}
    for name, entry in raw.items():
        if not isinstance(entry, dict):
            raise KVCorrupt(f"{name[:40]!a} is not described by an object")
        if more := entry.keys() - {"dtype", "shape", "data_offsets"}:
            raise KVCorrupt(f"{name[:40]!a} has {min(more)[:40]!a}, which is none of its fields")
        dtype, shape, span = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
        if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
            raise KVCorrupt(f"dtype of {name[:40]!a} is {str(dtype)[:20]!a}")
        if not _naturals(shape) or not _naturals(span) or len(span) != 2:
            raise KVCorrupt(f"shape or data_offsets of {name[:40]!a} are not natural numbers")
        nbytes = ITEM_BYTES[dtype]
        for extent in shape:
            nbytes *= extent
        if span[1] - span[0] != nbytes:
            raise KVCorrupt(f"data_offsets of {name[:40]!a} do not span its shape")
        found[name] = Tensor(dtype, tuple(shape), data_offset + span[0], nbytes)
    end = data_offset
    for name, tensor in sorted(found.items(), key=lambda item: item[1].offset):
        if tensor.offset != end:
            raise KVCorrupt(f"data_offsets of {name[:40]!a} leave a gap or overlap")
        end += tensor.nbytes
    if end != size:
        raise KVCorrupt(f"the file is {size} bytes long, its tensors end at {end}")
    return found


def _naturals(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 48 for n in value)


def _checked_shapes(fingerprint: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Shapes:
    """What the fingerprint says of every tensor, in their order: it is what they are."""
    numbers = {}
    for name in ("layers", "kv_heads", "head_dim", "token_count", "base_position"):
        text = fingerprint[name]
        if not (text.isascii() and text.isdigit() and len(text) < 10):
            raise KVCorrupt(f"{name} is {text[:40]!a}")
        numbers[name] = int(text)
    dtype, storage = DTYPES.get(fingerprint["dtype"]), fingerprint[STORAGE]
    if dtype is None:
        raise KVCorrupt(f"dtype is {fingerprint['dtype'][:40]!a}")
    if storage not in STORAGES:
        raise KVCorrupt(f"{STORAGE} is {storage[:40]!a}")
    tokens, layers = numbers["token_count"], numbers["layers"]
    sizes = (storage, dtype, numbers["kv_heads"], tokens, numbers["head_dim"])
    if len(tensors) != layers * len(layer_tensors(0, *sizes)) + 1:
        raise KVCorrupt(f"layers is {layers}, tensors are {len(tensors)} ({STORAGE}: {storage})")
    expected: Shapes = {}
    for index in range(layers):
        expected |= layer_tensors(index, *sizes)
    expected[TOKEN_IDS] = ("I32", (tokens,))
    for name, (kind, extents) in expected.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise KVCorrupt(f"it has no tensor {name}")
        if (tensor.dtype, tensor.shape) != (kind, extents):
            raise KVCorrupt(
                f"{name} is {tensor.dtype} {list(tensor.shape)}, where kv_heads, token_count, "
                f"head_dim, dtype and {STORAGE} say {kind} {list(extents)}"
            )
    return expected


def _checksums(fingerprint: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    try:
        found = json.loads(fingerprint[CHECKSUMS])
    except (ValueError, RecursionError) as e:
        raise KVCorrupt(f"{CHECKSUMS} is not JSON") from e
    if not isinstance(found, dict) or found.keys() != set(names):
        raise KVCorrupt(f"{CHECKSUMS} does not name the tensors there are")
    checksums = {name: str(found[name]) for name in names}
    if fingerprint[CHECKSUMS] != checksums_text(checksums):
        raise KVCorrupt(f"{CHECKSUMS} is not written as memfs writes it")
    return checksums
