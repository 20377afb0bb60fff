"""``--device cuda`` runs the suite on a GPU; ``op``, ``backend``, ``sample`` and ``dtype`` are parametrised here."""

import importlib.util
import itertools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the deterministic mode of the NaN test asks for it
# OpenMP threads that spin while they wait take the core that another process needs: the suite then costs twice the CPU
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # test_fuzz.py is skipped without it
    settings = None

from pyml.backend import unusable, use_backend
from pyml.ops import OPS, Op
from tests.cases import DTYPES, samples

# Under Triton's interpreter only its kernels are of interest, and only on inputs that take it seconds.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED and importlib.util.find_spec("triton"):
    from tests.interpreter import patch_once

    patch_once()


if settings is not None:
    _COMMON: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}
    settings.register_profile("short", max_examples=60, derandomize=True, **_COMMON)
    settings.register_profile("fuzz", max_examples=5000, **_COMMON)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where the suite runs")
    parser.addoption("--full", action="store_true", help="also run what only `make test-full` runs")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    if config.getoption("--device") != "cpu":
        same_there = pytest.mark.skip(reason="runs on a CPU whatever the device: `make test` has it")
        for item in items:
            if "device" not in item.fixturenames:  # the compilers, the nested sessions, the training of the methods
                item.add_marker(same_there)
    if not config.getoption("--full"):
        skip = pytest.mark.skip(reason="runs under `make test-full`")
        for item in items:
            if item.get_closest_marker("full"):
                item.add_marker(skip)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "samples(*flags): only the samples of an op that have all of these flags")
    config.addinivalue_line("markers", "ops(field): only the ops for which this field of Op is not empty")
    config.addinivalue_line("markers", "kernels: not for the reference, which is plain torch and no registered op")
    if settings is not None and not config.getoption("--hypothesis-profile", None):
        settings.load_profile("short")
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: no GPU is visible to torch")


def backends(op: Op, device: str, kernels_only: bool) -> list[Any]:
    """Every backend for this kind of device; one that cannot run is skipped with its reason."""
    names = ["triton"] if INTERPRETED else ["reference", "cpp" if device == "cpu" else "cuda", "triton"]
    names = [name for name in names if not (kernels_only and name == "reference")]
    return [
        pytest.param(name, marks=pytest.mark.skip(reason=f"{name}: {reason}")) if reason else pytest.param(name)
        for name, reason in ((name, unusable(op, name, device)) for name in names)
    ]


def dtypes_of(number: int) -> tuple[torch.dtype, ...]:
    """For a sample: every dtype; in the interpreter one of 16 bits, by turns, as these differ in loads and stores."""
    return (*DTYPES[:2], DTYPES[2 + number % 2]) if INTERPRETED else DTYPES


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One parameter set a test, in the order op, backend, sample, dtype, as far as the test asks for them; ``kernel``.

    The marker ``samples("tiny", "smooth")`` narrows the samples to those with all of these flags, and
    ``ops("mutates")`` the ops to those that write to an argument.
    """
    device = metafunc.config.getoption("--device")
    kernels_only = metafunc.definition.get_closest_marker("kernels") is not None
    if "kernel" in metafunc.fixturenames and hasattr(metafunc.module, "OP"):
        metafunc.parametrize("kernel", backends(metafunc.module.OP, device, kernels_only), indirect=True)
    asked = [n for n in ("op", "backend", "sample", "dtype") if n in metafunc.fixturenames]
    if "op" not in asked:
        return
    marker = metafunc.definition.get_closest_marker("samples")
    flags = [*(marker.args if marker else ()), *(("tiny",) if INTERPRETED else ())]
    field = metafunc.definition.get_closest_marker("ops")
    sets = []
    for op in OPS.values():
        if field and not getattr(op, field.args[0]):
            continue
        some = [s for s in samples(op) if all(getattr(s, flag) for flag in flags)] if "sample" in asked else [None]
        calls = [(s, kind) for n, s in enumerate(some) for kind in (dtypes_of(n) if "dtype" in asked else [None])]
        for backend in backends(op, device, kernels_only) if "backend" in asked else [pytest.param(None)]:
            combinations = itertools.product(backend.values, calls)
            for name, (sample, dtype) in itertools.islice(combinations, 1 if backend.marks else None):  # one says it
                values = {"op": op, "backend": name, "sample": sample, "dtype": dtype}
                label = [op.name, name, sample and sample.id, dtype and str(dtype).removeprefix("torch.")]
                identity = "-".join(filter(None, label))
                sets.append(pytest.param(*(values[n] for n in asked), marks=backend.marks, id=identity))
    metafunc.parametrize(asked, sets)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return request.config.getoption("--device")


@pytest.fixture
def kernel(request: pytest.FixtureRequest, device: str) -> Iterator[str]:
    """Each backend that can run ``OP`` of the test's module here; it runs whatever the test calls."""
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def on_device(device: str) -> Iterator[None]:
    """The tensors that a test makes lie where the suite runs, also where it does not say so."""
    with nullcontext() if device == "cpu" else torch.device(device):
        yield


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Run a command line of pyml in this process; its exit code, stdout and stderr."""
    from pyml import cli

    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # `cli.main` replaces it

    def call(*arguments: object) -> tuple[int, str, str]:
        code = cli.main([str(a) for a in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(autouse=True)
def _same_threads_and_numbers() -> Iterator[None]:
    """A test that changes the thread count or the random state leaves neither to the next one."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def unguarded() -> Callable[[], None]:
    """A call makes it as in a new process, where nothing has asked to refuse torch's fused optimizers yet."""

    def remove() -> None:
        from pyml.ops import _fused

        for handle in _fused.handles:
            handle.remove()
        _fused.handles.clear()

    return remove
