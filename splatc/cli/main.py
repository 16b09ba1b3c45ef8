"""The command line: ``splatc`` and ``python -m splatc``. One module a group of commands; errors end here."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from splatc.cli import bench, build, cache, demo, doctor, look, tune
from splatc.config import Config, start_logging
from splatc.errors import InvalidInput, SplatcError

app = typer.Typer(
    name="splatc",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Compiles the geometry of an attention mask into fused kernels.",
    epilog="Exit codes: 0 fine, 1 failed, 2 wrong input, 130 interrupted. `splatc COMMAND --help` has examples.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

look.add_to(app)
build.add_to(app)
demo.add_to(app)
bench.add_to(app)
tune.add_to(app)
app.add_typer(cache.app, name="cache")
doctor.add_to(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        try:
            print(f"splatc {metadata.version('splatc')}")
        except metadata.PackageNotFoundError:
            print("splatc (a source tree that is not installed)")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of splatc itself."""
    start_logging(Config.from_env().log_level)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; a wrong input is one line on stderr, never a traceback."""
    try:
        code = app(args=None if arguments is None else list(arguments), prog_name="splatc", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except SplatcError as error:
        return _fail(str(error), 2 if isinstance(error, InvalidInput) else 1)
    except BrokenPipeError:  # `splatc ... | head`: whoever read us has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except typer.Abort as error:
        return 130 if isinstance(error.__cause__, KeyboardInterrupt) else _fail("stopped", 1)
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), 1)
    except MemoryError:
        return _fail("out of memory: use a smaller --seq-len, or a symbolic pattern in place of a matrix", 1)
    except Exception as error:
        message = getattr(error, "format_message", None)  # of a usage error: wrong option, missing argument, ...
        if message is None:
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            print(message())
            return 0
        context = getattr(error, "ctx", None)
        where = context.command_path if context else "splatc"
        return _fail(f"{message()} (see `{where} --help`)", 2)


def _fail(message: str, code: int) -> int:
    print(f"splatc: {message}", file=sys.stderr)
    return code


def main() -> NoReturn:
    """The entry point."""
    sys.exit(run())
