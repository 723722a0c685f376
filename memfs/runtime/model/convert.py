"""A GGUF file into a transformers model directory.

``python -m memfs.runtime.model.convert GGUF DIR``. Run by ``model_store`` as a process of its own:
it takes 20 seconds of CPU and several times the model's size in memory, which goes back to the
system when it ends. The weights are written in float32, as the GGUF dequantizes, so nothing is
lost. torch is imported here.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch
import transformers
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer

from memfs import __version__
from memfs.cube.metadata import rfc3339
from memfs.runtime.model.model_digest import file_digest

SOURCE = "memfs-source.json"
"""Beside the model: where it is from, its digest and licence, and what files it must have."""


def convert(gguf: Path, directory: Path, source: str) -> None:
    """Writes the model in ``gguf`` into ``directory``, which is there and empty, and syncs it."""
    place = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**place)
    # What is saved is an ordinary model: it must not say that it is still quantized, nor where
    # on this machine it came from.
    model.hf_quantizer = None  # type: ignore[assignment]  # transformers' own way to say so
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    tokenizer.init_kwargs.pop("name_or_path", None)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    described = {
        "memfs": 1,
        "source": source,
        "gguf": gguf.name,
        "gguf_sha256": file_digest(gguf),
        "name": _text(gguf, "general.name"),
        "licence": _text(gguf, "general.license"),
        "converted": rfc3339(),
        "converted_by": {"memfs": __version__, "transformers": transformers.__version__},
        "files": {path.name: path.stat().st_size for path in sorted(directory.iterdir())},
    }
    (directory / SOURCE).write_text(json.dumps(described, indent=2) + "\n")
    for path in [*directory.iterdir(), directory]:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def _text(gguf: Path, key: str) -> str | None:
    """A string among the GGUF's own facts."""
    field = GGUFReader(gguf).get_field(key)
    return None if field is None else str(field.contents())


def main() -> None:
    """The command line of the process."""
    parser = argparse.ArgumentParser(prog="python -m memfs.runtime.model.convert")
    parser.add_argument("gguf", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--source", default="", help="where the GGUF file is from")
    args = parser.parse_args()
    convert(args.gguf, args.directory, args.source or str(args.gguf))


if __name__ == "__main__":
    main()
