"""``memfs diff``: what is different between two versions of a cube, or between one and now."""

from __future__ import annotations

import argparse
import difflib
import io
import sys
from dataclasses import dataclass

from memfs.cli import histories, output
from memfs.cli.histories import History
from memfs.cli.versions import changed
from memfs.cube import layout, metadata
from memfs.errors import InvalidMetadata, InvalidRequest
from memfs.vault.facts import MAX_PAYLOAD
from memfs.vault.versions.records import Entry, Version
from memfs.vault.versions.restore import without_rights

HELP = "show what changed between two versions of a cube"
EPILOG = """\
examples:
  memfs diff ~/mem/handbook                            the last change
  memfs diff ~/mem/handbook 2026-11-22                 since the end of that day
  memfs diff ~/mem/handbook 2026-11-22T10:42 2026-11-23

The texts and what people have set in meta.json are compared line by line, an adapter's files by
their digests. KV caches have no versions. What a VERSION may be, memfs versions --help says.

exit status: 0 where nothing differs, 1 where something does.
"""


@dataclass(frozen=True)
class Side:
    """One of the two that are compared."""

    name: str
    place: str
    """Its directory in the store."""
    files: dict[str, Entry]
    version: Version | None
    """None for what the cube is now."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("cube", metavar="CUBE", help="a path to a cube")
    parser.add_argument(
        "versions",
        nargs="*",
        metavar="VERSION",
        help="one, to be compared with the cube as it is now, or two",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    with histories.opened(args.cube) as history:
        old, new, names = _sides(history, args.versions)
        texts = {name: _diff(history, old, new, name) for name in names}
    if args.json:
        changes = [
            {
                "file": name,
                "old_sha256": old.files[name].sha256 if name in old.files else None,
                "new_sha256": new.files[name].sha256 if name in new.files else None,
                "diff": "".join(text),
            }
            for name, text in texts.items()
        ]
        output.print_json({"old": old.name, "new": new.name, "changes": changes})
    else:
        for text in texts.values():
            _print(text)
    return 1 if names else 0


def _sides(history: History, given: list[str]) -> tuple[Side, Side, list[str]]:
    """What is compared, and the files in which it differs."""
    if len(given) > 2:
        raise InvalidRequest(f"at most two versions are compared, and {given[2]} is a third")
    first = history.version(given[0]) if given else history.before_now()
    if len(given) == 2:
        second = history.version(given[1])
        return _of(history, first), _of(history, second), changed(first, second)
    present = history.present()
    now = Side(history.path, history.path, present.files if present else {}, None)
    return _of(history, first), now, history.differing(first, present)


def _of(history: History, version: Version) -> Side:
    name = f"{history.path}/{layout.VERSIONS}/{version.stamp}"
    return Side(name, history.place(version), version.files, version)


def _diff(history: History, old: Side, new: Side, name: str) -> list[str]:
    """The lines that say what is different in a file."""
    labels = [f"{side.name}/{name}" if name in side.files else "/dev/null" for side in (old, new)]
    if name in (layout.PAYLOAD, layout.META):
        # The access list of today is the kernel's, and no matter of versions.
        rights = new.version is not None
        texts = [_lines(history, side, name, rights=rights) for side in (old, new)]
        if texts[0] is not None and texts[1] is not None:
            found = list(difflib.unified_diff(texts[0], texts[1], labels[0], labels[1]))
            return [
                line if line.endswith("\n") else line + "\n\\ No newline at end of file\n"
                for line in found
            ]
    said = [
        f"{label} {_digest(side, name)}\n" for label, side in zip(labels, (old, new), strict=True)
    ]
    return [f"--- {said[0]}", f"+++ {said[1]}"]


def _lines(history: History, side: Side, name: str, *, rights: bool) -> list[str] | None:
    """The lines of a text; None for a file that is not there to be read, though it was."""
    entry = side.files.get(name)
    if entry is None:
        return []
    if not entry.kept:
        return None
    data = history.store.read(f"{side.place}/{name}", MAX_PAYLOAD)
    if name == layout.META:
        try:
            meta = metadata.user_set(metadata.parse(data))
        except InvalidMetadata:
            pass  # shown as it is
        else:
            shown = meta if rights else without_rights(meta)
            data = metadata.render(shown)
    text = data.decode("utf-8", "backslashreplace")
    return list(io.StringIO(text, newline="\n"))  # at what ends a line for patch, too, alone


def _digest(side: Side, name: str) -> str:
    entry = side.files.get(name)
    if entry is None:
        return ""
    kept = "" if entry.kept else ", not kept"
    return f"({output.size(entry.size)}{kept}) sha256 {entry.sha256 or 'not known yet'}"


def _print(lines: list[str]) -> None:
    styles = {"+++": "bold", "---": "bold", "": "yellow", "+": "green", "-": "red"}
    colored = output.use_color(sys.stdout)
    for line in lines:
        style = next((s for start, s in styles.items() if line.startswith(start)), None)
        text = output.plain(line[:-1].replace("\t", "    ")) if colored else line[:-1]
        print(output.styled(text, style) if style and colored else text)
