"""Benchmarks of the installed operators on this machine."""

from __future__ import annotations

import argparse
import importlib

#: name -> (module with add_arguments and run, one line of help), in the order of --help
BENCHMARKS: dict[str, tuple[str, str]] = {
    "prefill": ("sparseattn.bench_prefill", "one layer, sparse and dense, length by length"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command line's ``bench``: one subcommand a benchmark."""
    subparsers = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name, (module_name, line) in BENCHMARKS.items():
        module = importlib.import_module(module_name)
        subparser = subparsers.add_parser(
            name,
            help=line,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(subparser)


def run(args: argparse.Namespace) -> int:
    """The command line's ``bench``: returns the exit status."""
    return importlib.import_module(BENCHMARKS[args.benchmark][0]).run(args)
