"""``memfs runtime``: starts, stops or prepares the resident model's daemon."""

from __future__ import annotations

import argparse

from memfs.cli import output, targets
from memfs.config import Config
from memfs.errors import RuntimeUnavailable
from memfs.runtime import client
from memfs.runtime.protocol import socket_path

HELP = "start, stop or prepare the resident model"
EPILOG = """\
examples:
  memfs runtime                          start it, and wait until the model answers
  memfs runtime -f --model ./my-model    in the foreground, with another model
  memfs runtime --prepare                fetch and convert the model, and start nothing
  memfs runtime --shared llm             for the users of a group as well
  memfs runtime --stop

A runtime is also started by the first question, or the first read of a KV cache.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group()
    what.add_argument("-f", "--foreground", action="store_true", help="stay, and log to stderr")
    what.add_argument("--prepare", action="store_true", help="fetch and convert the model only")
    what.add_argument("--stop", action="store_true", help="end the daemon")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of the model")
    parser.add_argument(
        "--budget-bytes", metavar="BYTES", help="for mounted KV caches, for example 4G"
    )
    parser.add_argument(
        "--shared",
        nargs="?",
        const="all",
        metavar="GROUP",
        help="let other users of this machine use it, or those of a group",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    targets.add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    config = Config.load(
        model=args.model,
        device=args.device,
        dtype=args.dtype,
        threads=args.threads,
        budget_bytes=args.budget_bytes,
        shared=args.shared,
    )
    if args.prepare:
        return _prepare(config, as_json=args.json)
    if args.stop:
        return _stop(config, as_json=args.json)
    if args.foreground:
        from memfs.runtime import daemon

        return daemon.run(config, socket_path(config))
    with targets.runtime(config) as connection:
        facts = connection.call("status")
    if args.shared is not None and facts["shared"] != args.shared:
        raise RuntimeUnavailable("it is running already, and not shared so; memfs runtime --stop")
    if args.json:
        output.print_json(facts)
    else:
        print(
            f"{facts['model']} is ready: {facts['dtype']} on {facts['device']}, "
            f"loaded in {output.seconds(facts['load_s'])} (process {facts['pid']})"
        )
    return 0


def _prepare(config: Config, *, as_json: bool) -> int:
    from memfs.runtime.model import model_store

    with output.Progress() as progress:
        directory = model_store.resolve(config.model, config, progress.step)
    if as_json:
        output.print_json({"model": config.model, "directory": str(directory)})
    else:
        print(f"the model is ready to load, in {directory}")
    return 0


def _stop(config: Config, *, as_json: bool) -> int:
    stopped = client.stop(config)
    if as_json:
        output.print_json({"stopped": stopped})
    else:
        print("the runtime has stopped" if stopped else "no runtime is running")
    return 0
