"""The ``memfs`` command: finds the command's module, parses, runs it, and turns errors into exits.

Only the module of the command that was called is imported, so that ``memfs --help`` and the
commands that need no more than a socket start at once. A command module has ``HELP``, ``EPILOG``,
``add_arguments(parser)`` and ``run(args) -> exit code``; ``args.given`` is what was typed. The main
thread.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from memfs import __version__
from memfs.cli import output
from memfs.errors import MemfsError

COMMANDS = {
    "mount": "mount a store of MemCubes on a directory",
    "umount": "end a mount",
    "status": "show what is in the model and what a store holds",
    "doctor": "check everything memfs needs, and print what mends it",
    "encode": "make the KV cache of a cube",
    "ask": "ask the model a question, with cubes in its memory",
    "attach": "put a cube into the model by name",
    "detach": "take a cube out of the model",
    "pin": "have cubes stay in the model",
    "versions": "list the versions of a cube, or the deleted cubes of a store",
    "diff": "show what changed between two versions of a cube",
    "restore": "bring back a version of a cube, or a deleted cube",
    "log": "show who mounted, changed or was denied what",
    "fsck": "check everything a store holds, and repair it",
    "dump": "write cubes into an archive",
    "load": "load cubes from an archive",
    "index": "check or rebuild the index of a store, or search it",
    "runtime": "start, stop or prepare the resident model",
    "bench": "measure memfs on this machine",
}
"""Every command, in the order the help shows, with its one line; each is ``memfs.cli.<name>``."""

EPILOG = """\
examples:
  memfs mount ~/store ~/mem                      the store's memories as files
  cat ~/mem/handbook/kv.safetensors > /dev/null  reading it puts it into the model
  memfs ask -c ~/mem/handbook "Who is on duty?"  answered from it
  memfs status                                   what is in the model now

exit status:
  0 done, 1 failed, 2 wrong usage, 3 not found, 4 refused because it does not fit,
  5 no runtime, 6 the model cannot serve, 7 invalid input, 8 not permitted,
  9 mount problem, 130 interrupted
"""

USAGE_ERROR = 2
INTERRUPTED = 130
PIPE_CLOSED = 141  # what a shell shows for a command that SIGPIPE ended


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Epilogs as they are written, and options shown as ``-c, --cube CUBE`` by every Python."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}"


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """The parser, with the arguments of ``command`` alone filled in."""
    parser = argparse.ArgumentParser(
        prog="memfs",
        description="The filesystem for a language model's memory: "
        "reading a file puts it into the model.",
        epilog=EPILOG,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"memfs {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for name, line in COMMANDS.items():
        if name != command:
            commands.add_parser(name, help=line)
            continue
        module = importlib.import_module(f"memfs.cli.{name}")
        sub = commands.add_parser(
            name,
            help=line,
            description=module.HELP[:1].upper() + module.HELP[1:] + ".",
            epilog=module.EPILOG,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not where a test has put a buffer in its place
            stream.reconfigure(errors="backslashreplace")  # a strange file name is no crash
    arguments = list(sys.argv[1:] if argv is None else argv)
    # The options before the command take no value, so the first word that is none is the command.
    command = next((word for word in arguments if not word.startswith("-")), None)
    parser = build_parser(command)
    args = parser.parse_args(arguments, argparse.Namespace(given=arguments))
    if args.command is None:
        parser.print_help(sys.stderr)
        return USAGE_ERROR
    return _run(args)


def _run(args: argparse.Namespace) -> int:
    as_json = bool(getattr(args, "json", False))
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except MemfsError as e:
        return _failed(e.to_wire(), e.exit_code, as_json)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # `memfs … | head` has read enough. What is still buffered must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except OSError as e:
        text = f"{e.filename}: {e.strerror}" if e.filename else e.strerror or str(e)
        return _failed({"type": type(e).__name__, "detail": text, "message": text}, 1, as_json)


def _failed(error: dict[str, str], status: int, as_json: bool) -> int:
    """Says what went wrong: on stderr for people, and on stdout where a script asked for JSON."""
    if as_json:
        output.print_json({"error": error})
    print(f"memfs: {output.plain(error['message'])}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
