"""The configuration: one dataclass, filled from defaults, a TOML file, the environment, the caller.

The file is ``$XDG_CONFIG_HOME/memfs/config.toml``; each key is a field's name. An environment
variable ``MEMFS_<FIELD>`` wins over the file, an explicit argument over both. Imported by every
process, so it imports nothing heavy.
"""

from __future__ import annotations

import os
import tempfile
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from memfs.errors import InvalidConfig

DEFAULT_MODEL = "default"
"""The embedded model's name: SmolLM2-135M-Instruct, fetched and converted once."""

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


@dataclass(frozen=True)
class Config:
    """Everything a user may set. Bytes may be written as ``512M`` or ``4G``."""

    model: str = DEFAULT_MODEL
    """``default``, a transformers model directory, a hub id or a ``.gguf`` file."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N``."""
    dtype: str = "auto"
    """``auto``, ``float32``, ``bfloat16`` or ``float16``."""
    threads: int = 0
    """CPU threads of the model; 0 takes what the process may use."""
    budget_bytes: int = 4 << 30
    """Bytes of mounted KV caches the runtime may hold."""
    host_budget_bytes: int = 4 << 30
    """Bytes of pinned host memory for what an accelerator has no room for; 0 keeps none."""
    prefetch_bytes: int = 1 << 30
    """Bytes of KV files that one use of a cube may have read ahead of time; 0 reads none."""
    versions_budget_bytes: int = 10 << 30
    """Bytes that earlier versions of a store's cubes may take on its disk; 0 makes none."""
    autostart: bool = True
    """Whether a read or a question starts the runtime when none is running."""
    shared: str = ""
    """Who else than its user may use a runtime: nobody, ``all`` or a group."""
    runtime_of: str = ""
    """The user whose shared runtime is used in place of an own one."""
    compose: str = "blend:0.1"
    """What is computed again of later cubes where several are placed: ``rotate``, ``link:ROWS`` or
    ``blend:SHARE``."""
    mount_on_read: bool = True
    """Whether reading a kv.safetensors or an adapter puts it into the model."""

    @classmethod
    def load(
        cls,
        file: Path | None = None,
        environ: Mapping[str, str] | None = None,
        **overrides: object,
    ) -> Config:
        """Defaults, then the file, then ``MEMFS_*``, then ``overrides`` that are not None.

        Raises InvalidConfig for a file that is not TOML, an unknown key or a value of a wrong type.
        """
        environ = os.environ if environ is None else environ
        source = file or config_file(environ)
        values: dict[str, object] = {}
        try:
            values.update(tomllib.loads(source.read_text()))
        except FileNotFoundError:
            if file is not None:
                raise InvalidConfig(f"{file}: no such file") from None
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
            raise InvalidConfig(f"{source}: {e}") from e
        known = {f.name for f in fields(cls)}
        for name in values:
            if name not in known:
                raise InvalidConfig(f"{source}: unknown key {name!r}; known: {sorted(known)}")
        variables = {n: f"MEMFS_{n.upper()}" for n in known}
        values |= {n: environ[v] for n, v in variables.items() if v in environ}
        values |= {n: v for n, v in overrides.items() if v is not None}
        converted: dict[str, Any] = {
            n: _convert(n, v, type(getattr(cls, n))) for n, v in values.items()
        }
        return cls(**converted)


def _convert(name: str, value: object, kind: type) -> object:
    """``value`` as ``kind`` (str, int or bool); an int may carry a unit, as in ``4G``."""
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    if isinstance(value, str):
        text = value.strip().lower()
        if kind is bool and text in ("1", "true", "yes", "on", "0", "false", "no", "off"):
            return text in ("1", "true", "yes", "on")
        digits = text.rstrip("kmgtib")
        unit = text[len(digits) :].rstrip("ib")
        if kind is int and digits.isdigit() and unit in _UNITS:
            return int(digits) * _UNITS[unit]
    raise InvalidConfig(f"{name} = {value!r} is not {kind.__name__}")


def config_file(environ: Mapping[str, str] = os.environ) -> Path:
    """Where the configuration file is looked for."""
    return _xdg(environ, "XDG_CONFIG_HOME", ".config") / "config.toml"


def cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Where converted models and other things that can be made again are kept."""
    return _xdg(environ, "XDG_CACHE_HOME", ".cache")


def shared_dir(uid: int) -> Path:
    """Where the socket of a runtime that a user shares is. Everybody may enter it; its name is the
    same for everybody.
    """
    return Path("/run/memfs") if uid == 0 else Path(f"/tmp/memfs-shared-{uid}")


def _xdg(environ: Mapping[str, str], variable: str, below_home: str) -> Path:
    base = environ.get(variable, "")
    return (Path(base) if base.startswith("/") else Path.home() / below_home) / "memfs"


def runtime_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """The private directory (0700, ours) for sockets and mount records; made if missing.

    ``$XDG_RUNTIME_DIR/memfs``, else ``/run/user/UID/memfs``, else a directory under the system's
    temporary one. Raises InvalidConfig where somebody else owns it.
    """
    base = environ.get("XDG_RUNTIME_DIR", "")
    if not base.startswith("/"):
        base = f"/run/user/{os.getuid()}"
    if os.path.isdir(base) and os.access(base, os.W_OK):
        path = Path(base) / "memfs"
    else:
        path = Path(tempfile.gettempdir()) / f"memfs-{os.getuid()}"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.lstat()
    if found.st_uid != os.getuid() or path.is_symlink():
        raise InvalidConfig(f"{path} belongs to another user; set XDG_RUNTIME_DIR")
    if found.st_mode & 0o077:
        path.chmod(0o700)
    return path
