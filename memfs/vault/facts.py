"""Facts: everything that the files of one cube say of it, as the index keeps it.

``inspect`` reads a cube's files and remembers by which ``Sig`` each was read, so that the next look
reads only what changed and a rescan of a whole store is ``stat`` calls alone. How often a cube was
used is not here (see ``memfs.index``). Used by the index and the filesystem; any thread.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from memfs.cube import adapter, fingerprint, kvfile, layout, metadata
from memfs.cube.acl import Acl
from memfs.errors import (
    AdapterCorrupt,
    InvalidMetadata,
    KVCorrupt,
    KVForeign,
    KVStale,
    NotAllowed,
)
from memfs.vault.rights import read_acl
from memfs.vault.sig import Sig, settled_sig, sig_of
from memfs.vault.store import Store, open_regular_at, read_all

MAX_PAYLOAD = 256 << 20
"""Bytes of text. No digest is made of a longer payload.md, so no KV cache is ready for it."""
MAX_KV = 1 << 40
"""Bytes of a KV cache: a sparse file that claims more is not read through."""

_BLOCK = 1 << 20
_MARKS = (layout.PAYLOAD, layout.KV, layout.ADAPTER, layout.META)


@dataclass(frozen=True)
class CubeFacts:
    """What the files of one cube say; the states are the words of the metadata schema.

    The index keeps it by the names of its fields: a change of them is a new ``FORMAT`` there.
    """

    id: str | None = None
    """From meta.json; the last known one where that is missing or invalid; None before adoption."""
    title: str | None = None
    tags: tuple[str, ...] = ()
    type: str | None = None
    created: str | None = None
    priority: int = 0
    lifecycle: str = "generated"
    frozen: bool = False
    pinned: bool = False
    storage: str = "exact"  # as its KV cache is to be made
    meta_sig: Sig | None = None
    """None where there is no meta.json."""
    meta_reason: str | None = None
    """Why meta.json was not taken, where it is invalid: the fields above are as they last were."""

    uid: int = 0
    """Owner of payload.md; of the directory where there is no text."""
    gid: int = 0
    mode: int = 0
    """Permission bits of the same file."""
    acl: str | None = None
    """POSIX access list of payload.md, in hexadecimal; None where it has none but its mode."""

    payload_state: str = "none"
    """none or ready; a payload.md that is not a regular file is none."""
    payload_bytes: int = 0
    payload_sha256: str | None = None
    """None, too, where the text could not be read or is longer than MAX_PAYLOAD."""
    payload_sig: Sig | None = None

    kv_state: str = "none"
    kv_reason: str | None = None
    kv_bytes: int = 0
    kv_tokens: int | None = None
    kv_storage: str | None = None
    kv_sig: Sig | None = None
    kv_model: dict[str, str] | None = None
    """The model's part of the file's fingerprint: another model is judged by it, the file unread.
    None where the file is missing, damaged or unreadable."""
    kv_payload_sha256: str | None = None
    kv_token_ids_sha256: str | None = None

    adapter_state: str = "none"
    adapter_reason: str | None = None
    adapter_bytes: int = 0
    adapter_sig: Sig | None = None
    """Of its weights."""
    adapter_config_sig: Sig | None = None
    adapter_payload_sha256: str | None = None
    """The text that it was trained on, where its file says so."""

    changed: float = 0.0
    """When a memory of it last changed (meta.json where it has none), seconds since 1970."""

    @property
    def access_list(self) -> Acl | None:
        """``acl``, taken apart; None, too, where it is none that memfs understands."""
        try:
            return Acl.parse(bytes.fromhex(self.acl)) if self.acl else None
        except ValueError:
            return None

    def to_json(self) -> dict[str, Any]:
        """The facts as a JSON object; a field that is as by default is left out."""
        values = ((f, getattr(self, f.name)) for f in _FIELDS)
        return {f.name: value for f, value in values if value != f.default}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CubeFacts:
        """The facts that ``to_json`` gave."""
        values = dict(data)
        for name in _SIGS & values.keys():
            values[name] = Sig(*values[name])
        if "tags" in values:
            values["tags"] = tuple(values["tags"])
        return cls(**values)


_FIELDS = dataclasses.fields(CubeFacts)
_SIGS = frozenset(f.name for f in _FIELDS if f.name.endswith("_sig"))
_DEFAULTS = {f.name: f.default for f in _FIELDS}
_NAMES = tuple(_DEFAULTS)
# The fields that one file fills, as they are where that file is missing.
_NO_META: dict[str, Any] = {n: _DEFAULTS[n] for n in _NAMES[: _NAMES.index("uid")]}
_NO_PAYLOAD: dict[str, Any] = {n: _DEFAULTS[n] for n in _NAMES if n.startswith("payload_")}
_NO_KV: dict[str, Any] = {n: _DEFAULTS[n] for n in _NAMES if n.startswith("kv_")}
_NO_ADAPTER: dict[str, Any] = {n: _DEFAULTS[n] for n in _NAMES if n.startswith("adapter_")}


def inspect(
    store: Store,
    path: str,
    previous: CubeFacts | None,
    model: Mapping[str, str] | None,
    *,
    check_kv: bool = True,
) -> CubeFacts | None:
    """The facts of the cube at ``path``; None where there is none, or none that we may look into.

    Args:
        previous: what was known of it; files whose Sig is the same are not read again.
        model: the resident model's part of the fingerprint; None where no model is known.
        check_kv: without it a KV cache that changed is ``unchecked`` until the next look: its bytes
            may be gigabytes, and a caller that somebody waits for has no time to read them.
    """
    if not path or layout.is_temporary(path):
        return None  # the root is a collection, whatever is in it; and what is not yet published
    try:
        directory = store.open_dir(path)
    except OSError as e:
        if e.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES):
            return None
        raise
    try:
        marks = {name: _status(directory, name) for name in _MARKS}
        found = [status for status in marks.values() if status is not None]
        if not found:
            return None
        facts = _read_meta(directory, marks[layout.META], previous or CubeFacts())
        facts = _read_payload(directory, marks[layout.PAYLOAD], facts)
        facts = _read_kv(directory, marks[layout.KV], facts, check=check_kv)
        facts = _read_adapter(directory, marks[layout.ADAPTER], facts)
        holder = marks[layout.PAYLOAD] or os.fstat(directory)
    finally:
        os.close(directory)
    # Not by the adapter's directory, in which temporary files come and go.
    times = [s.st_mtime for name in (layout.PAYLOAD, layout.KV) if (s := marks[name]) is not None]
    sigs = (facts.adapter_sig, facts.adapter_config_sig)
    times += [sig.mtime_ns / 1e9 for sig in sigs if sig is not None]
    changed = max(times or [status.st_mtime for status in found])
    owner = holder.st_uid, holder.st_gid, stat.S_IMODE(holder.st_mode)
    if (facts.uid, facts.gid, facts.mode, facts.changed) != (*owner, changed):
        facts = replace(facts, uid=owner[0], gid=owner[1], mode=owner[2], changed=changed)
    return judge(facts, model)


def judge(facts: CubeFacts, model: Mapping[str, str] | None) -> CubeFacts:
    """``facts`` with the states of the KV cache and the adapter as they are beside ``model``.

    No file is read. The text comes first: a KV cache of an older text is stale under any model.
    """
    return _judge_adapter(_judge_kv(facts, model))


def with_meta(facts: CubeFacts, meta: metadata.Meta, sig: Sig) -> CubeFacts:
    """``facts`` with what a valid meta.json says."""
    descriptive, state = meta["descriptive"], meta.get("state", {})
    return replace(
        facts,
        id=metadata.cube_id(meta),
        title=descriptive.get("title"),
        tags=tuple(descriptive.get("tags", ())),
        type=descriptive.get("type"),
        created=descriptive.get("created"),
        priority=int(meta.get("governance", {}).get("priority", 0)),
        lifecycle=state.get("lifecycle", "generated"),
        frozen=state.get("frozen", False),
        pinned=state.get("pinned", False),
        storage=metadata.storage(meta),
        meta_sig=sig,
        meta_reason=None,
    )


def _judge_kv(facts: CubeFacts, model: Mapping[str, str] | None) -> CubeFacts:
    if facts.kv_model is None:
        return facts  # nothing to judge: its state says what the file is
    if facts.payload_state == "ready" and facts.payload_sha256 is None:
        return replace(facts, kv_state="unchecked", kv_reason="payload.md has no digest")
    try:
        if facts.payload_sha256 is not None:
            recorded = {"payload_sha256": facts.kv_payload_sha256 or ""}
            fingerprint.require_text(recorded, facts.payload_sha256)
        if model is None or not fingerprint.is_complete(model):
            return replace(facts, kv_state="unchecked", kv_reason=None)
        fingerprint.require_model(facts.kv_model, model)
    except KVStale as e:
        return replace(facts, kv_state="stale", kv_reason=e.detail)
    except KVForeign as e:
        return replace(facts, kv_state="foreign", kv_reason=e.detail)
    return replace(facts, kv_state="ready", kv_reason=None)


def _judge_adapter(facts: CubeFacts) -> CubeFacts:
    if facts.adapter_state not in ("stale", "unchecked"):
        return facts
    text, trained_on = facts.payload_sha256, facts.adapter_payload_sha256
    if text is not None and trained_on is not None and text != trained_on:
        reason = f"payload_sha256 is {trained_on[:12]}… in the file, {text[:12]}… in the text"
        return replace(facts, adapter_state="stale", adapter_reason=reason)
    if facts.adapter_state == "stale":
        return replace(facts, adapter_state="unchecked", adapter_reason=None)
    return facts


def _status(directory: int, name: str) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=directory, follow_symlinks=False)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None


def _unchanged(known: Sig | None, found: os.stat_result | None) -> bool:
    return known == (sig_of(found) if found else None)


def _read_meta(directory: int, found: os.stat_result | None, facts: CubeFacts) -> CubeFacts:
    if _unchanged(facts.meta_sig, found):
        return facts
    if found is None:
        # Without its header a cube keeps its identity, and nothing else that only that file said.
        return replace(facts, **(_NO_META | {"id": facts.id}))
    sig = sig_of(found)
    try:
        fd = open_regular_at(directory, layout.META)
        try:
            sig = settled_sig(os.fstat(fd))
            if sig.size > metadata.MAX_BYTES:
                raise InvalidMetadata(f"{sig.size} bytes; at most {metadata.MAX_BYTES}")
            meta = metadata.parse(read_all(fd, metadata.MAX_BYTES))
        finally:
            os.close(fd)
    except (InvalidMetadata, NotAllowed) as e:
        return replace(facts, meta_sig=sig, meta_reason=e.detail)
    except OSError as e:
        return replace(facts, meta_sig=sig.unsettled(), meta_reason=e.strerror)
    return with_meta(facts, meta, sig)


def _read_payload(directory: int, found: os.stat_result | None, facts: CubeFacts) -> CubeFacts:
    if _unchanged(facts.payload_sig, found):
        return facts
    if found is None:
        return replace(facts, acl=None, **_NO_PAYLOAD)
    if not stat.S_ISREG(found.st_mode):
        return replace(facts, acl=None, **(_NO_PAYLOAD | {"payload_sig": sig_of(found)}))
    sig, digest, acl = sig_of(found), None, None
    try:
        fd = open_regular_at(directory, layout.PAYLOAD)
        try:
            sig = settled_sig(os.fstat(fd))
            digest = _sha256(fd)
            acl = read_acl(fd)
        finally:
            os.close(fd)
    except (OSError, NotAllowed):
        sig = sig.unsettled()
    return replace(
        facts,
        payload_state="ready",
        payload_bytes=sig.size,
        payload_sha256=digest,
        payload_sig=sig,
        acl=acl.hex() if acl else None,
    )


def _read_kv(
    directory: int, found: os.stat_result | None, facts: CubeFacts, *, check: bool
) -> CubeFacts:
    if _unchanged(facts.kv_sig, found):
        return facts
    if found is None:
        return replace(facts, **_NO_KV)
    sig = sig_of(found)
    if not check and facts.kv_sig == sig.unsettled():
        return facts  # read while it was very young: it counts as what it was found to be
    facts = replace(facts, **_NO_KV)
    facts = replace(facts, kv_state="unchecked", kv_bytes=sig.size, kv_sig=sig.unsettled())
    if not check:
        return facts
    try:
        fd = open_regular_at(directory, layout.KV)
        try:
            sig = settled_sig(os.fstat(fd))
            if sig.size > MAX_KV:
                raise KVCorrupt(f"it is {sig.size} bytes long; at most {MAX_KV}")
            header = kvfile.read_header(fd)
            kvfile.check_tensors(fd, header)
        finally:
            os.close(fd)
    except (KVCorrupt, NotAllowed) as e:
        return replace(facts, kv_state="corrupt", kv_reason=e.detail, kv_sig=sig)
    except OSError as e:
        return replace(facts, kv_reason=e.strerror, kv_sig=sig.unsettled())
    return replace(
        facts,
        kv_tokens=header.tokens,
        kv_storage=header.storage,
        kv_bytes=sig.size,
        kv_sig=sig,
        kv_model={name: header.fingerprint[name] for name in fingerprint.MODEL_FIELDS},
        kv_payload_sha256=header.fingerprint["payload_sha256"],
        kv_token_ids_sha256=header.fingerprint["token_ids_sha256"],
    )


def _read_adapter(directory: int, found: os.stat_result | None, facts: CubeFacts) -> CubeFacts:
    """The adapter's weights; what its configuration says is judged where it is mounted."""
    weights = config = None
    if found is not None and stat.S_ISDIR(found.st_mode):
        weights = _status(directory, f"{layout.ADAPTER}/{layout.ADAPTER_WEIGHTS}")
        config = _status(directory, f"{layout.ADAPTER}/{layout.ADAPTER_CONFIG}")
    if not _unchanged(facts.adapter_config_sig, config):
        sig = settled_sig(config) if config else None
        facts = replace(facts, adapter_config_sig=sig)
    if _unchanged(facts.adapter_sig, weights):
        return facts
    facts = replace(facts, **_NO_ADAPTER | {"adapter_config_sig": facts.adapter_config_sig})
    if weights is None:
        return facts
    sig = sig_of(weights)
    facts = replace(facts, adapter_state="unchecked", adapter_bytes=sig.size, adapter_sig=sig)
    try:
        holder = os.open(
            layout.ADAPTER, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=directory
        )
        try:
            fd = open_regular_at(holder, layout.ADAPTER_WEIGHTS)
        finally:
            os.close(holder)
        try:
            sig = settled_sig(os.fstat(fd))
            said = adapter.read_metadata(fd)
        finally:
            os.close(fd)
    except (AdapterCorrupt, NotAllowed) as e:
        return replace(facts, adapter_state="corrupt", adapter_reason=e.detail, adapter_sig=sig)
    except OSError as e:
        return replace(facts, adapter_reason=e.strerror, adapter_sig=sig.unsettled())
    return replace(
        facts,
        adapter_bytes=sig.size,
        adapter_sig=sig,
        adapter_payload_sha256=said.get("payload_sha256"),
    )


def _sha256(fd: int) -> str | None:
    """Digest of an open file, None where it is longer than MAX_PAYLOAD."""
    if os.fstat(fd).st_size > MAX_PAYLOAD:
        return None
    digest, done = hashlib.sha256(), 0
    while part := os.read(fd, _BLOCK):
        done += len(part)
        if done > MAX_PAYLOAD:
            return None
        digest.update(part)
    return digest.hexdigest()
