"""The command line, `vitkd`. Exit codes: 0 done, 1 failed (one line says why), 2 wrong usage."""

import sys
from typing import Annotated

import typer

app = typer.Typer(
    help="Distil vision transformers into MobileNets, and run them in int8.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show an error's traceback.")] = False,
) -> None:
    # declared here for the help text; main reads it, which is where errors arrive
    del debug


@app.command()
def show() -> None:
    """Print versions, instruction sets, and the backend that serves each operation."""
    from ._show import show

    show()


@app.command()
def demo() -> None:
    """Distil a small vision transformer on scikit-learn's digits, and print what came out."""
    from ._demo import demo

    demo()


def main() -> None:
    """Runs the command line; an error becomes one line on stderr and exit code 1."""
    try:
        app()
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        why = next(iter(str(error).splitlines()), "no message")
        print(f"vitkd: {type(error).__name__}: {why} (traceback: vitkd --debug)", file=sys.stderr)
        sys.exit(1)
