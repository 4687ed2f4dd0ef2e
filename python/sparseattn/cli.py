"""The command line: ``sparseattn`` and ``python -m sparseattn``.

A subcommand is a module with ``add_arguments(parser)`` and ``run(args) -> int | None`` (the exit
status). Its heavy imports belong inside ``run``, so that ``--help`` is quick and every subcommand
works without the extras of the others.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

#: name -> (module, one line of help), in the order of --help
COMMANDS: dict[str, tuple[str, str]] = {
    "info": ("sparseattn.info", "versions, devices, and the path chosen for each shape"),
    "demo": ("sparseattn.demo", "dense against sparse prefill on a real text"),
    "bench": ("sparseattn.bench", "benchmarks of the operators on this machine"),
    "eval": ("sparseattn.evaluation.command", "accuracy of a model with sparse attention"),
    "search": ("sparseattn.search", "find the pattern of every head of a model"),
}

# What the user can put right: told in one line, without a traceback.
_USER_ERRORS = (ValueError, OSError, ImportError)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns the exit status (2: the user's error, 130: interrupted)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = _parser(argv).parse_args(argv)
    try:
        return args.run(args) or 0
    except _USER_ERRORS as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"sparseattn {args.command}: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"sparseattn {args.command}: interrupted", file=sys.stderr)
        return 130


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sparseattn", description="Sparse attention for long-context language models."
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for name, (module_name, line) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=line, description=line)
        if name == chosen:  # only this one's module is imported
            module = importlib.import_module(module_name)
            subparser.description = module.__doc__
            subparser.formatter_class = argparse.RawDescriptionHelpFormatter
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    return parser
