"""What all tests share: an environment of their own, and models to run on.

The configuration and the runtime directory are the test session's own; the cache is the user's, so
that the default model is fetched and converted once and not once a session.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from memfs.cube.fingerprint import FORMAT, MODEL_FIELDS, STORAGE

from . import tiny

# One thread a process, before torch is first imported: tests start several processes, and two that
# compute at once on the same cores are many times slower than one after the other.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "MEMFS_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def needs(*programs: str) -> pytest.MarkDecorator:
    """Skips a test where a program that it drives is missing; ``tools/test`` installs them."""
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    missing = [program for program in programs if shutil.which(program, path=path) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {' and '.join(missing)}")


@pytest.fixture(scope="session", autouse=True)
def own_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Sockets, mount records and configuration of this session alone.

    The runtime directory has a short name of its own: a socket's path may have 107 bytes.
    """
    runtime = tempfile.mkdtemp(prefix="memfs-")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", runtime)
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        for name in list(os.environ):
            if name.startswith("MEMFS_") and name != "MEMFS_THREADS":
                patch.delenv(name)
        yield
    shutil.rmtree(runtime, ignore_errors=True)


@pytest.fixture
def public() -> Iterator[Path]:
    """A temporary directory that other users may enter; pytest's own are private."""
    directory = tempfile.mkdtemp(prefix="memfs-public-")
    os.chmod(directory, 0o755)
    yield Path(directory)
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def default_model_dir() -> Path:
    """The default model, as a user gets it."""
    from memfs.config import Config
    from memfs.runtime.model import model_store

    return model_store.resolve("default", Config(), print)


@pytest.fixture(scope="session")
def tiny_model_dir(default_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with random weights and the default model's tokenizer."""
    return tiny.llama(tmp_path_factory.mktemp("llama"), default_model_dir)


@pytest.fixture(scope="session")
def tiny_qwen_dir(default_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 of three layers: norms on queries and keys, heads wider than hidden / heads."""
    return tiny.qwen3(tmp_path_factory.mktemp("qwen"), default_model_dir)


@pytest.fixture(scope="session")
def make_kv() -> Callable[..., bytes]:
    """``make_kv(payload, **fields)``: a small, whole kv.safetensors for a text, no model needed.

    The fixture ``kv_model`` is the model it fits, but for the fields that are given.
    """
    import numpy as np

    from memfs.cube import kvfile
    from tests.kvbytes import kv_bytes

    def make(payload: bytes, **fields: str) -> bytes:
        data = {
            kvfile.layer_name(i): np.full((2, 1, 3, 2), i, np.float32)
            for i in range(int(KV_MODEL["layers"]))
        } | {kvfile.TOKEN_IDS: np.arange(3, dtype=np.int32)}
        text = {
            "token_count": "3",
            "token_ids_sha256": hashlib.sha256(data[kvfile.TOKEN_IDS].tobytes()).hexdigest(),
            "payload_sha256": hashlib.sha256(payload).hexdigest(),
            STORAGE: "exact",
        }
        return kv_bytes(KV_MODEL | text | fields, data)

    return make


@pytest.fixture
def kv_model() -> dict[str, str]:
    """The model's part of the fingerprint of what ``make_kv`` makes."""
    return dict(KV_MODEL)


KV_MODEL = dict.fromkeys(MODEL_FIELDS, "of a test") | {
    "format": FORMAT,
    "layers": "2",
    "kv_heads": "1",
    "head_dim": "2",
    "base_position": "0",
    "dtype": "float32",
}
