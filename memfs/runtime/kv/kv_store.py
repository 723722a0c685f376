"""``kv.safetensors`` to KV cache and back: checked in full on the way in, published whole.

Reading goes layer by layer from the file straight into the buffers the model attends to, and each
piece is hashed while it is still in the processor's cache; on an accelerator through one pair of
pinned buffers, one being read while the other is copied. A layer in int8 storage is read into a
buffer of one layer, and computed from there into its place. The file is never mapped: one that is
cut short while it is read is then an error, not a bus error. Used by the service, in its I/O
threads.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterator, Sequence

import torch
import xxhash

from memfs.cube.fingerprint import CHECKSUMS, STORAGE, require_text
from memfs.cube.kvfile import (
    DTYPES,
    KEY_SCALES,
    TOKEN_IDS,
    VALUE_SCALES,
    Header,
    checksums_text,
    header_bytes,
    layer_name,
    read_header,
    require_checksum,
    require_token_ids,
)
from memfs.errors import KVCorrupt
from memfs.runtime.kv.int8 import Packed, pack, require_scales, unpack
from memfs.runtime.model.kv_cache import KVCache
from memfs.runtime.model.resident import Resident, ids_digest

ROOM = 512
"""Rows of room behind a mounted memory, for a question and its answer."""
PIECE = 512 << 10
"""Bytes that are read and then hashed while they are in the processor's second cache."""

_DTYPE_NAMES = {
    **{getattr(torch, name): short for name, short in DTYPES.items()},
    torch.int32: "I32",
    torch.int8: "I8",
}


def read(
    fd: int, resident: Resident, payload_sha256: str | None, *, room: int = ROOM
) -> tuple[KVCache, list[int]]:
    """The KV cache in an open file, [preamble | cube], and the cube's token ids.

    Args:
        payload_sha256: of the text it must have been made from; None accepts any.

    Raises:
        KVCorrupt, KVForeign, KVStale: naming the first field or tensor that is not right.
    """
    header = fit(fd, resident, payload_sha256)
    ids = _token_ids(fd, header)
    rows = resident.base + header.tokens + room
    if resident.shape.device.type == "cuda":
        cache = KVCache(resident.shape, rows)
        cache.append(resident.preamble)
        _read_through_pinned(fd, header, cache)
    else:
        cache = KVCache.in_spare_memory(resident.shape, rows)
        cache.append(resident.preamble)
        if header.storage == "int8":
            _read_int8(fd, header, cache)
        else:
            for index, layer in enumerate(cache.layers):  # one thread: two are no faster (measured)
                _read_rows(fd, header, index, layer, cache.length)
    cache.length += header.tokens
    return cache, ids


def fit(fd: int, resident: Resident, payload_sha256: str | None) -> Header:
    """The header of a file whose fingerprint fits this model and text; its data is not read.

    Raises:
        KVCorrupt, KVForeign, KVStale: naming the first field that is not right.
    """
    header = read_header(fd, resident.fingerprint)
    if header.tokens > resident.context:  # a file with holes costs nothing to make
        raise KVCorrupt(f"token_count is {header.tokens}; the model takes {resident.context}")
    if payload_sha256 is not None:
        require_text(header.fingerprint, payload_sha256)
    return header


def write(
    fd: int,
    cache: KVCache,
    resident: Resident,
    ids: Sequence[int],
    payload_sha256: str,
    storage: str = "exact",
) -> int:
    """Writes the cube's rows of ``cache`` to an empty file; gives its size in bytes.

    Args:
        cache: [preamble | cube], the cube's rows being those of ``ids``.
        storage: one of STORAGES.

    Raises MemfsError where rows are to be stored in int8 and are not finite.
    """
    rows = slice(resident.base, resident.base + len(ids))

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for index, layer in enumerate(cache.layers):
            name, exact = layer_name(index), layer[:, :, rows].cpu().contiguous()
            if storage == "int8":
                packed = pack(exact)
                yield f"{name}{KEY_SCALES}", packed.key_scales
                yield f"{name}{VALUE_SCALES}", packed.value_scales
                exact = packed.integers
            yield name, exact
        # Last: their length is any, and the layers are to stand at whole cache lines (ALIGNMENT).
        yield TOKEN_IDS, torch.tensor(ids, dtype=torch.int32)

    shapes: dict[str, tuple[str, Sequence[int]]] = {}
    checksums = {}
    for name, tensor in tensors():
        shapes[name] = (_DTYPE_NAMES[tensor.dtype], tensor.shape)
        checksums[name] = xxhash.xxh3_64_hexdigest(_bytes_of(tensor))
    fingerprint = {
        **resident.fingerprint,
        "token_count": str(len(ids)),
        "token_ids_sha256": ids_digest(ids),
        "payload_sha256": payload_sha256,
        STORAGE: storage,
        CHECKSUMS: checksums_text(checksums),
    }
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(header_bytes(fingerprint, shapes))
        for _, tensor in tensors():
            file.write(_bytes_of(tensor))
    return os.fstat(fd).st_size


def _token_ids(fd: int, header: Header) -> list[int]:
    raw = bytearray(header.tensors[TOKEN_IDS].nbytes)
    _read_tensor(fd, header, TOKEN_IDS, [memoryview(raw)])
    require_token_ids(header, raw)
    return [number for (number,) in struct.iter_unpack("<i", raw)]


