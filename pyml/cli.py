"""The command line: ``pyml info | verify | demo | bench | train METHOD | predict METHOD | heads COMMAND``.

`train` and `predict` hold one sub-command per folder of pyml/methods (see there). Errors are one sentence on stderr:
exit code 2 for wrong options, 1 for everything else, 130 after Ctrl-C. ``--debug``, anywhere, shows the traceback.
"""

import importlib
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from pyml._version import __version__
from pyml.backend import BackendError
from pyml.methods import Stopped, UserError, method_names

STOPPED = "stopped; what was saved stays (pyml train goes on with --resume)"

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fused kernels for KAN layers and other methods: what runs here, how fast it is, and training with it.",
)
train_app = typer.Typer(no_args_is_help=True, help="Train a method; every method has its own options.")
predict_app = typer.Typer(no_args_is_help=True, help="Run a trained method on new data.")
app.add_typer(train_app, name="train")
app.add_typer(predict_app, name="predict")


class _Heads(typer.core.TyperGroup):
    """Its commands are those of pyml.heads, which is imported when they are asked for."""

    @property
    def commands(self) -> Any:  # type: ignore[override]
        from pyml.heads.commands import app as found

        return typer.main.get_command(found).commands  # type: ignore[attr-defined]

    @commands.setter
    def commands(self, value: Any) -> None:
        """Typer gives none."""


heads_app = typer.Typer(cls=_Heads, no_args_is_help=True, help="Find, tune and steer heads of a local causal LM.")
app.add_typer(heads_app, name="heads")

for _name in method_names():
    _commands = importlib.import_module(f"pyml.methods.{_name}.commands")
    train_app.command(_name)(_commands.train)
    predict_app.command(_name)(_commands.predict)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pyml {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and stop.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """``main`` has already taken ``--debug`` out; it is declared here for the help."""


@app.command()
def info(
    ops: Annotated[bool, typer.Option("--ops", help="Also list what every op promises.")] = False,
) -> None:
    """Versions, and which backends every op can use here, with the reason where one cannot run."""
    from pyml import info as information

    _exit(information.main(ops=ops))


@app.command()
def verify(
    device: Annotated[str, typer.Option(help="auto, cpu or cuda: where to run the op suite.")] = "cpu",
) -> None:
    """Run every op of every backend against its reference (some minutes at first); GPU kernels that pass are used."""
    from pyml.methods._options import choose_device
    from pyml.testing import verify as verification

    _exit(verification.main(device=choose_device(device) if device == "auto" else device))


@app.command()
def demo(
    out: Annotated[
        Path | None, typer.Option(help="Folder for the change map and the numbers. Default: runs/demo-<time>.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads; torch's own choice when left out.", min=1)] = None,
) -> None:
    """Train SpectralKAN on a generated scene, draw the change map, and show what the kernels gained (a minute)."""
    from pyml.methods.spectralkan import demo as demonstration

    demonstration.main(out, device=device, threads=threads)


@app.command()
def bench(
    families: Annotated[
        list[str] | None,
        typer.Argument(metavar="[FAMILY]...", help="Families to measure (bspline, ...). Default: all."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu or cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads. Default: 1 and 2.", min=1)] = None,
    dtype: Annotated[str, typer.Option(help="float32, float64, bfloat16 or float16; several with commas.")] = "float32",
    only: Annotated[str | None, typer.Option(help="Only cases whose name contains this.")] = None,
    budget: Annotated[
        float | None, typer.Option(help="Seconds for the run; what does not fit is listed.", min=1)
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer cases and repetitions.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Folder for CSV, Markdown and PNG. Default: bench-results/<date>.")
    ] = None,
    compare: Annotated[Path | None, typer.Option(help="An older CSV: show what became slower.")] = None,
) -> None:
    """Measure every kernel against pure torch and the rivals that are installed here (an hour; --quick: minutes)."""
    from pyml.benchmarks import run

    options = {
        "device": None if device == "auto" else device,
        "threads": threads,
        "dtype": dtype,
        "quick": quick,
        "out": out,
        "compare": compare,
    }
    _exit(run.main(families or [], **options, only=only, budget=budget))


def _exit(code: Any) -> None:
    """A command's integer result is the exit code."""
    if isinstance(code, int) and code:
        raise typer.Exit(code)


def _one_line(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> str:
    return f"warning: {message}\n"


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    if not debug:
        warnings.formatwarning = _one_line  # type: ignore[assignment]
    try:
        code = app(arguments, prog_name="pyml", standalone_mode=False) or 0
    except Exception as error:
        if debug:
            raise
        return _explain(error)
    return _fail(STOPPED, code) if code == 130 else code  # typer has turned Ctrl-C into this code


def _explain(error: Exception) -> int:
    usage = getattr(error, "format_message", None)  # the option parser's own errors
    if usage is not None:
        context = getattr(error, "ctx", None)
        where = f" (see {context.command_path} --help)" if context is not None else ""
        sentence = usage()
        return _fail(f"{sentence.rstrip('.')}{where}", 2) if sentence else 2
    if type(error).__name__ == "Abort":
        return _fail(STOPPED, 130)
    if isinstance(error, Stopped):
        return _fail(str(error), 130)
    sentence = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.partition(".")[0] != "pyml":
        sentence = f"this command needs the package {error.name}: pip install 'pyml[train]'"
    elif not isinstance(error, UserError | BackendError):
        sentence = f"{type(error).__name__}: {sentence} (--debug shows where)"
    return _fail(sentence, 1)


def _fail(sentence: str, code: int) -> int:
    sys.stderr.write(f"error: {sentence}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
