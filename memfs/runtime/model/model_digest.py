"""What a model directory holds, as SHA-256: its weights and its tokenizer, by content, not by name.

The digests stand in every KV cache's fingerprint, so they are wanted at each start of a runtime.
Hashing the default model takes a third of a second, a big one minutes, so the digest of each file
is kept in the cache directory, with all that ``stat`` says of it. Used by the runtime and by
``memfs doctor``. Any thread, any process: the cache is replaced whole, under a lock. No torch.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from memfs.config import cache_dir
from memfs.errors import ModelUnusable

WEIGHTS = "*.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
"""The files that a transformers tokenizer is read from; a directory holds some of them."""

_SETTLED_NS = 2_000_000_000
"""A file changed as lately as this may change again within the clock's grain: it is not kept."""

_Stamp = list[int]


def weights_digest(directory: Path) -> str:
    """SHA-256 over the names and contents of the weight files in ``directory``.

    Raises:
        ModelUnusable: where there are none, or one cannot be read.
    """
    files = sorted(directory.glob(WEIGHTS))
    if not files:
        raise ModelUnusable(f"{directory} holds no weights (no {WEIGHTS})")
    return _digest_of(files)


def tokenizer_digest(directory: Path) -> str:
    """SHA-256 over the names and contents of the tokenizer's files in ``directory``.

    Raises:
        ModelUnusable: where there are none, or one cannot be read.
    """
    files = [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]
    if not files:
        raise ModelUnusable(f"{directory} holds no tokenizer")
    return _digest_of(sorted(files))


def file_digest(path: Path) -> str:
    """SHA-256 of one file's contents, from the cache where the file is still what it was."""
    key = os.path.realpath(path)
    stamp = _stamp(key)
    known = _load().get(key)
    if known is not None and known[:-1] == stamp:
        return str(known[-1])
    with open(key, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if _stamp(key) != stamp:
        raise ModelUnusable(f"{path} changed while it was read")
    if time.time_ns() - max(stamp[1], stamp[3]) > _SETTLED_NS:
        _remember(key, [*stamp, digest])
    return digest


def _digest_of(files: Iterable[Path]) -> str:
    whole = hashlib.sha256()
    try:
        for path in files:
            whole.update(f"{path.name}\0{file_digest(path)}\n".encode())
    except OSError as e:
        raise ModelUnusable(f"{e.filename or path}: {e.strerror}") from e
    return whole.hexdigest()


def _stamp(path: str) -> _Stamp:
    """What changes when a file's contents may have: size, mtime, inode, ctime."""
    found = os.stat(path)
    return [found.st_size, found.st_mtime_ns, found.st_ino, found.st_ctime_ns]


def _cache_file() -> Path:
    return cache_dir() / "digests.json"


def _load() -> dict[str, list[int | str]]:
    """The cache: real path to its stamp and digest. Empty where there is none that can be read."""
    try:
        found = json.loads(_cache_file().read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {k: v for k, v in found.items() if isinstance(v, list) and len(v) == 5}


def _remember(key: str, entry: list[int | str]) -> None:
    """Puts one entry in, leaves out files that are gone, and publishes the cache whole."""
    target = _cache_file()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            known = {k: v for k, v in _load().items() if os.path.exists(k)}
            known[key] = entry
            fd, temporary = tempfile.mkstemp(prefix=".digests-", dir=target.parent)
            with os.fdopen(fd, "w") as file:
                json.dump(known, file)
            os.replace(temporary, target)
    except OSError:
        pass  # the cache saves time; where it cannot be written, the time is spent again
