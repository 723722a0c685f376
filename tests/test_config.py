"""The configuration: what wins, and what is refused."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path

import pytest

from memfs import config
from memfs.config import Config, cache_dir, config_file, runtime_dir
from memfs.errors import InvalidConfig


def load(tmp_path: Path, text: str = "", **environ: str) -> Config:
    path = tmp_path / "config.toml"
    path.write_text(text)
    return Config.load(path, environ)


def test_an_argument_wins_over_the_environment_over_the_file(tmp_path: Path) -> None:
    assert load(tmp_path) == Config()
    assert load(tmp_path, 'dtype = "float16"\nthreads = 3').dtype == "float16"
    assert load(tmp_path, "threads = 3", MEMFS_THREADS="4").threads == 4
    path = tmp_path / "config.toml"
    chosen = Config.load(path, {"MEMFS_THREADS": "4"}, threads=5, model=None)
    assert (chosen.threads, chosen.model) == (5, "default")


@pytest.mark.parametrize(
    ("text", "count"),
    [("0", 0), ("512", 512), ("4G", 4 << 30), ("4gib", 4 << 30), ("1k", 1024)],
)
def test_bytes_may_have_a_unit(tmp_path: Path, text: str, count: int) -> None:
    assert load(tmp_path, MEMFS_BUDGET_BYTES=text).budget_bytes == count
    assert load(tmp_path, f'budget_bytes = "{text}"').budget_bytes == count


@pytest.mark.parametrize("text", ["1", "true", "YES", "on"])
def test_a_switch_may_be_a_word(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, "autostart = false", MEMFS_AUTOSTART=text).autostart
    assert not load(tmp_path, MEMFS_AUTOSTART="off").autostart


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("colour = 1", "colour"),
        ("threads = true", "threads"),
        ("threads = 1.5", "threads"),
        ('budget_bytes = "many"', "budget_bytes"),
        ('budget_bytes = "-1"', "budget_bytes"),
        ("model = 3", "model"),
        ("autostart = 1", "autostart"),
        ("threads =", "config.toml"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(InvalidConfig, match=named):
        load(tmp_path, text)


def test_a_file_that_was_asked_for_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="no such file"):
        Config.load(tmp_path / "none.toml", {})
    assert Config.load(None, {"XDG_CONFIG_HOME": str(tmp_path)}) == Config()


def test_every_field_says_what_it_is() -> None:
    source = Path(config.__file__).read_text()
    for field in fields(Config):
        line = source.index(f"    {field.name}: ")
        assert source[line:].split("\n")[1].strip().startswith('"""'), field.name


def test_places(tmp_path: Path) -> None:
    assert cache_dir({"XDG_CACHE_HOME": "/c"}) == Path("/c/memfs")
    assert config_file({"XDG_CONFIG_HOME": "/c"}) == Path("/c/memfs/config.toml")
    assert cache_dir({"XDG_CACHE_HOME": "relative"}) == Path.home() / ".cache" / "memfs"


def test_the_runtime_directory_is_made_private(tmp_path: Path) -> None:
    path = runtime_dir({"XDG_RUNTIME_DIR": str(tmp_path)})
    assert path == tmp_path / "memfs"
    path.chmod(0o755)
    assert runtime_dir({"XDG_RUNTIME_DIR": str(tmp_path)}).stat().st_mode & 0o777 == 0o700


def test_a_runtime_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "memfs").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidConfig, match="another user"):
        runtime_dir({"XDG_RUNTIME_DIR": str(tmp_path)})
    if os.getuid() == 0:
        (tmp_path / "memfs").unlink()
        (tmp_path / "memfs").mkdir()
        os.chown(tmp_path / "memfs", 12345, 12345)
        with pytest.raises(InvalidConfig, match="another user"):
            runtime_dir({"XDG_RUNTIME_DIR": str(tmp_path)})
