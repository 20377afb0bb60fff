"""`pyml info` and `python -m pyml.info`: versions, and which backend can run each op on this machine, or why not.

The same rows make the table of the README (`python -m pyml.info --readme README.md` rewrites it; a test compares).
"""

import argparse
import dataclasses
import functools
import json
import os
import platform
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pyml._version import __version__
from pyml.backend import BackendError, kernels, load_extension, pick, unusable
from pyml.ops import OPS, Capability, Op

if TYPE_CHECKING:
    from rich.console import Console

KERNELS = ("cpp", "cuda", "triton")
GPU = ("cuda", "triton")
NEVER = "compiled, never executed"
BEGIN, END = "<!-- backends: made by python -m pyml.info --readme README.md -->", "<!-- backends: end -->"


def console() -> "Console":
    """A console that keeps its tables whole when the output is no terminal."""
    from rich.console import Console

    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=150)


def versions() -> dict[str, str]:
    """What is installed, what the extension was built with, and what of it is in use."""
    facts = {
        "pyml": f"{__version__} ({Path(__file__).parent})",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _installed("triton"),
    }
    if reason := load_extension():
        facts["extension"] = f"not usable: {reason}"
    else:
        built = _build_info()
        standard = str(built["cplusplus"])[2:4]
        facts["extension"] = f"built with torch {built['torch']}, C++{standard}, compiler {built['compiler']}"
        facts["CPU instructions"] = f"{built['isa']} (PYML_CPU_ISA forces default, avx2 or avx512)"
        facts["CUDA kernels"] = built["cuda_arches"] if built["cuda"] else "not built"
    facts["CPU threads"] = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
    facts["GPU"] = ", ".join(gpus) or "none visible"
    return facts


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _build_info() -> dict[str, Any]:
    from pyml import _C

    return _C.build_info()


@functools.cache
def verified() -> dict[str, Any]:
    """The record kept in the repository: GPU -> commit, versions, and the kernels that passed `pyml verify` there."""
    return json.loads((files("pyml") / "verified.json").read_text())


def has_kernel(op: Op, backend: str) -> bool:
    """Whether the op has a kernel of its own for this backend."""
    return {"cpp": op.has_cpp, "cuda": op.has_cuda, "triton": op.has_triton}[backend]


def seen(op: Op, backend: str) -> str:
    """What is known of a GPU kernel anywhere: where it was verified and whether as it is now, or that it never ran."""
    if not has_kernel(op, backend):
        return "no kernel"
    records = [(gpu, r) for gpu, r in verified().items() if backend in r["ops"].get(op.name, [])]
    changed = {True: "", False: ", changed since"}
    places = [f"{gpu} at {r['commit']}{changed[r.get('kernels') == kernels()]}" for gpu, r in records]
    return f"verified on {', '.join(places)}" if places else NEVER


def usable_here(op: Op, backend: str) -> str | None:
    """Why this kernel cannot run on this machine, or None."""
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    return unusable(op, backend, "cuda" if backend in GPU and not interpreted else "cpu")


def markdown() -> str:
    """The README's table of ops and backends: what the repository knows, nothing about this machine."""
    lines = ["| family | op | `cpp` | `cuda` | `triton` |", "|---|---|---|---|---|"]
    for op in OPS.values():
        cells = [f"`{op.family}`", f"`{op.name}`", "tested on every change", *(seen(op, backend) for backend in GPU)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def in_readme(text: str) -> str:
    """The text of the README with its table made anew."""
    if BEGIN not in text or END not in text:
        raise ValueError(f"README: expected the lines {BEGIN} and {END}, got a text without them")
    head, rest = text.split(BEGIN, 1)
    return f"{head}{BEGIN}\n{markdown()}\n{END}{rest.split(END, 1)[1]}"


def main(ops: bool = False) -> int:
    """Print the tables; with ``ops`` also what every op promises. Returns the exit code, always 0."""
    from rich.table import Table

    warnings.simplefilter("ignore", RuntimeWarning)  # the table says why the reference would run
    out = console()
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in versions().items():
        table.add_row(name, value)
    out.print(table)

    reasons: list[str] = []

    def number(reason: str) -> int:
        if reason not in reasons:
            reasons.append(reason)
        return reasons.index(reason) + 1

    def chosen(op: Op, device: str) -> str:
        try:
            return pick(op, device, None)
        except BackendError as error:  # PYML_BACKEND asks for one that cannot run
            return f"error ({number('PYML_BACKEND: ' + str(error).partition(': ')[2])})"

    table = Table(title="which backend runs here", title_justify="left")
    for column in ("op", *KERNELS, "auto on cpu", *(["auto on cuda"] if torch.cuda.is_available() else [])):
        table.add_column(column)
    for op in OPS.values():
        cells = []
        for backend in KERNELS:
            reason = usable_here(op, backend)
            here = f"no ({number(reason)})" if reason else "yes"
            cells.append(f"{here}; {seen(op, backend)}" if backend in GPU else here)
        cells += [chosen(op, device) for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else []))]
        table.add_row(op.name, *cells)
    out.print(table)
    for place, reason in enumerate(reasons, 1):
        out.print(f"({place}) {reason}", markup=False)

    if ops:
        fields = [field.name for field in dataclasses.fields(Capability)]
        table = Table(title="what every op promises", title_justify="left")
        for column in ("op", *fields, "source"):
            table.add_column(column.replace("_", " "))
        for op in OPS.values():
            claims = [getattr(op.capability, field) for field in fields]
            shown = [{True: "yes", False: "no"}.get(claim, str(claim)) for claim in claims]
            table.add_row(op.name, *shown, f"pyml/ops/{op.family}.py")
        out.print(table)
    return 0


def _command_line() -> int:
    parser = argparse.ArgumentParser(prog="python -m pyml.info", description="What of pyml can run on this machine.")
    parser.add_argument("--ops", action="store_true", help="also list what every op promises")
    parser.add_argument("--readme", type=Path, help="rewrite the table of backends in this file and print nothing")
    options = parser.parse_args()
    if options.readme:
        options.readme.write_text(in_readme(options.readme.read_text()))
        return 0
    return main(ops=options.ops)


if __name__ == "__main__":
    sys.exit(_command_line())
