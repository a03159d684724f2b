"""The program: its commands, and the one place where an error becomes a message and an exit code."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from epic_fast import __version__
from epic_fast.cli.data import data_app
from epic_fast.cli.demo import demo
from epic_fast.cli.doctor import doctor
from epic_fast.cli.eval import evaluate
from epic_fast.cli.failures import exit_code_of
from epic_fast.cli.native import native
from epic_fast.cli.options import Debug
from epic_fast.cli.plot import plot_app
from epic_fast.cli.predict import predict
from epic_fast.cli.train import train


class Program(TyperGroup):
    """Turns whatever a command raises into one message on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (Exception, KeyboardInterrupt) as error:
            code = exit_code_of(error)
            if code is None:
                raise
            raise SystemExit(code) from error


app = typer.Typer(
    cls=Program,
    name="epic-fast",
    help="Prompt tuning on frozen image-text backbones.",
    epilog="Exit codes: 0 fine, 2 bad usage or configuration, 3 data, 4 device or run time, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"epic_fast {__version__}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Prompt tuning on frozen image-text backbones."""


app.command("demo")(demo)
app.command("train")(train)
app.command("eval")(evaluate)
app.command("predict")(predict)
app.add_typer(data_app, name="data")
app.add_typer(plot_app, name="plot")
app.command("native")(native)
app.command("doctor")(doctor)
