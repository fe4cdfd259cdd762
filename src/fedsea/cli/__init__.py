"""The room of commands, one file each. Here: what all of them share, from the process's start to its exit code."""

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
    # A user can do nothing about what these libraries print of themselves.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    if os.environ.get("COLUMNS") == "0":  # "unknown" to a shell; rich would print nothing
        del os.environ["COLUMNS"]
    if not sys.stderr.isatty():  # their progress bars would fill a log
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    return run(sys.argv[1:])


def run(arguments: Sequence[str]) -> int:
    """Run the command of these words after `fedsea`; returns its exit code.

    0 is done, 1 failed, 2 wrong usage, 130 interrupted. An error is one line on standard error; the environment
    variable FEDSEA_DEBUG adds its traceback.
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
        # The reader of the output has closed it (`fedsea … | head`); without this, Python complains when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        hint = "" if os.environ.get(DEBUG) else f"; {DEBUG}=1 shows where"
        return _fail(f"unexpected {type(error).__name__}: {error}{hint}", error, 1)


def _outcome(arguments: Sequence[str]) -> int:
    import click

    from fedsea.cli.app import app
    from fedsea.cli.old_flags import rewritten

    arguments = rewritten(arguments)
    try:
        outcome = app(list(arguments), prog_name="fedsea", standalone_mode=False, obj=tuple(arguments))
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        outcome = error.exit_code
    if sys.stdout is not None:
        sys.stdout.flush()  # now, while a full disk can still be reported
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
