"""Models of every family: refused with the reason, or exact with one cube, or placed rightly too.

They are tiny, with random weights, made by transformers from a configuration.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from memfs.config import Config
from memfs.errors import ModelUnusable, TooLong
from memfs.runtime.kv import kv_store
from memfs.runtime.model.kv_cache import KVCache, Slot, for_model
from memfs.runtime.model.resident import Resident, load
from memfs.runtime.model.rotary import rotated

from ...tiny import TOKENIZER_FILES
from ..conftest import Shop, ask, how, prose, run_all
from .listening import Nursery, Runtime

SHA = "0" * 64
QUESTION = "What did the keeper write down, and why?"
CONTEXT = 1024
ORIGINAL = 512
"""Tokens up to which the rotary embeddings that change with the length stay the same."""
WINDOW = 24

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
FACTORS = {
    "short_factor": [1 + i / 8 for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
}


def rope(kind: str, **more: Any) -> dict[str, Any]:
    """The sizes, with a rotary embedding of this kind."""
    return SIZES | {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **more}}


class Served(NamedTuple):
    """A family that serves."""

    name: str
    settings: dict[str, Any]
    unplaceable: str | None = None
    context: int = CONTEXT


SERVED = {
    "rope-linear": Served("Llama", rope("linear", factor=4.0)),
    "rope-yarn": Served(
        "Llama", rope("yarn", factor=2.0, original_max_position_embeddings=ORIGINAL)
    ),
    "rope-llama3": Served(
        "Llama",
        rope(
            "llama3",
            factor=2.0,
            original_max_position_embeddings=ORIGINAL,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
        ),
    ),
    "rope-dynamic": Served(
        "Llama",
        rope("dynamic", factor=4.0) | {"max_position_embeddings": ORIGINAL},
        context=ORIGINAL,
    ),
    "rope-longrope": Served(
        "Phi3",
        rope("longrope", **FACTORS) | {"original_max_position_embeddings": ORIGINAL},
        context=ORIGINAL,
    ),
    "rotary-on-a-quarter": Served("GPTNeoX", SIZES | {"rotary_pct": 0.25}),
    "scaled-logits": Served("Granite", SIZES | {"logits_scaling": 8.0}),
    "sliding": Served(
        "Mistral", SIZES | {"sliding_window": WINDOW}, "it has sliding-window layers"
    ),
    "sliding-in-some": Served(
        "Gemma3Text",
        SIZES | {"head_dim": 16, "sliding_window": WINDOW, "num_hidden_layers": 6},
        "it has sliding-window layers",
    ),
    "learned-positions": Served(
        "GPT2",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT},
        "it has no rotary embedding: its positions are learned",
    ),
    "rotary-in-pairs": Served("Glm", SIZES, "the keys of layer 0 are not rotated in halves"),
    "rotary-in-pairs-scaled-logits": Served(
        "Cohere", SIZES, "the keys of layer 0 are not rotated in halves"
    ),
    "no-positions-in-some": Served(
        "SmolLM3",
        SIZES | {"num_hidden_layers": 4},
        "the keys of layer 3 are not rotated in halves",
    ),
    "alibi": Served(
        "Falcon",
        SIZES | {"alibi": True},
        "its positions are biases of the attention (ALiBi)",
    ),
}
PLACED = [name for name, served in SERVED.items() if served.unplaceable is None]

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "linear-attention": ("Qwen3Next", {}, "layers of linear_attention"),
    "state-space": ("Mamba", {}, "layers of linear_attention"),
    "recurrent": ("RecurrentGemma", {}, "layers of linear_attention"),
    "state-space-in-some": ("Jamba", {}, "layers of linear_attention"),
    "running-state": ("Rwkv", {}, "keeps a running state"),
    "convolutions": (
        "Lfm2",
        {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
        "layers of conv",
    ),
    "chunked": ("Llama4Text", {}, "layers of chunked_attention"),
    "alibi-of-its-own": ("Bloom", {}, "attention of bloom is not plain"),
    "rotary-of-its-own": ("GPTJ", {}, "attention of gptj is not plain"),
    "capped-scores": ("Gemma2", {}, "attention of gemma2 is not plain"),
    "sinks": ("GptOss", {}, "attention of gpt_oss is not plain"),
    "encoder-decoder": ("T5", {}, "not a causal language model"),
}


@pytest.fixture(scope="module")
def model_dir(
    default_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Makes a served family's model, each once."""
    vocabulary = transformers.AutoConfig.from_pretrained(default_model_dir).vocab_size
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            family = SERVED[name]
            ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
            settings = getattr(transformers, f"{family.name}Config")(
                vocab_size=vocabulary, initializer_range=0.2, **ids, **family.settings
            )
            made[name] = tmp_path_factory.mktemp(name)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                AutoModelForCausalLM.from_config(settings).save_pretrained(made[name])
            for file in TOKENIZER_FILES:
                shutil.copy(default_model_dir / file, made[name])
        return made[name]

    return make


