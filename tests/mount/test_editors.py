"""vim, emacs and nano save `payload.md` and `meta.json` through a mount as they do on a disk.

Each is driven in a terminal, with the settings that it comes with and with those that change how it
saves, on the mount and on a native directory at once: what it leaves there is to be the same.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator

import pytest

from ..conftest import needs
from .conftest import needs_root, until
from .desk import OTHER, TEXT, Desk, Pair, open_desk
from .editors import Editor, Emacs, Nano, Vim
from .terminal import Terminals

PRECIOUS = "emacs, file-precious-flag"

EDITORS: dict[str, tuple[type[Editor], list[str]]] = {
    "vim": (Vim, []),
    "vim, backupcopy=yes": (Vim, ["--cmd", "set backupcopy=yes"]),
    "vim, backupcopy=no": (Vim, ["--cmd", "set backupcopy=no"]),
    "vim, nowritebackup": (Vim, ["--cmd", "set nowritebackup"]),
    "vim, backup": (Vim, ["--cmd", "set backup"]),
    "vim, undofile": (Vim, ["--cmd", "set undofile"]),
    "vim, noswapfile": (Vim, ["-n"]),
    "emacs": (Emacs, []),
    "emacs, backup-by-copying": (Emacs, ["--eval", "(setq backup-by-copying t)"]),
    PRECIOUS: (Emacs, ["--eval", "(setq-default file-precious-flag t)"]),
    "emacs, no backups": (Emacs, ["--eval", "(setq make-backup-files nil)"]),
    "nano": (Nano, []),
    "nano -B": (Nano, ["-B"]),
}
AS_THEY_COME = ("vim", "emacs", "nano")

EDITS = (("First", "Changed", OTHER, "stale"), ("Changed", "First", TEXT, "ready"))

OWNER, MEMBER, GROUP = 1234, 1235, 2345

pytestmark = needs("tmux")


@pytest.fixture(scope="module")
def desk() -> Iterator[Desk]:
    with open_desk() as desk:
        yield desk


@pytest.fixture(scope="module")
def terminals(desk: Desk) -> Iterator[Terminals]:
    terminals = Terminals(desk.root)
    try:
        yield terminals
    finally:
        terminals.close()


class Opened:
    """The same file of a pair, open in two editors."""

    def __init__(
        self, terminals: Terminals, desk: Desk, pair: Pair, file: str, name: str, by: tuple = ()
    ) -> None:
        kind, settings = EDITORS[name]
        if shutil.which(kind.program) is None:
            pytest.skip(f"needs {kind.program}")
        self._desk, self._pair = desk, pair
        self._editors = {there: kind(terminals, there / file, settings, by) for there in pair}
        self.on_mount = self._editors[pair.cube]
        self.on_disk = self._editors[pair.native]

    def replace(self, old: str, new: str) -> None:
        for editor in self._editors.values():
            editor.replace(old, new)

    def save(self) -> None:
        try:
            self._desk.both(lambda there: self._editors[there].save(), self._pair)
        except AssertionError as e:
            e.add_note(self.on_mount.terminal.screen() + self.on_disk.terminal.screen())
            raise

    def quit(self) -> None:
        self._desk.both(lambda there: self._editors[there].quit(), self._pair)


@pytest.mark.parametrize("name", EDITORS)
def test_a_text_is_edited(desk: Desk, terminals: Terminals, name: str) -> None:
    pair = desk.pair(name)
    opened = Opened(terminals, desk, pair, "payload.md", name)
    opened.save()
    desk.require(name, TEXT, "ready")
    for old, new, text, kv in EDITS:
        opened.replace(old, new)
        desk.require_alike(pair)  # lock and swap files
        opened.save()
        desk.require(name, text, kv)
    opened.quit()
    desk.require(name, TEXT, "ready")


@needs_root
@pytest.mark.parametrize("name", AS_THEY_COME)
@pytest.mark.parametrize("who", ["root", "a member"])
def test_whose_file_it_is(desk: Desk, terminals: Terminals, name: str, who: str) -> None:
    """root edits somebody's file; a member of a group edits one that another has shared."""
    pair = desk.pair(f"{name} by {who}")
    by: list[str] = []
    if who == "a member":
        home = desk.root / f"home with {name}"
        home.mkdir()
        os.chown(home, MEMBER, GROUP)
        by = ["setpriv", f"--reuid={MEMBER}", f"--regid={GROUP}", "--clear-groups"]
        by += ["env", f"HOME={home}"]
    for directory in pair:
        for path in (directory, *directory.iterdir()):
            os.chown(path, OWNER, GROUP)
            path.chmod(0o2775 if path == directory else 0o664)
        os.link(directory / "payload.md", directory / "another name")
    opened = Opened(terminals, desk, pair, "payload.md", name, by)
    for old, new, text, kv in EDITS:
        opened.replace(old, new)
        opened.save()
        desk.require(pair.name, text, kv)
    opened.quit()
    opened = Opened(terminals, desk, pair, "meta.json", name, by)
    opened.replace(f'"title": "{pair.name}"', '"title": "Edited"')
    opened.save()
    desk.made[pair.name]["title"] = "Edited"
    desk.require(pair.name, TEXT, "ready")
    opened.quit()


