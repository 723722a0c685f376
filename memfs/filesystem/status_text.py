"""``.memfs/status``: the state of a mount for people to read. Used by ``control``; pure."""

from __future__ import annotations

from typing import Any

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def status_text(facts: dict[str, Any]) -> str:
    """The text for what ``status.json`` says."""
    index, reason = facts["index"], facts["index"]["reason"]
    cubes = (
        "no index yet"
        if index["cubes"] is None
        else f"{index['cubes']} cube{'s' * (index['cubes'] != 1)}"
    )
    lines = [
        f"store    {facts['store']}",
        f"mount    {facts['mountpoint']} (process {facts['pid']}, since {facts['since']})",
        f"index    {cubes}" + (f": {reason}" if reason else ""),
        f"runtime  {_runtime(facts)}",
        "reading  puts a memory into the model"
        if facts["mount_on_read"]
        else "reading  mounts nothing (mount_on_read=off)",
        f"speed    {_passthrough(facts['passthrough'])}",
        "",
    ]
    mounted = facts["mounted"]
    lines.append(f"in the model: {len(mounted) or 'nothing'}")
    lines += [f"  {_memory(line)}" for line in mounted]
    if facts["refusals"]:
        lines += ["", "refused lately:"]
        for refusal in reversed(facts["refusals"]):
            name = refusal.get("path") or refusal.get("cube")
            lines.append(f"  {name}: {refusal.get('reason')}")
    return "\n".join(map(_plain, lines)) + "\n"


def _plain(line: str) -> str:
    """A line with control characters escaped: the name of a cube must not drive the terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def _passthrough(facts: dict[str, Any]) -> str:
    if facts["on"]:
        return "files are read by the kernel itself (passthrough)"
    return f"files are read through the mount: {facts['reason']}"


def _runtime(facts: dict[str, Any]) -> str:
    phase = facts["runtime"]
    if phase == "absent":
        return "none is running; it is started when it is needed"
    text = f"{phase}: {facts['model']}" if facts.get("model") else str(phase)
    if facts.get("device"):
        text += f" on {facts['device']}"
    if facts.get("error"):
        text += f" ({facts['error']})"
    return text


def _memory(line: dict[str, Any]) -> str:
    parts = [str(line.get("cube") or line.get("kind"))]
    if line.get("tokens") is not None:
        parts.append(f"{line['tokens']} tokens")
    if line.get("bytes") is not None:
        parts.append(_size(line["bytes"]))
    if line.get("tier"):
        parts.append(str(line["tier"]))
    if line.get("storage") == "int8":
        parts.append("int8")
    if line.get("hits") is not None:
        parts.append(f"{line['hits']} hits")
    return ", ".join(parts)


def _size(count: int) -> str:
    value, unit = float(count), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{count} B" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"