@pytest.mark.parametrize("name", REFUSED)
def test_what_keeps_no_kv_cache_is_refused_by_name(
    name: str, default_model_dir: Path, tmp_path: Path
) -> None:
    family, settings, reason = REFUSED[name]
    getattr(transformers, f"{family}Config")(**settings).save_pretrained(tmp_path)
    for file in TOKENIZER_FILES:
        shutil.copy(default_model_dir / file, tmp_path)
    with pytest.raises(ModelUnusable, match=reason):
        load(tmp_path, Config(device="cpu", dtype="float32", threads=1))


@pytest.fixture
def resident(
    request: pytest.FixtureRequest,
    model_dir: Callable[[str], Path],
    load_model: Callable[[Path], Resident],
) -> Resident:
    return load_model(model_dir(request.param))


def one_shot(directory: Path, ids: list[int]) -> torch.Tensor:
    """What transformers' own model says after ``ids``."""
    own = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.inference_mode():
        found: torch.Tensor = own(torch.tensor([ids]), use_cache=False).logits[0, -1]
    return found


def asked(resident: Resident, cache: KVCache, ids: list[int]) -> torch.Tensor:
    found: torch.Tensor = run_all(resident.engine.prefill(cache, ids, logits=True))
    return found


@pytest.mark.parametrize("resident", SERVED, indirect=True)
def test_one_cube_is_exact(
    resident: Resident,
    request: pytest.FixtureRequest,
    model_dir: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    """As far as the model goes: the last token of the question is the context's last."""
    name = request.node.callspec.params["resident"]
    family = SERVED[name]
    assert resident.context == family.context
    assert resident.unplaceable == family.unplaceable

    question = resident.prompt.question(QUESTION, bare=False)
    rows = resident.context - resident.base - len(question)
    memory = resident.prompt.memory(prose(CONTEXT))[:rows]
    whole = [*resident.prompt.preamble, *memory, *question]
    assert len(whole) == resident.context

    fresh = resident.engine.new_cache(CONTEXT)
    resident.engine.forward(fresh, resident.prompt.preamble, logits=False)
    run_all(resident.engine.prefill(fresh, memory))
    fd = os.open(tmp_path / "kv", os.O_RDWR | os.O_CREAT)
    kv_store.write(fd, fresh, resident, memory, SHA)
    mounted, ids = kv_store.read(fd, resident, SHA)
    os.close(fd)
    assert ids == memory

    expected = asked(resident, fresh, question)
    assert torch.equal(asked(resident, mounted, question), expected)
    own = one_shot(model_dir(name), whole)
    assert own.abs().max() > 0.1, "the comparison says something"
    assert (expected - own).abs().max() < 1e-4


@pytest.mark.parametrize("resident", PLACED, indirect=True)
def test_placed_rows_are_those_made_there(resident: Resident) -> None:
    """In every layer: of rows that attend to each other alone, only the distances count."""
    assert resident.inv_freq is not None
    ids = resident.prompt.memory(prose(20))

    def keys_from(position: int) -> list[torch.Tensor]:
        cache = resident.engine.new_cache(len(ids))
        at = torch.arange(position, position + len(ids))
        with torch.inference_mode():
            resident.engine.model.base_model(
                input_ids=torch.tensor([ids]),
                position_ids=at[None],
                past_key_values=for_model([Slot(cache, len(ids))]),
                use_cache=True,
            )
        return [layer[0] for layer in cache.layers]

    for distance in (1, 100, resident.context - len(ids)):
        for here, there in zip(keys_from(0), keys_from(distance), strict=True):
            moved = rotated(here, distance, resident.inv_freq)
            assert (moved - there).norm() < 1e-3 * there.norm()
            assert (here - there).norm() > 1e-2 * there.norm(), "they move"


@pytest.mark.parametrize("resident", ["rope-longrope", "rope-dynamic"], indirect=True)
def test_beyond_what_it_serves_its_rows_would_be_wrong(
    resident: Resident, request: pytest.FixtureRequest, model_dir: Callable[[str], Path]
) -> None:
    """Why the context ends there: rows made before are not those of a longer prefill."""
    ids = resident.prompt.memory(prose(CONTEXT))[: ORIGINAL + 50]
    cache = resident.engine.new_cache(CONTEXT)
    found = asked(resident, cache, ids)
    own = one_shot(model_dir(request.node.callspec.params["resident"]), ids)
    assert (found - own).abs().max() > 0.1
    within = asked(resident, resident.engine.new_cache(CONTEXT), ids[:100])
    own = one_shot(model_dir(request.node.callspec.params["resident"]), ids[:100])
    assert (within - own).abs().max() < 1e-4


# Through a daemon: what the answer says of it, and the logits that it was made of.


@pytest.fixture
def runtime(
    request: pytest.FixtureRequest, nursery: Nursery, model_dir: Callable[[str], Path]
) -> Iterator[Runtime]:
    config = Config(str(model_dir(request.param)), device="cpu", dtype="float32", threads=1)
    with nursery.runtime(config) as found:
        yield found


@pytest.mark.parametrize(
    "runtime",
    ["sliding", "sliding-in-some", "learned-positions", "rotary-in-pairs", "alibi"],
    indirect=True,
)
def test_several_are_answered_from_the_text(
    runtime: Runtime, shop: Shop, request: pytest.FixtureRequest
) -> None:
    reason = SERVED[request.node.callspec.params["runtime"]].unplaceable
    cubes = [shop.cube(name, prose(40, seed)) for seed, name in enumerate("ab")]
    ask(runtime.client, cubes)
    as_text = runtime.heard()
    assert len(as_text) == 8
    for cube in cubes:
        runtime.client.call("encode", **cube)

    for cube in cubes:
        runtime.heard()
        assert how(ask(runtime.client, [cube], kv=False)) == ["text"]
        alone = runtime.heard()
        assert how(ask(runtime.client, [cube])) == ["kv"]
        assert runtime.heard() == alone

    report = ask(runtime.client, cubes)
    assert how(report) == ["kv", "text"]
    assert report["cubes"][0]["why"] is None
    assert report["cubes"][1]["why"] == f"several cubes cannot be placed: {reason}"
    assert runtime.heard() == as_text
    assert runtime.client.call("status")["unplaceable"] == reason


@pytest.mark.parametrize("runtime", ["rope-longrope"], indirect=True)
def test_a_text_beyond_its_rotary_embedding_is_refused(runtime: Runtime, shop: Shop) -> None:
    cubes = [shop.cube(name, prose(40, seed)) for seed, name in enumerate("ab")]
    for cube in cubes:
        runtime.client.call("encode", **cube)
    assert how(ask(runtime.client, cubes)) == ["kv", "kv"]
    long = shop.cube("long", prose(ORIGINAL))
    for wanted in ({"op": "encode", **long}, {"op": "ask", "cubes": [long], "question": "?"}):
        with pytest.raises(TooLong, match=str(ORIGINAL)):
            runtime.client.call(wanted.pop("op"), **wanted)
    assert runtime.client.call("status")["context"] == ORIGINAL
