"""Programs driven in a real terminal, as a person sees and types: tmux draws the screen."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

SECONDS = 60.0
"""How long a program may take to show something. It is waited for, and no longer than needed."""


class Terminals:
    """A tmux server of its own, and a home directory without any settings."""

    def __init__(self, root: Path) -> None:
        home = root / "home"
        home.mkdir()
        self._socket = root / "tmux"
        self._count = 0
        self._env = {"HOME": str(home), "LANG": "C.UTF-8", "SHELL": "/bin/sh"}
        self._env["PATH"] = os.environ["PATH"]
        self.run("-f/dev/null", "new-session", "-d", "-s", "stay", "sleep", "1000")

    def run(self, *args: str, check: bool = True) -> str:
        """Runs a command of tmux's."""
        done = subprocess.run(
            ["tmux", "-S", self._socket, *args],
            check=check,
            capture_output=True,
            text=True,
            env=self._env,
        )
        return done.stdout

    def open(self, directory: Path, *command: str) -> Terminal:
        """Starts a program in a new terminal."""
        self._count += 1
        name = f"t{self._count}"
        where = ("-d", "-s", name, "-x", "100", "-y", "30", "-c", str(directory))
        self.run("new-session", *where, *command)
        return Terminal(self, name)

    def close(self) -> None:
        """Ends every program in it."""
        self.run("kill-server", check=False)


class Terminal:
    """One program in its terminal."""

    def __init__(self, server: Terminals, name: str) -> None:
        self._server = server
        self._at = ("-t", f"={name}:")

    def screen(self) -> str:
        """What is to be seen; "" once the program has ended."""
        return self._server.run("capture-pane", "-p", *self._at, check=False)

    @property
    def pid(self) -> int:
        """The program's process."""
        return int(self._server.run("display-message", "-p", *self._at, "#{pane_pid}"))

    def type(self, text: str) -> None:
        """Types a text."""
        self._server.run("send-keys", *self._at, "-l", text)

    def press(self, *keys: str) -> None:
        """Presses keys, by tmux's names for them: Enter, C-x, M-x."""
        self._server.run("send-keys", *self._at, *keys)

    def wait(self, text: str) -> str:
        """Waits until a text is to be seen; the screen then."""
        return self._until(lambda screen: text in screen, text)

    def wait_gone(self, text: str) -> None:
        """Waits until a text is no longer to be seen."""
        self._until(lambda screen: bool(screen) and text not in screen, f"no {text}")

    def wait_end(self) -> None:
        """Waits until the program has ended."""
        self._until(lambda screen: not screen, "the end")

    def _until(self, condition: Callable[[str], bool], wanted: str) -> str:
        deadline = time.monotonic() + SECONDS
        while True:
            screen = self.screen()
            if condition(screen):
                return screen
            assert time.monotonic() < deadline, f"waited for {wanted}; to be seen was:\n{screen}"
            time.sleep(0.02)
