"""vim, emacs and nano as somebody uses them: each opens a file in a terminal and is typed at."""

from __future__ import annotations

import abc
import os
import signal
from collections.abc import Sequence
from pathlib import Path

from .terminal import Terminal, Terminals


class Editor(abc.ABC):
    """An editor with one file open."""

    program: str
    refusal: str
    """What it says where the file cannot be saved as it is."""

    started: str
    """What it shows once the file is open."""
    options: tuple[str, ...] = ()

    def __init__(
        self, server: Terminals, file: Path, settings: Sequence[str] = (), by: Sequence[str] = ()
    ) -> None:
        """Opens the file.

        Args:
            settings: options that somebody sets who does not like the editor as it comes.
            by: a command that runs the editor, as another user.
        """
        command = (*by, self.program, *self.options, *settings, file.name)
        self.terminal: Terminal = server.open(file.parent, *command)
        self.name = file.name
        self.terminal.wait(self.started.format(file.name))

    @abc.abstractmethod
    def replace(self, old: str, new: str) -> None:
        """Replaces a text that is there once."""

    @abc.abstractmethod
    def ask_to_save(self) -> None:
        """Saves, and does not look at what comes of it."""

    @abc.abstractmethod
    def wait_saved(self) -> None:
        """Waits until it says that it has saved."""

    @abc.abstractmethod
    def require_modified(self) -> None:
        """It knows that the text is not saved."""

    @abc.abstractmethod
    def quit(self) -> None:
        """Ends it; everything is saved."""

    def kill(self) -> None:
        """Ends it as a crash would."""
        os.kill(self.terminal.pid, signal.SIGKILL)
        self.terminal.wait_end()

    def save(self) -> None:
        """Saves."""
        self.ask_to_save()
        self.wait_saved()

    def save_in_vain(self) -> str:
        """Saves, and is refused; the screen then."""
        self.ask_to_save()
        return self.terminal.wait(self.refusal)


class Vim(Editor):
    program = "vim"
    refusal = "E512: Close failed"
    started = '"{}" '

    def order(self, order: str) -> None:
        """Gives an order in its command line."""
        self.terminal.type(order)
        self.terminal.wait(f"\n{order}\n")  # what stood there before is gone
        self.terminal.press("Enter")

    def replace(self, old: str, new: str) -> None:
        self.order(f":%s/{old}/{new}/ | redraw!")
        self.terminal.wait_gone(":%s")
        assert "E486" not in self.terminal.screen(), "the text is not there"

    def ask_to_save(self) -> None:
        self.order(":w")

    def wait_saved(self) -> None:
        self.terminal.wait("B written")

    def require_modified(self) -> None:
        self.terminal.wait("Press ENTER")
        self.terminal.press("Enter")
        self.terminal.wait_gone("Press ENTER")
        self.order(":q")
        self.terminal.wait("E37: No write since last change")

    def quit(self) -> None:
        self.order(":q")
        self.terminal.wait_end()


class Emacs(Editor):
    program = "emacs"
    refusal = "Invalid argument, "
    started = "F1  {}"
    options = ("-nw",)

    def order(self, order: str) -> None:
        """Gives an order by its name."""
        self.terminal.press("M-x")
        self.terminal.wait("\nM-x")
        self.terminal.type(order)
        self.terminal.press("Enter")

    def replace(self, old: str, new: str) -> None:
        self.terminal.press("M-<")
        self.order("replace-string")
        for said, typed in (("Replace string", old), (f"{old} with", new)):
            self.terminal.wait(said)
            self.terminal.type(typed)
            self.terminal.press("Enter")
        self.terminal.wait("Replaced 1 occurrence")

    def ask_to_save(self) -> None:
        if "**-" not in self.terminal.screen():  # else it does not save at all
            self.terminal.press("Space", "BSpace")
            self.terminal.wait("**-")
        self.terminal.press("C-x", "C-s")

    def wait_saved(self) -> None:
        self.terminal.wait("Wrote ")

    def require_modified(self) -> None:
        assert "**-" in self.terminal.screen()

    def quit(self) -> None:
        self.terminal.press("C-x", "C-c")
        self.terminal.wait_end()


class Nano(Editor):
    program = "nano"
    refusal = "Invalid argument ]"
    started = "^X Exit"

    def replace(self, old: str, new: str) -> None:
        self.terminal.press("M-\\", "C-\\")
        for said, typed in (("Search (to replace)", old), ("Replace with", new)):
            self.terminal.wait(said)
            self.terminal.type(typed)
            self.terminal.press("Enter")
        self.terminal.wait("Replace this instance")
        self.terminal.type("a")
        self.terminal.wait("Replaced 1 occurrence")

    def ask_to_save(self) -> None:
        self.terminal.press("C-o")
        self.terminal.wait("File Name to Write")
        self.terminal.press("Enter")

    def wait_saved(self) -> None:
        self.terminal.wait("[ Wrote ")

    def require_modified(self) -> None:
        assert f"{self.name} *" in self.terminal.screen()

    def quit(self) -> None:
        self.terminal.press("C-x")
        self.terminal.wait_end()
