"""`python -m kvcache_ext`: the command line."""

from __future__ import annotations

import argparse
import sys

from . import env


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kvcache_ext", description="An FP16 KV cache for PyTorch.")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    commands.add_parser("env", help="print what a bug report needs: versions, the build, CPU and GPUs")
    commands.add_parser(
        "plan", add_help=False, help="print what a cache and a model's weights take, and whether it fits"
    )
    chosen, rest = parser.parse_known_args(arguments)
    if chosen.command == "plan":
        return plan(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if chosen.command == "env":
        env.print_environment()
    else:
        parser.print_help()
    return 0


def plan(arguments: list[str]) -> int:
    from . import planning  # needs torch and the extension, which `env` is to do without

    parser = argparse.ArgumentParser(
        prog="python -m kvcache_ext plan",
        description="What a cache and a model's weights take together, and whether it fits. GB are 10^9 bytes.",
    )
    planning.add_arguments(parser)
    chosen = parser.parse_args(arguments)
    try:
        planning.print_plan(chosen)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
