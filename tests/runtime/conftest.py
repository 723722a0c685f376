"""Models loaded in this process, daemons started for real, and stores of cubes to give them."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from memfs.config import Config
from memfs.runtime.client import RuntimeClient, connect, stop

if TYPE_CHECKING:
    from memfs.runtime.model.resident import Resident

WORDS = ("the", "keeper", "of", "light", "wrote", "down", "what", "ships", "had", "passed", "wind")


def prose(words: int, seed: int = 0) -> str:
    """Text that differs with the seed from its first word on."""
    return " ".join(f"{WORDS[(i * 7 + seed) % len(WORDS)]}{(i + seed) % 10}" for i in range(words))


def run_all(steps: Any) -> Any:
    """Runs a job of the model's thread to its end, by itself; what it returned."""
    from memfs.runtime.model.steps import Step, take

    given = None
    while True:
        try:
            item = steps.send(given)
        except StopIteration as stop:
            return stop.value
        given = take([item])[0] if isinstance(item, Step) else None


@pytest.fixture(scope="session")
def load_model() -> Callable[..., Resident]:
    """Loads a model in this process, each once a session."""
    loaded: dict[tuple[Path, str], Resident] = {}

    def load(directory: Path, dtype: str = "float32") -> Resident:
        from memfs.runtime.model import resident

        key = (directory, dtype)
        if key not in loaded:
            loaded[key] = resident.load(directory, Config(device="cpu", dtype=dtype, threads=1))
        return loaded[key]

    return load


class Shop:
    """A store of cubes on disk, with no mount over it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / ".memfs").mkdir(mode=0o700)

    def cube(self, path: str, text: str) -> dict[str, str]:
        """A cube with this text, as a request names it."""
        directory = self.root / path
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "payload.md").write_text(text)
        return self.named(path)

    def named(self, path: str) -> dict[str, str]:
        return {"store": str(self.root), "path": path}

    def kv(self, path: str) -> Path:
        return self.root / path / "kv.safetensors"

    def digest(self, path: str) -> str:
        return hashlib.sha256(self.kv(path).read_bytes()).hexdigest()


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    root = tmp_path / "store"
    root.mkdir()
    return Shop(root)


@contextlib.contextmanager
def daemon(config: Config) -> Iterator[RuntimeClient]:
    """A runtime of this configuration, its model ready; stopped at the end."""
    with connect(config, start=True) as client:
        client.call("ready", timeout=120)
        yield client
    stop(config)


@pytest.fixture(scope="module")
def tiny_config(tiny_model_dir: Path) -> Config:
    return Config(model=str(tiny_model_dir), device="cpu", dtype="float32", threads=1)


@pytest.fixture(scope="module")
def runtime(tiny_config: Config) -> Iterator[RuntimeClient]:
    """A client of a daemon with the tiny model."""
    with daemon(tiny_config) as client:
        yield client


def ask(client: RuntimeClient, cubes: list[dict[str, str]] | None, **more: Any) -> dict[str, Any]:
    """A question, answered; the report."""
    wanted = {"question": "What did the keeper write?", "max_tokens": 8} | more
    return client.call("ask", timeout=60, cubes=cubes, **wanted)


def how(report: dict[str, Any]) -> list[str]:
    """How each cube of a report was used."""
    return [cube["how"] for cube in report["cubes"]]
