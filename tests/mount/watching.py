"""inotify as programs see it, by inotifywait."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path
from types import TracebackType

from .conftest import until


class Watch:
    """Watches directories and files from the ``with`` on; ``events`` are lines as they come in."""

    def __init__(self, *paths: Path, recursive: bool = False) -> None:
        options = ["-r"] if recursive else []
        self._process = subprocess.Popen(
            ["inotifywait", "-m", *options, "--format", "%e %f", *map(str, paths)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.events: list[str] = []
        self._reader = threading.Thread(target=self._read)

    def __enter__(self) -> Watch:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if "Watches established" in line:
                break
        self._reader.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._process.terminate()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()

    def wait(self, event: str) -> None:
        """Waits until an event is told of."""
        until(lambda: event in self.events)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.events.append(line.rstrip("\n"))
