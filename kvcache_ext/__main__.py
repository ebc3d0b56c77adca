"""`python -m kvcache_ext`: the command line."""

from __future__ import annotations

import argparse
import sys

from . import env


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kvcache_ext", description="An FP16 KV cache for PyTorch.")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    commands.add_parser("env", help="print what a bug report needs: versions, the build, CPU and GPUs")
    chosen = parser.parse_args(arguments)
    if chosen.command == "env":
        env.print_environment()
    else:
        parser.print_help()
    return 0


if __name__ == "__main__":
    sys.exit(main())
