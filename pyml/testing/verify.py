"""`pyml verify`: every kernel that can run here, against the float64 truth, forward and backward.

It takes some minutes where Triton has to compile its kernels first. What passes is noted in the user's cache, and only
then does pyml choose a GPU kernel by itself.
"""

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from pyml.backend import kernels, load_extension, read_stamps, stamp_key, stamp_path, unusable, verified_here
from pyml.ops import OPS, Op
from pyml.testing.compare import check
from pyml.testing.samples import DTYPES, samples

BACKENDS = {"cpu": ("cpp", "triton"), "cuda": ("cuda", "triton")}


def verify_op(op: Op, backend: str, device: str) -> tuple[int, list[str]]:
    """Run all samples of an op in all dtypes: how many ran, and one line for each that broke the error rule."""
    ran, failures = 0, []
    for sample in samples(op):
        for dtype in DTYPES:
            ran += 1
            try:
                check(op, sample, backend, dtype, device)
            except Exception as error:  # a kernel can fail in any way; each is reported and none is stamped
                text = str(error).strip().splitlines() or ["no message"]
                failures.append(f"{sample.id} {dtype}: {type(error).__name__}: {text[0]}")
                if device == "cuda" and _gpu_is_lost():
                    return ran, [*failures, "the GPU stopped answering: no further sample was run"]
    return ran, failures


def _gpu_is_lost() -> bool:
    """After an illegal access every later call fails: going on would blame the innocent."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def write_stamp(device: str, passed: dict[str, list[str]]) -> Path:
    """Note the backends that passed, for these versions on this machine; what other versions noted stays."""
    path, stamps = stamp_path(), read_stamps()
    stamps[stamp_key(device)] = passed
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps(stamps, indent=1) + "\n")
    fresh.replace(path)  # a reader never sees half a file
    verified_here.cache_clear()
    return path


def write_record(path: Path, commit: str, passed: dict[str, list[str]]) -> None:
    """For maintainers: put this GPU into the record that the package ships (pyml/verified.json)."""
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    record[torch.cuda.get_device_name()] = {
        "commit": commit,
        "kernels": kernels(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "ops": passed,
    }
    path.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


def main(device: str = "cpu", record: Path | None = None, commit: str | None = None) -> int:
    """Verify all kernels on one kind of device.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        record: a copy of pyml/verified.json to put this GPU into; needs ``commit``.
        commit: of the source that was built.

    Returns:
        0 when every kernel that ran passed, 1 when one failed or none could run, 2 for wrong arguments.
    """
    if device not in BACKENDS:
        return _complain(f"verify: device: expected cpu or cuda, got {device!r}", 2)
    if record and (device != "cuda" or not commit):
        return _complain("verify: --record: expected --device cuda and --commit, got one of them missing", 2)
    if device == "cuda" and not torch.cuda.is_available():
        return _complain("verify: device: expected a GPU that torch can see, got none", 1)

    from rich.table import Table

    from pyml.info import console

    out = console()
    table = Table(title=f"verified on {stamp_key(device)}", title_justify="left")
    for column in ("op", "backend", "samples", "result", "seconds"):
        table.add_column(column)
    passed: dict[str, list[str]] = {}
    broken: list[str] = []
    for op in OPS.values():
        for backend in BACKENDS[device]:
            if reason := unusable(op, backend, device):
                table.add_row(op.name, backend, "", f"skipped: {reason}", "")
                continue
            start = time.perf_counter()
            with out.status(f"{op.name} on {backend}"):
                ran, failures = verify_op(op, backend, device)
            result = f"{len(failures)} failed" if failures else "passed"
            table.add_row(op.name, backend, str(ran), result, f"{time.perf_counter() - start:.1f}")
            broken += [f"{op.name} on {backend}: {line}" for line in failures]
            if not failures:
                passed.setdefault(op.name, []).append(backend)
    out.print(table)
    for line in broken:
        out.print(line, markup=False)
    if not passed and not broken:
        return _complain(f"verify: no kernel can run here: {load_extension() or 'see the table'}", 1)
    path = write_stamp(device, passed)
    counts = Counter(backend for names in passed.values() for backend in names)
    out.print("noted in " + str(path) + ": " + (", ".join(f"{n} ops on {b}" for b, n in counts.items()) or "nothing"))
    if record and commit:
        write_record(record, commit, passed)
        out.print(f"recorded in {record}")
    return 1 if broken else 0


def _complain(sentence: str, code: int) -> int:
    print(sentence, file=sys.stderr)
    return code


def _command_line() -> int:
    parser = argparse.ArgumentParser(prog="pyml verify", description="Run every kernel against the reference.")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--record", type=Path, help="maintainers: put this GPU into this copy of pyml/verified.json")
    parser.add_argument("--commit", help="maintainers: the commit that was built, for --record")
    options = parser.parse_args()
    return main(options.device, options.record, options.commit)


if __name__ == "__main__":
    sys.exit(_command_line())