def _read_rows(fd: int, header: Header, index: int, layer: torch.Tensor, start: int) -> None:
    """Reads a layer's rows into its buffer, from row ``start`` on."""
    row = layer.shape[-1] * layer.itemsize
    heads = layer.view(torch.uint8).view(-1, layer.shape[2] * row).numpy()
    span = slice(start * row, (start + header.tokens) * row)
    _read_tensor(fd, header, layer_name(index), [memoryview(head[span]) for head in heads])


def _read_tensor(fd: int, header: Header, name: str, views: list[memoryview]) -> None:
    """Reads a tensor into ``views``, pieces of it in order, and checks its checksum."""
    digest, offset = xxhash.xxh3_64(), header.tensors[name].offset
    for view in views:
        for start in range(0, len(view), PIECE):
            piece = view[start : start + PIECE]
            _read_exactly(fd, piece, offset, name)
            digest.update(piece)
            offset += len(piece)
    require_checksum(header, name, digest.hexdigest())


def _read_int8(fd: int, header: Header, cache: KVCache) -> None:
    """Fills the layers of a cache on a CPU from int8 storage, through a buffer of one layer."""
    shape = cache.shape
    rows = slice(cache.length, cache.length + header.tokens)
    staged = torch.empty(header.kv_bytes // shape.layers, dtype=torch.uint8)
    scratch = torch.empty(header.tokens, shape.head_dim)
    for index, layer in enumerate(cache.layers):
        _read_layer(fd, header, index, staged)
        unpack(_packed(staged, header), layer[:, :, rows], scratch)


def _read_layer(fd: int, header: Header, index: int, staged: torch.Tensor) -> None:
    """Reads a layer as it is stored into a buffer of its bytes, and checks it."""
    name = layer_name(index)
    if header.storage == "exact":
        _read_tensor(fd, header, name, [_bytes_of(staged)])
        return
    packed = _packed(staged, header)
    for part, tensor in (
        (f"{name}{KEY_SCALES}", packed.key_scales),
        (f"{name}{VALUE_SCALES}", packed.value_scales),
        (name, packed.integers),
    ):
        _read_tensor(fd, header, part, [_bytes_of(tensor)])
        if tensor.dtype == torch.float32:
            require_scales(tensor, part)


def _packed(staged: torch.Tensor, header: Header) -> Packed:
    """The parts of an int8 layer in a buffer that holds its bytes, on whatever device."""
    name = layer_name(0)  # all have the same shapes
    keys, values, integers = (
        header.tensors[part] for part in (f"{name}{KEY_SCALES}", f"{name}{VALUE_SCALES}", name)
    )
    parts = staged.split([keys.nbytes, values.nbytes, integers.nbytes])
    return Packed(
        parts[0].view(torch.float32).view(keys.shape),
        parts[1].view(torch.float32).view(values.shape),
        parts[2].view(torch.int8).view(integers.shape),
    )


def _read_through_pinned(fd: int, header: Header, cache: KVCache) -> None:
    """Fills the layers of a cache on an accelerator, reading one while the other is copied."""
    shape = cache.shape
    nbytes = header.kv_bytes // shape.layers
    size = (2, shape.kv_heads, header.tokens, shape.head_dim)
    rows = slice(cache.length, cache.length + header.tokens)
    stream = torch.cuda.Stream(shape.device)
    # A forward that is queued may still write to what was its memory and is this cache's now.
    stream.wait_stream(torch.cuda.current_stream(shape.device))
    with _pinned.lock, torch.cuda.stream(stream):
        if header.storage == "int8":  # computed from there, one layer after another in the stream
            there = torch.empty(nbytes, dtype=torch.uint8, device=shape.device)
            scratch = torch.empty(size[2:], device=shape.device)
        staged = _pinned.pair(nbytes)
        copied = [torch.cuda.Event() for _ in staged]
        for index, layer in enumerate(cache.layers):
            buffer, done = staged[index % 2], copied[index % 2]
            done.synchronize()  # the copy out of this buffer, two layers ago
            _read_layer(fd, header, index, buffer)
            if header.storage == "int8":
                there.copy_(buffer, non_blocking=True)
                done.record(stream)
                unpack(_packed(there, header), layer[:, :, rows], scratch)
            else:
                layer[:, :, rows].copy_(buffer.view(shape.dtype).view(size), non_blocking=True)
                done.record(stream)
        stream.synchronize()


class _Pinned:
    """Two pinned buffers, kept from one mount to the next: pinning memory takes milliseconds."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        """Held while they are in use."""
        self._buffers: list[torch.Tensor] = []

    def pair(self, nbytes: int) -> list[torch.Tensor]:
        """Two buffers of ``nbytes`` bytes each, uint8."""
        if not self._buffers or self._buffers[0].numel() < nbytes:
            self._buffers.clear()
            self._buffers = [
                torch.empty(nbytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)
            ]
        return [buffer[:nbytes] for buffer in self._buffers]


_pinned = _Pinned()


def _read_exactly(fd: int, view: memoryview, offset: int, name: str) -> None:
    while view:
        count = os.preadv(fd, [view], offset)
        if count == 0:
            raise KVCorrupt(f"it ends within {name}")
        view, offset = view[count:], offset + count


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared with it."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
