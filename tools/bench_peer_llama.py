"""llama.cpp with a model loaded, for ``tools/bench-peer``: run in an environment that has it.

``bench_peer_llama.py GGUF CONTEXT THREADS``. Requests are JSON lines on stdin, each answered by one
on stdout. The low-level interface is used: nothing of Python is between its calls.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time

import llama_cpp as llama

SEQUENCE = 0


@llama.llama_log_callback
def _silent(_level: int, _text: bytes, _data: object) -> None:
    """It would say on stderr how it loads."""


class Peer:
    """A model and a context of it, with keys and values in float16, which is its default."""

    def __init__(self, gguf: str, context: int, threads: int) -> None:
        llama.llama_log_set(_silent, ctypes.c_void_p(0))
        llama.llama_backend_init()
        self.model = llama.llama_model_load_from_file(
            gguf.encode(), llama.llama_model_default_params()
        )
        parameters = llama.llama_context_default_params()
        parameters.n_ctx = context
        parameters.n_threads = parameters.n_threads_batch = threads
        assert parameters.type_k == parameters.type_v == llama.GGML_TYPE_F16
        self.context = llama.llama_init_from_model(self.model, parameters)
        self.batch = parameters.n_batch
        self.vocabulary = llama.llama_model_get_vocab(self.model)

    def save(self, text: str, tokens: int, path: str) -> dict[str, float]:
        """Computes the first ``tokens`` tokens of a text; writes the sequence's state to a file."""
        ids = self._ids(text, tokens)
        self._forget()
        began = time.perf_counter()
        self._compute(ids)
        seconds = time.perf_counter() - began
        if not llama.llama_state_seq_save_file(
            self.context, path.encode(), SEQUENCE, ids, len(ids)
        ):
            raise SystemExit(f"llama.cpp did not write {path}")
        return {"bytes": os.path.getsize(path), "prefill_s": seconds}

    def ask(self, path: str, tokens: int, question: str, question_tokens: int) -> dict[str, float]:
        """Seconds from the state's file to the first token; the sequence was emptied before."""
        asked = self._ids(question, question_tokens)
        found = (llama.llama_token * tokens)()
        count = ctypes.c_size_t()
        self._forget()
        began = time.perf_counter()
        read = llama.llama_state_seq_load_file(
            self.context, path.encode(), SEQUENCE, found, tokens, ctypes.byref(count)
        )
        loaded = time.perf_counter()
        if not read or count.value != tokens:
            raise SystemExit(f"llama.cpp did not read {path}")
        self._compute(asked)
        sampler = llama.llama_sampler_init_greedy()
        token = llama.llama_sampler_sample(sampler, self.context, -1)
        ended = time.perf_counter()
        llama.llama_sampler_free(sampler)
        return {"load_s": loaded - began, "ttft_s": ended - began, "token": token}

    def _ids(self, text: str, count: int) -> ctypes.Array[ctypes.c_int]:
        data = text.encode()
        room = (llama.llama_token * len(data))()
        made = llama.llama_tokenize(self.vocabulary, data, len(data), room, len(room), False, False)
        if made < count:
            raise SystemExit(f"{made} tokens of text, {count} are wanted")
        return (llama.llama_token * count)(*room[:count])

    def _forget(self) -> None:
        llama.llama_memory_clear(llama.llama_get_memory(self.context), False)

    def _compute(self, ids: ctypes.Array[ctypes.c_int]) -> None:
        for start in range(0, len(ids), self.batch):
            part = (llama.llama_token * min(self.batch, len(ids) - start))(
                *ids[start : start + self.batch]
            )
            if llama.llama_decode(self.context, llama.llama_batch_get_one(part, len(part))):
                raise SystemExit("llama.cpp did not compute")
        llama.llama_synchronize(self.context)


def main() -> None:
    gguf, context, threads = sys.argv[1:]
    peer = Peer(gguf, int(context), int(threads))
    print(json.dumps({"version": llama.__version__}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(peer, request.pop("op"))(**request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
