"""``memfs ask``: a question, answered from cubes as they are mounted, or from their text."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from memfs.cli import output, targets

HELP = "ask the model a question, with cubes in its memory"
EPILOG = """\
examples:
  memfs ask "Who is on duty on Sundays?"             from what you have mounted by reading it
  memfs ask -c ~/mem/handbook "Who is on duty?"      from this cube, whatever is mounted
  memfs ask -c law -c contract "May we cancel?"      from two cubes, in this order
  memfs ask --no-kv -c handbook "Who is on duty?"    from its text: the model reads all of it
  memfs ask --json -c handbook "Who?" | jq .ttft_s

A cube that has no KV cache is answered from its text, and that is said. A KV cache that does not
fit the text or the model is made again for the answer, from the first token that changed; its file
is written afterwards.
Several cubes are put together from their KV caches, close to what their texts together would be
(composed, in --json), and exactly that from the first question on that comes after an idle moment.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("question", metavar="QUESTION", help="'-' reads it from standard input")
    parser.add_argument(
        "-c", "--cube", action="append", metavar="CUBE", help="answer from this cube (repeatable)"
    )
    parser.add_argument("--no-kv", action="store_true", help="use the text, never a KV cache")
    parser.add_argument(
        "-n", "--max-tokens", type=int, default=256, metavar="N", help="of the answer (256)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, at the end")
    targets.add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    question = sys.stdin.read() if args.question == "-" else args.question
    cubes = None if args.cube is None else [targets.cube(given) for given in args.cube]
    config = targets.config_of(args, cubes)
    report: dict[str, Any] = {}
    with targets.runtime(config) as client:
        for event in client.stream(
            "ask",
            question=question,
            cubes=None if cubes is None else [cube.named() for cube in cubes],
            kv=not args.no_kv,
            max_tokens=args.max_tokens,
        ):
            if event.get("event") == "text" and not args.json:
                print(event["text"], end="", flush=True)
            report = event
    if args.json:
        output.print_json(report)
        return 0
    print(flush=True)
    _explain(report, wanted_kv=not args.no_kv)
    return 0


def _explain(report: dict[str, Any], *, wanted_kv: bool) -> None:
    """How the answer came to be, on stderr."""
    computed = report["prompt_tokens"] - report["cached_tokens"]
    line = (
        f"first token after {output.seconds(report['ttft_s'])} "
        f"({output.number(computed)} tokens computed, "
        f"{output.number(report['cached_tokens'])} from KV"
    )
    if report["recomputed_tokens"]:
        line += f", {output.number(report['recomputed_tokens'])} of them again"
    line += f", composed: {report['composed']})" if report["composed"] else ")"
    if report["tokens_per_s"]:
        line += f", then {report['tokens_per_s']:.0f} tokens/s"
    print(output.styled(line, "dim", sys.stderr), file=sys.stderr)
    if not report["cubes"]:
        print("no memory was used: none is mounted", file=sys.stderr)
    for cube in report["cubes"]:
        name, chose = output.plain(cube["path"]), cube["chose"] or {}
        if cube["why"] and wanted_kv:
            print(f"{name} was read as {cube['how']}: {cube['why']}", file=sys.stderr)
        elif chose.get("way") == "made again":
            kept = f"{output.number(chose['kept_tokens'])} of {output.number(cube['tokens'])}"
            print(f"the KV cache of {name} was made again, {kept} tokens kept", file=sys.stderr)
