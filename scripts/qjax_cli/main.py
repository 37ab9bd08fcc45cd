# SPDX-License-Identifier: Apache-2.0
"""The `qjax` command: finds the subcommand, turns what goes wrong into one line and an exit code.

Only the subcommand that was called is imported, so that `qjax --help` does not wait for JAX.
"""

import argparse
import gc
import importlib
import logging
import os
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from qjax_cli import huge_pages
from qjax_cli.console import Console

# Name, module, and the line that `qjax --help` shows.
COMMANDS = {
    "demo": ("qjax_cli.demo.command", "the main job on the model that ships with qjax"),
    "quantize": ("qjax_cli.quantize", "make a smaller model directory"),
    "qat": ("qjax_cli.qat.command", "train a model with fake quantization, save it quantized"),
    "eval": ("qjax_cli.eval", "perplexity on text or tokens, and distance from a baseline"),
    "generate": ("qjax_cli.generate", "continue a prompt"),
    "bench": (
        "qjax_cli.bench.command",
        "time products on this machine, against bfloat16, XLA and the limits",
    ),
    "inspect": ("qjax_cli.inspect", "what each layer holds and how it is multiplied"),
}

FAILED, BAD_ARGUMENTS, INTERRUPTED = 1, 2, 130


class Parser(argparse.ArgumentParser):
    """An argparse parser whose complaint is one line."""

    def error(self, message: str) -> NoReturn:
        """Says what is wrong with the arguments and exits with 2."""
        self.exit(BAD_ARGUMENTS, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      argv: the arguments; those of the process if None.

    Returns:
      0, 1 when the job failed, 130 when it was interrupted; bad arguments exit with 2.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    name, rest = _subcommand(arguments)
    # JAX's compiler logs to stderr, where users look for our one line.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        return _run(name, rest)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        line = " ".join(str(error).split()) or type(error).__name__
        print(f"qjax {name}: error: {line}", file=sys.stderr)
        return FAILED
    except Exception as error:
        # Nothing that a user does should end here; where it does, one line must say whose fault it is.
        place = traceback.extract_tb(error.__traceback__)[-1]
        line = " ".join(str(error).split())[:300]
        print(
            f"qjax {name}: error: {type(error).__name__} in {place.filename}:{place.lineno}: {line}; "
            "this is a fault of qjax, please report it",
            file=sys.stderr,
        )
        return FAILED
    except KeyboardInterrupt:
        print(f"qjax {name}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _run(name: str, arguments: list[str]) -> int:
    module = _imported(COMMANDS[name][0])
    parser = Parser(
        prog=f"qjax {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object on stdout, nothing else"
    )
    module.add_arguments(parser)
    args = parser.parse_args(arguments)
    module.run(args, Console(json_only=args.json))
    return 0


def _imported(name: str) -> Any:
    gc.disable()  # what an import makes stays: to look for garbage in it takes a quarter of a second
    try:
        return importlib.import_module(name)
    finally:
        gc.enable()


def _subcommand(arguments: list[str]) -> tuple[str, list[str]]:
    commands = "\n".join(f"  {name:<10} {line}" for name, (_, line) in COMMANDS.items())
    parser = Parser(
        prog="qjax",
        usage="qjax COMMAND [options]",
        description="Quantize JAX/Flax models, run them, take them to and from Hugging Face.",
        epilog=f"commands:\n{commands}\n\n"
        "example:\n  qjax quantize ./Llama-3.2-1B ./Llama-3.2-1B-w4 --scheme w4a16-g128\n\n"
        "qjax COMMAND --help tells the rest.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    return parser.parse_args(arguments[:1]).command, arguments[1:]


def entry() -> NoReturn:
    """What the installed command calls: :func:`main` in a process of its own.

    Libraries below Orbax report a failed write or read from threads of theirs, through logs and Python's
    hooks, hundreds of lines of them, some when the interpreter is already closing. All errors that matter
    arrive in `main` as exceptions, so here those voices are turned off.
    """
    huge_pages.ask()
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    sys.excepthook = sys.unraisablehook = threading.excepthook = lambda *_: None
    status = main()
    if status == 0:
        gc.freeze()  # the interpreter's last look for garbage would take a third of a second
        sys.exit(0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    entry()