@pytest.mark.parametrize("name", EDITORS)
def test_a_header_is_edited(desk: Desk, terminals: Terminals, name: str) -> None:
    pair = desk.pair(f"header in {name}")
    opened = Opened(terminals, desk, pair, "meta.json", name)
    opened.save()
    for old, new in ((pair.name, "Edited"), ("Edited", pair.name)):
        opened.replace(f'"title": "{old}"', f'"title": "{new}"')
        opened.save()
        desk.made[pair.name]["title"] = new
        desk.require(pair.name, TEXT, "ready")
    opened.quit()
    desk.require(pair.name, TEXT, "ready")
    assert not (pair.cube / "meta.json.rejected").exists()


@pytest.mark.parametrize("name", [name for name in EDITORS if name != PRECIOUS])
def test_a_bad_header_is_refused_in_the_editor(desk: Desk, terminals: Terminals, name: str) -> None:
    """At its first save, and again after one that was good."""
    pair = desk.pair(f"bad header in {name}")
    opened = Opened(terminals, desk, pair, "meta.json", name)
    good = (pair.cube / "meta.json").read_text()
    for _ in range(2):
        opened.replace('"memfs": 1', '"memfs": 0')
        opened.on_disk.save()
        opened.on_mount.save_in_vain()
        opened.on_mount.require_modified()
        desk.require_refused(pair.name, good.replace('"memfs": 1', '"memfs": 0'))
        opened.replace('"memfs": 0', '"memfs": 1')
        opened.save()
        desk.require(pair.name, TEXT, "ready")
    opened.quit()
    assert json.loads((pair.cube / "meta.json").read_text()) == json.loads(good)


def test_a_bad_header_that_emacs_would_rename_into_place(desk: Desk, terminals: Terminals) -> None:
    """It says what is wrong, but takes the buffer for saved before it renames: on any disk."""
    pair = desk.pair(PRECIOUS + ", refused")
    opened = Opened(terminals, desk, pair, "meta.json", PRECIOUS)
    good = (pair.cube / "meta.json").read_text()
    opened.replace('"memfs": 1', '"memfs": 0')
    opened.on_mount.save_in_vain()
    desk.require_refused(pair.name, good.replace('"memfs": 1', '"memfs": 0'))
    assert (pair.cube / "meta.json").read_text() == good


@needs("vim")
def test_what_a_killed_vim_leaves_brings_the_text_back(desk: Desk, terminals: Terminals) -> None:
    pair = desk.pair("vim, killed")
    vim = Vim(terminals, pair.cube / "payload.md")
    vim.replace("First", "Changed")
    vim.order(":preserve")
    vim.terminal.wait("File preserved")
    vim.kill()
    desk.require(pair.name, TEXT, "ready")
    terminals.open(pair.cube, "vim", "-r", "-c", "w!", "payload.md").wait("Recovery completed")
    desk.require(pair.name, OTHER, "stale")


@needs("emacs")
def test_what_a_killed_emacs_leaves_brings_the_text_back(desk: Desk, terminals: Terminals) -> None:
    pair = desk.pair("emacs, killed")
    emacs = Emacs(terminals, pair.cube / "payload.md")
    emacs.replace("First", "Changed")
    emacs.order("do-auto-save")
    until((pair.cube / "#payload.md#").exists)
    assert (pair.cube / ".#payload.md").is_symlink()
    emacs.kill()
    desk.require(pair.name, TEXT, "ready")
    recover = ("--eval", '(recover-file "payload.md")', "-f", "save-buffer")
    terminal = terminals.open(pair.cube, "emacs", "-nw", *recover)
    terminal.wait("yes or no")
    terminal.press(*"yes", "Enter")
    terminal.wait("Wrote ")
    desk.require(pair.name, OTHER, "stale")
