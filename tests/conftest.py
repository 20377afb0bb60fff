"""``--device cuda`` runs the whole suite on a GPU; ``op``, ``backend``, ``sample`` and ``dtype`` are parametrised here."""

import os
from collections.abc import Iterator
from typing import Any

import pytest

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the deterministic mode of the NaN test asks for it

import torch

from pyml.backend import unusable
from pyml.ops import OPS, Op
from tests.cases import DTYPES, samples

# Under Triton's interpreter only its kernels are of interest, and only on inputs that take it seconds.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where the suite runs")
    parser.addoption("--full", action="store_true", help="also run what only `make test-full` runs")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        skip = pytest.mark.skip(reason="runs under `make test-full`")
        for item in items:
            if item.get_closest_marker("full"):
                item.add_marker(skip)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "samples(*flags): only the samples of an op that have all of these flags")
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: no GPU is visible to torch")


def backends(op: Op, device: str) -> list[Any]:
    """Every backend for this kind of device; one that cannot run is skipped with its reason."""
    names = ["triton"] if INTERPRETED else ["reference", "cpp" if device == "cpu" else "cuda", "triton"]
    return [
        pytest.param(name, marks=pytest.mark.skip(reason=f"{name}: {reason}")) if reason else pytest.param(name)
        for name, reason in ((name, unusable(op, name, device)) for name in names)
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One parameter set a test, in the order op, backend, sample, dtype, as far as the test asks for them.

    The marker ``samples("tiny", "smooth")`` narrows the samples to those with all of these flags.
    """
    names = [n for n in ("op", "backend", "sample", "dtype") if n in metafunc.fixturenames]
    if "op" not in names:
        return
    device = metafunc.config.getoption("--device")
    marker = metafunc.definition.get_closest_marker("samples")
    flags = [*(marker.args if marker else ()), *(("tiny",) if INTERPRETED else ())]
    sets = []
    for op in OPS.values():
        for backend in backends(op, device) if "backend" in names else [pytest.param(None)]:
            chosen = [s for s in samples(op) if all(getattr(s, flag) for flag in flags)] if "sample" in names else [None]
            kinds = DTYPES if "dtype" in names else [None]
            if backend.marks:  # one skip says it all
                chosen, kinds = chosen[:1], kinds[:1]
            for sample in chosen:
                for dtype in kinds:
                    full = {"op": op, "backend": backend.values[0], "sample": sample, "dtype": dtype}
                    label = [op.name, full["backend"], sample and sample.id, dtype and str(dtype).removeprefix("torch.")]
                    sets.append(
                        pytest.param(*(full[n] for n in names), marks=backend.marks, id="-".join(filter(None, label)))
                    )
    metafunc.parametrize(names, sets)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--device")


@pytest.fixture(autouse=True)
def _same_threads_and_numbers() -> Iterator[None]:
    """A test that changes the thread count or the random state leaves neither to the next one."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
