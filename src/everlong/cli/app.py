"""The command line: one command a file, and what all of them share.

Results go to standard output, log lines and errors to standard error. Commands import their modules
when they run, so that ``--help`` is fast.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from everlong import __version__
from everlong.cli.bench import bench
from everlong.cli.data import data_audit, data_cache
from everlong.cli.demo import demo
from everlong.cli.evaluate import evaluate
from everlong.cli.fit import fit
from everlong.cli.recommend import recommend
from everlong.cli.serve import serve
from everlong.cli.upgrade import upgrade
from everlong.cli.verify import verify_log
from everlong.cli.words import in_words_of_command_line

MISTAKE, INTERRUPTED, FAULT = 2, 130, 1
"""Exit codes: invalid input, Ctrl-C, an internal error."""


class Commands(TyperGroup):
    """The root command, which prints an error as one line and sets the exit code."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Runs a command and handles its errors."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except (Exception, KeyboardInterrupt) as error:
            # typer prints its usage errors itself
            if hasattr(error, "exit_code") and hasattr(error, "show"):
                raise
            if _debugging(ctx):
                traceback.print_exc()
            code, line = explain(error)
            typer.echo(line, err=True)
            raise typer.Exit(code) from error


def explain(error: BaseException) -> tuple[int, str]:
    """The exit code and the message of an error."""
    from everlong.system.interrupt import Interrupted

    text = in_words_of_command_line(" ".join(str(error).split()))
    if isinstance(error, Interrupted):
        return INTERRUPTED, f"interrupted: {text}"
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted"
    if isinstance(error, ValueError | OSError | ImportError):
        return MISTAKE, f"error: {text or type(error).__name__}"
    kind = type(error).__name__
    return FAULT, f"fault: {kind}: {text}; run again with --debug and report its output"


def _debugging(ctx: typer.Context) -> bool:
    return bool(ctx.params.get("debug")) or os.environ.get("EVERLONG_DEBUG") == "1"


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Sequential recommendation over whole user histories at a constant cost per event.",
)


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Warnings only.")] = False,
) -> None:
    """Configures logging, or prints the version."""
    if version:
        typer.echo(__version__)
        raise typer.Exit
    logging.basicConfig(
        level=logging.WARNING if quiet else logging.INFO,
        format="%(levelname)s %(message)s" if debug else "%(message)s",
        stream=sys.stderr,
    )


for command in (demo, fit, evaluate, recommend, serve, upgrade, bench):
    app.command()(command)
app.command("verify")(verify_log)

data_app = typer.Typer(no_args_is_help=True, help="Audit a log, or write its event cache.")
data_app.command("audit")(data_audit)
data_app.command("cache")(data_cache)
app.add_typer(data_app, name="data")
