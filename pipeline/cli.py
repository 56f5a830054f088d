"""Returns exit codes: 0 done, 1 a stage failed, 2 wrong input, 3 a gate was not met, 130 interrupted.

The only place that turns an error into an exit code and a sentence on stderr. Nothing heavy is imported here or by the
commands' modules: `edgeship --help` answers at once.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import Any, NoReturn

import click

from edgeship.calibration.errors import EdgeshipError
from edgeship.pipeline.commands import (
    bench,
    compare,
    deploy,
    facts,
    judge,
    models,
    quantize,
    release,
    sensitivity,
    training,
)

DEBUG = "EDGESHIP_DEBUG"
INTERRUPTED = 130


class Edgeship(click.Group):
    """The command group; every error leaves it as an exit code, with one sentence as the last line on stderr."""

    def main(  # type: ignore[override]  # never returns: click's own signature is an overload on standalone_mode
        self, args: Sequence[str] | None = None, prog_name: str | None = "edgeship", **extra: Any
    ) -> NoReturn:
        """Runs the command and exits."""
        extra["standalone_mode"] = False
        previous = signal.signal(signal.SIGTERM, _interrupt) if _in_main_thread() else None
        hook = sys.unraisablehook
        try:
            result = super().main(args, prog_name, **extra)
            code = result if isinstance(result, int) else 0
            sys.stdout.flush()
        except BaseException as error:
            if isinstance(error, click.exceptions.Abort | KeyboardInterrupt) and not os.environ.get(DEBUG):
                sys.unraisablehook = _nothing_to_say
            code = report_error(error)
        finally:
            sys.unraisablehook = hook
            if previous is not None:
                signal.signal(signal.SIGTERM, previous)
        sys.exit(code)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order a newcomer meets them."""
        return list(self.commands)


def _nothing_to_say(_unraisable: object) -> None:
    """Objects that an interrupt left half made (a ZipFile) fail as they are destroyed, which says nothing to a user."""


def report_error(error: BaseException) -> int:
    """The exit code for `error`, after saying on stderr what failed: details first, the sentence last."""
    if os.environ.get(DEBUG):
        click.echo("".join(traceback.format_exception(error)), err=True)
    match error:
        case click.ClickException():
            error.show()
            return error.exit_code
        case click.exceptions.Abort() | KeyboardInterrupt():
            _say(["edgeship: interrupted; what was finished before is kept, nothing is half-written"])
            return INTERRUPTED
        case EdgeshipError():
            sentence, *details = str(error).splitlines() or [type(error).__name__]
            _say([*details, f"edgeship: {sentence}"])
            return error.exit_code
        case BrokenPipeError():
            _give_up_stdout()
            return 1
        case Exception():
            _say([f"edgeship: {_unforeseen(error)}"])
            return 1
        case _:
            raise error


def _unforeseen(error: Exception) -> str:
    """The sentence for an error that nobody raised on purpose."""
    cause = " ".join(str(error).split())[:300]
    if isinstance(error, MemoryError):
        return f"not enough memory{f': {cause}' if cause else ''}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'a file'} cannot be read or written: {error.strerror}"
    return f"unexpected {type(error).__name__}: {cause or 'no message'} ({DEBUG}=1 shows where)"


def _say(lines: Sequence[str]) -> None:
    try:
        for line in lines:
            click.echo(line, err=True)
    except BrokenPipeError:
        _give_up_stdout()


def _give_up_stdout() -> None:
    """Keeps Python from failing once more when it flushes a pipe that nobody reads."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _in_main_thread() -> bool:
    import threading

    return threading.current_thread() is threading.main_thread()


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@click.group(cls=Edgeship, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="edgeship", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, help=f"Show where an error came from (also {DEBUG}=1).")
def cli(debug: bool) -> None:
    """From a trained vision model to checked int8 artifacts for edge runtimes."""
    if debug:
        os.environ[DEBUG] = "1"


GROUPS = (facts, deploy, models, training, quantize, sensitivity, compare, judge, bench, release)
for command in (command for group in GROUPS for command in group.COMMANDS):
    cli.add_command(command)


def main() -> NoReturn:
    """Runs edgeship with the arguments of the process."""
    try:
        cli.main()
    except SystemExit as end:
        if end.code == INTERRUPTED:
            # A native library that ran Python code when the interrupt came makes CPython end itself by SIGINT, whatever
            # is returned (unhandled_keyboard_interrupt in pythonrun.c). Everything is cleaned up by now.
            sys.stderr.flush()
            os._exit(INTERRUPTED)
        raise


if __name__ == "__main__":
    main()
