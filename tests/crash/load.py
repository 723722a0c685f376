"""A writing load: one process, one role, one directory of the mount that nobody else writes.

``python -m tests.crash.load ROLE DIRECTORY SEED``. A line on stdin starts it and another one stops
it; it also stops when the mount is gone. What it does is reported on stdout, a JSON object a line:
``begin`` before a change is asked for, ``done`` after the call that ends it (``fsync``, ``close``,
``rename``, ``unlink``) has returned, ``down`` when it has stopped.
"""

from __future__ import annotations

import base64
import errno
import json
import os
import random
import select
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..mount.kvmaker import kv_file

GONE = (errno.ENOTCONN, errno.ECONNABORTED)
"""What every operation on a dead mount gives."""
NOT_MADE = (errno.EAGAIN, errno.EIO, errno.EINVAL, errno.ENODEV, errno.EINTR)
"""What opening a KV cache gives where it could not be made: the runtime was killed."""
WORDS = ("the", "keeper", "of", "light", "wrote", "down", "what", "ships", "had", "passed", "wind")


class Load:
    """What the roles have in common."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.directory = directory
        self.random = random.Random(seed)

    def report(self, **event: object) -> None:
        sys.stdout.write(json.dumps(event) + "\n")
        sys.stdout.flush()

    @contextmanager
    def change(self, kind: str, path: Path, data: bytes = b"", to: Path | None = None) -> Iterator:
        """A change that is asked for within the block and was made when that ends."""
        self.report(
            event="begin",
            kind=kind,
            path=str(path.relative_to(self.directory.parent)),
            data=base64.b64encode(data).decode(),
            to=to and str(to.relative_to(self.directory.parent)),
        )
        yield
        self.report(event="done", path=str(path.relative_to(self.directory.parent)))

    def text(self) -> bytes:
        count = self.random.choice((3, 40, 400, 4000))
        return (" ".join(self.random.choices(WORDS, k=count)) + "\n").encode()

    def write(self, file: int, data: bytes) -> None:
        """In a few system calls, as programs do."""
        step = max(1, len(data) // self.random.randint(1, 4))
        for start in range(0, len(data), step):
            os.write(file, data[start : start + step])

    def whole(
        self, path: Path, data: bytes, flags: int = os.O_TRUNC, *, sync: bool = False
    ) -> None:
        """Opens, writes and closes."""
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | flags, 0o644)
        try:
            self.write(fd, data)
            if sync:
                os.fsync(fd)
        finally:
            os.close(fd)

    def replace(self, path: Path, data: bytes) -> None:
        """As editors save: a file beside, renamed over."""
        beside = path.with_name(f".{path.name}.new~")
        self.whole(beside, data, sync=self.random.random() < 0.5)
        os.replace(beside, path)

    def cube(self) -> Path:
        """One of a few cubes; made where it is not there."""
        cube = self.directory / str(self.random.randrange(4))
        if not cube.is_dir():
            cube.mkdir()
        payload = cube / "payload.md"
        if not payload.exists():
            text = self.text()
            with self.change("rewrite", payload, text):
                self.whole(payload, text)
        return cube


class Texts(Load):
    """Payloads: appended to, written anew, replaced; flushed halfway."""

    def step(self) -> None:
        payload, text = self.cube() / "payload.md", self.text()
        how = self.random.randrange(4)
        if how == 0:
            with self.change("append", payload, text):
                self.whole(payload, text, os.O_APPEND)
        elif how == 1:
            with self.change("rewrite", payload, text):
                self.whole(payload, text)
        elif how == 2:
            with self.change("atomic", payload, text):
                self.replace(payload, text)
        else:
            fd = os.open(payload, os.O_WRONLY | os.O_APPEND)
            try:
                for _ in range(3):
                    with self.change("append", payload, text):
                        self.write(fd, text)
                        os.fsync(fd)
            finally:
                os.close(fd)


class Headers(Load):
    """Titles in meta.json: written in place, or beside and renamed over."""

    def step(self) -> None:
        header = self.cube() / "meta.json"
        if not header.exists():
            return  # its cube was made just before the mount was killed: it gets one soon
        meta = json.loads(header.read_bytes())
        title = f"{self.random.random()}"
        meta["descriptive"]["title"] = title
        data = json.dumps(meta, indent=self.random.choice((None, 4))).encode()
        with self.change("title", header, title.encode()):
            if self.random.random() < 0.5:
                self.whole(header, data, sync=self.random.random() < 0.3)
            else:
                self.replace(header, data)


class Blobs(Load):
    """KV caches and adapters, copied into place."""

    def step(self) -> None:
        cube = self.cube()
        if self.random.random() < 0.5:
            path = cube / "kv.safetensors"
            data = kv_file(b"some text", self.random.choice((8, 64, 1024)))
        else:
            path = cube / "adapter/adapter_model.safetensors"
            path.parent.mkdir(exist_ok=True)
            data = kv_file(b"any tensors do", self.random.choice((8, 512)))
        with self.change("atomic", path, data):
            if self.random.random() < 0.7:
                self.whole(path, data)
            else:
                self.replace(path, data)


class Made(Load):
    """KV caches made by the model, of texts that change."""

    def step(self) -> None:
        cube = self.cube()
        if self.random.random() < 0.7:
            payload, text = cube / "payload.md", self.text()[:2000]
            with self.change("rewrite", payload, text):
                self.whole(payload, text)
        try:
            with (cube / "kv.safetensors").open("rb") as file:
                file.read()
        except OSError as e:
            if e.errno not in NOT_MADE:
                raise
            return
        self.report(event="made", path=str(cube.relative_to(self.directory.parent)))


class Files(Load):
    """Ordinary files and directories, and now and then a new index."""

    def step(self) -> None:
        names = sorted(n for n in os.listdir(self.directory) if not n.startswith("."))
        new = self.directory / f"{self.random.randrange(30)}"
        taken = new.name in names
        old = self.directory / self.random.choice(names) if names else None
        how = self.random.randrange(6)
        if how == 0 and not taken:
            data = self.text()
            with self.change("rewrite", new, data):
                self.whole(new, data, os.O_EXCL, sync=self.random.random() < 0.5)
        elif how == 1 and old:
            data = self.text()
            with self.change("append", old, data):
                self.whole(old, data, os.O_APPEND)
        elif how == 2 and old and old != new:
            with self.change("rename", old, to=new):
                os.rename(old, new)
        elif how == 3 and old:
            with self.change("unlink", old):
                old.unlink()
        elif how == 4:
            self.in_a_directory()
        elif self.random.random() < 0.1:
            (self.directory.parent / ".memfs/control").write_text("rebuild\n")

    def in_a_directory(self) -> None:
        """A directory that is flushed, and goes again with all that is in it."""
        name = self.directory / ".d" / "deep" / "file"
        if name.parent.is_dir():
            with self.change("unlink", name):
                shutil.rmtree(name.parents[1])
            return
        name.parent.mkdir(parents=True)
        data = self.text()
        with self.change("rewrite", name, data):
            self.whole(name, data, sync=True)
            fd = os.open(name.parent, os.O_RDONLY)
            os.fsync(fd)
            os.close(fd)


ROLES: dict[str, type[Load]] = {
    "texts": Texts,
    "headers": Headers,
    "blobs": Blobs,
    "made": Made,
    "files": Files,
}


def main() -> None:
    role, directory, seed = sys.argv[1:]
    load = ROLES[role](Path(directory), int(seed))
    step: Callable[[], None] = load.step  # type: ignore[attr-defined]
    while sys.stdin.readline():
        try:
            load.directory.mkdir(exist_ok=True)
            while not select.select([sys.stdin], [], [], 0)[0]:
                step()
            sys.stdin.readline()
        except OSError as e:
            if e.errno not in GONE:
                what = f"{role}: {traceback.format_exc()}"
                load.report(event="error", what=what, errno=e.errno, at=time.time())
            with suppress(OSError):
                sys.stdin.readline()
        load.report(event="down")


if __name__ == "__main__":
    main()
