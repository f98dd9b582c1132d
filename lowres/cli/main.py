"""The `lowres` command. Each subcommand is one file, imported when it is called.

Exit codes: 0 ok, 1 failed, 2 wrong input, 3 does not fit, 130 interrupted.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

COMMANDS = (
    "list",
    "show",
    "check",
    "plan",
    "advise",
    "fit",
    "run",
    "report",
    "export",
    "bench",
    "doctor",
    "schema",
)


class _Lazy(TyperGroup):
    """Imports a subcommand's file when it is asked for;
    `lowres list` must not wait for `lowres run`.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"lowres.cli.{cmd_name}")
        # Without completion options typer turns a one-command app into the bare command.
        command = get_command(module.app)
        command.name = cmd_name
        return command


app = typer.Typer(
    cls=_Lazy,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune a language model on the card you have.",
)


@app.callback()
def _root() -> None:
    pass


def _read(arguments: list[str]) -> list[str]:
    """`--resume` alone means `--resume latest`; the option parser knows no optional values.

    A value is what follows, unless it is an option or a recipe: checkpoints are folders, and one
    that is not there is to be told as such.
    """
    out = []
    for word, following in zip(arguments, [*arguments[1:], "--"], strict=False):
        if word == "--resume":
            recipe = following.endswith((".yaml", ".yml")) or os.path.isfile(following)
            named = bool(following) and not following.startswith("-") and not recipe
            word = word if named else "--resume=latest"
        out.append(_at_home(word))
    return out


def _at_home(word: str) -> str:
    """`~` expanded, which shells do not do after `--option=`, and some nowhere."""
    option, equals, value = word.partition("=")
    if equals and option.startswith("--"):
        return f"{option}={_at_home(value)}" if value.startswith("~") else word
    return os.path.expanduser(word) if word.startswith("~") else word


def main() -> None:
    """Run the command line; every known failure is one message and an exit code."""
    from lowres.core.errors import LowresError, OutOfMemory

    sys.argv[1:] = _read(sys.argv[1:])
    try:
        app()
    except LowresError as error:
        # Of several processes one speaks, but memory may run out in any.
        if os.environ.get("RANK", "0") == "0" or isinstance(error, OutOfMemory):
            print(f"lowres: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        # A folder that may not be entered, a disk that is full: what the system says is the reason.
        print(f"lowres: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("lowres: interrupted", file=sys.stderr)
        sys.exit(130)
