"""`focalkern COMMAND RECIPE [--field value ...]`: finds the command's module, reads the job, runs it.

A command is a module of this package with a docstring, which its help shows, and two functions:
`add_arguments(parser)` for options of its own, and `run(arguments)`, which returns the exit status.
`arguments` holds these options and, but for `env`, the `Job` as `arguments.job`. A third function,
`overrides(arguments)`, may return fields that the command sets, as on a command line. Without it the job is
read for a machine with or without a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

import focalkern

COMMANDS = {
    "train": "train a model by a recipe; resumes; --dry-run tries it on a tiny model first",
    "plan": "memory per GPU, host memory and hours of a recipe, before it starts",
    "check": "data, loss, gradients and memory of a recipe, before it starts",
    "env": "versions and GPUs of this machine, for a bug report",
}


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    top = argparse.ArgumentParser(
        prog="focalkern",
        description="Preference training with fused losses.",
        epilog="focalkern COMMAND --help says more.\n\ncommands:\n"
        + "\n".join(f"  {name:<7} {text}" for name, text in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"focalkern {focalkern.__version__}")
    top.add_argument("command", metavar="COMMAND", choices=COMMANDS, help=", ".join(COMMANDS))
    name = top.parse_args(given[:1]).command
    rest = given[1:]
    # Of transformers, about an option of its own that TRL sets.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
    try:
        command = importlib.import_module(f"focalkern.cli.{name}")
        if {"-h", "--help"} & set(rest) or name == "env":
            return command.run(_own_parser(name, command).parse_args(rest))  # --help exits
        from focalkern.cli.job import read_job
    except ImportError as error:
        top.exit(2, f'focalkern {name} needs the trl extra: pip install ".[trl]" in the clone ({error})\n')
    return command.run(read_job(_own_parser(name, command), command, rest))


def _own_parser(name: str, command: ModuleType) -> argparse.ArgumentParser:
    """The options of the command itself; TRL's are a thousand lines."""
    parser = argparse.ArgumentParser(
        prog=f"focalkern {name}",
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if name != "env":
        parser.add_argument("recipe", metavar="RECIPE", nargs="?", help="a YAML file, as in examples/recipes")
        parser.add_argument("--help-all", action="store_true", help="list all fields")
    command.add_arguments(parser)
    return parser
