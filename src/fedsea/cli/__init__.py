"""The `fedsea` command: what goes for all its subcommands. Each of them has a file of its own."""

import os
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedsea.cli.terminal import open_streams, tell_error
from fedsea.errors import FedSEAError, UsageError
from fedsea.threads import let_idle_threads_sleep

if TYPE_CHECKING:
    import click

DEBUG = "FEDSEA_DEBUG"


def main() -> int:
    """Run the command that `sys.argv` names; returns the exit code."""
    let_idle_threads_sleep()
    open_streams()
    # What these libraries print about themselves is nothing that a user can act upon.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    if os.environ.get("COLUMNS") == "0":  # "unknown" to a shell; rich would print nothing
        del os.environ["COLUMNS"]
    if not sys.stderr.isatty():  # their progress bars would fill a log
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    return run(sys.argv[1:])


def run(arguments: Sequence[str]) -> int:
    """Run one command.

    Parameters
    ----------
    arguments
        What stands after `fedsea` on the command line.

    Returns
    -------
    int
        Exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted. An error has been told in one line on standard
        error; the environment variable FEDSEA_DEBUG adds its traceback.
    """
    import click

    try:
        return _outcome(arguments)
    except click.ClickException as error:
        return _fail(_usage(error), error, error.exit_code)
    except FedSEAError as error:
        return _fail(str(error), error, 2 if isinstance(error, UsageError) else 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever reads the output has gone (`fedsea … | head`); spare Python's complaint when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        hint = "" if os.environ.get(DEBUG) else f"; {DEBUG}=1 shows where"
        return _fail(f"unexpected {type(error).__name__}: {error}{hint}", error, 1)


def _outcome(arguments: Sequence[str]) -> int:
    import click

    from fedsea.cli.app import app

    try:
        outcome = app(list(arguments), prog_name="fedsea", standalone_mode=False, obj=tuple(arguments))
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        outcome = error.exit_code
    if sys.stdout is not None:
        sys.stdout.flush()  # now, as long as there is somebody to tell that the disk is full
    return outcome if isinstance(outcome, int) else 0


def _usage(error: "click.ClickException") -> str:
    context: click.Context | None = getattr(error, "ctx", None)
    help_line = f" (see: {context.command_path} --help)" if context is not None else ""
    return error.format_message().rstrip(".") + help_line


def _fail(message: str, error: Exception, code: int) -> int:
    if os.environ.get(DEBUG):
        traceback.print_exception(error)
    tell_error(message)
    return code
