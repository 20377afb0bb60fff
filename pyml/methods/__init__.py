"""Training of the methods that need the kernels, one folder a method.

A folder joins `pyml train` and `pyml predict` by having a module ``commands`` with the functions ``train`` and
``predict`` (typer options as arguments); nothing else has to name it. What methods share: ``_recipe`` (options and
their checks), ``_options`` (the command line), ``_sweep`` (networks x seeds, metrics, tables), ``_engine`` (the
training loop, run folders), ``_checkpoint``, ``_measure``, ``_pictures``.
"""

import pkgutil


class UserError(ValueError):
    """Wrong data, options or files: one sentence that says what was expected and what came."""


class Stopped(Exception):
    """Ctrl-C, with one sentence that says what was kept."""


def first_line(error: BaseException) -> str:
    """What a library's error says, in one line; its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def method_names() -> list[str]:
    """Names of the method folders, sorted."""
    return sorted(item.name for item in pkgutil.iter_modules(__path__) if item.ispkg)
