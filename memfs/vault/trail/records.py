"""The audit trail on disk: its lines, reading them, and whether the chain is whole.

``STORE/.memfs/trail/`` holds files of JSON lines, each named by the number of its first line. A
line is ``{"seq": …, "time": …, "event": …, …, "prev": …, "hash": …}``: ``seq`` counts from 1,
``prev`` is the hash of the line before, and ``hash`` the SHA-256 of the line's own bytes up to,
and without, ``,"hash":``. So a line that is changed, removed, inserted or moved breaks the chain.
``head`` beside them repeats the last line known to be on the disk, so that a tail that was cut off
is missed, and the last line that was dropped for age, so that the rest still has a beginning.

Who may write the files can also forge all of them, and the head: that shows only to whoever has
kept a hash from before. Written by ``writer``; reading takes no lock. Any thread.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

from memfs.cube import layout
from memfs.errors import NotAllowed
from memfs.vault.problem import Problem
from memfs.vault.store import Store

TRAIL = f"{layout.CONTROL}/trail"
HEAD = f"{TRAIL}/head"

_NAME = re.compile(r"\d{12}\.jsonl")
_TAIL = re.compile(rb',"hash":"([0-9a-f]{64})"\}')
_TAIL_BYTES = len(b',"hash":""}') + 64
_AREA = "trail"


class Link(NamedTuple):
    """One line's place in the chain."""

    seq: int
    hash: str


START = Link(0, "0" * 64)
"""What stands before the first line of all."""


@dataclass(frozen=True)
class Head:
    """What ``head`` says."""

    seq: int
    hash: str
    """Of the last line that is on the disk."""
    file: int
    size: int
    """The number of the file that it is in, and where it ends there."""
    dropped_seq: int
    dropped_hash: str
    """Of the last line that was dropped."""

    @property
    def last(self) -> Link:
        return Link(self.seq, self.hash)

    @property
    def dropped(self) -> Link:
        return Link(self.dropped_seq, self.dropped_hash)


def events(store: Store, after: int = 0) -> Iterator[dict[str, Any]]:
    """The events of a store, oldest first, from number ``after`` on; damaged lines are left out.

    Raises NotAllowed or OSError where the trail may not be read.
    """
    files = list_files(store)
    for number, following in zip_longest(files, files[1:]):
        if following is None or following > after + 1:
            for line in lines_of(store, number):
                event = parse(line)
                if event is not None and event["seq"] > after:
                    yield event


def problems(store: Store) -> Iterator[Problem]:
    """What is wrong with the trail of a store, which may be in use. None can be mended."""
    head = read_head(store)
    last, kept = head.dropped if head else START, ""
    files = [number for number in list_files(store) if number > last.seq]
    for number in files:
        path = name_of(number)
        if number != last.seq + 1:
            yield Problem(_AREA, path, f"it follows line {last.seq}: what was between is gone")
        for place, line in enumerate(lines_of(store, number), start=1):
            event = parse(line)
            if event is None:
                yield Problem(_AREA, path, f"line {place} of the file was changed")
                continue
            if (event["seq"] - 1, event["prev"]) != last:
                what = f"line {event['seq']} does not follow line {last.seq}"
                yield Problem(_AREA, path, f"{what}: lines were removed, inserted or moved")
            last = Link(event["seq"], event["hash"])
            if head is not None and last.seq == head.seq:
                kept = last.hash
    if files:
        yield from _unfinished(store, files)
    if head is None:
        if files:
            yield Problem(_AREA, HEAD, "it is missing or damaged: a tail could be missing unseen")
    elif head.seq > last.seq:
        gone = f"lines {last.seq + 1} to {head.seq} are gone"
        yield Problem(_AREA, HEAD, f"the trail ends with line {last.seq}: {gone}")
    elif head.seq > head.dropped_seq and kept != head.hash:
        yield Problem(_AREA, HEAD, f"line {head.seq} is not the one that was written there")


def render(seq: int, time: float, event: Mapping[str, Any], prev: str) -> tuple[bytes, str]:
    """The line of an event, with its newline, and its hash."""
    content = {"seq": seq, "time": time, **event, "prev": prev}
    body = json.dumps(content, separators=(",", ":")).encode("ascii")[:-1]
    digest = hashlib.sha256(body).hexdigest()
    return body + b',"hash":"' + digest.encode() + b'"}\n', digest


def parse(line: bytes) -> dict[str, Any] | None:
    """The event in a line without its newline; None where it is not as it was written."""
    tail = _TAIL.fullmatch(line[-_TAIL_BYTES:])
    body = line[:-_TAIL_BYTES]
    if tail is None or hashlib.sha256(body).hexdigest().encode() != tail[1]:
        return None
    try:
        event = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(event, dict) and type(event.get("seq")) is int
    return event if whole and isinstance(event.get("prev"), str) else None


def name_of(number: int) -> str:
    """The path of the file whose first line has this number."""
    return f"{TRAIL}/{number:012d}.jsonl"


def list_files(store: Store) -> list[int]:
    """The files there are, by the number of their first line, in order."""
    try:
        fd = store.open_dir(TRAIL)
    except FileNotFoundError:
        return []
    try:
        return sorted(int(name[:12]) for name in os.listdir(fd) if _NAME.fullmatch(name))
    finally:
        os.close(fd)


def lines_of(store: Store, number: int) -> Iterator[bytes]:
    """The lines of a file, without their newlines; a last one that has none is left out."""
    try:
        fd = store.open_regular(name_of(number))
    except FileNotFoundError:
        return  # dropped meanwhile
    with os.fdopen(fd, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line[:-1]


def read_head(store: Store) -> Head | None:
    """What ``head`` says; None where there is none, or a damaged one."""
    try:
        said = Head(**json.loads(store.read(HEAD, 4096)))
    except (FileNotFoundError, ValueError, TypeError, NotAllowed):
        return None
    numbers = (said.seq, said.file, said.size, said.dropped_seq)
    hashes = (said.hash, said.dropped_hash)
    whole = all(type(n) is int and n >= 0 for n in numbers)
    return said if whole and all(isinstance(h, str) for h in hashes) else None


def _unfinished(store: Store, files: list[int]) -> Iterator[Problem]:
    """Ends that are no whole line. Only the last file's may be one that is just being written."""
    for number in files:
        try:
            fd = store.open_regular(name_of(number))
        except FileNotFoundError:
            continue
        with os.fdopen(fd, "rb") as file:
            size = os.fstat(fd).st_size
            file.seek(max(size - 1, 0))
            torn = size > 0 and file.read(1) != b"\n"
        if torn:
            what = "its last line is unfinished"
            if number == files[-1]:
                what += ": the next mount cuts it off, and says so in the trail"
            yield Problem(_AREA, name_of(number), what)
