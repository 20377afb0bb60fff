"""Which backend runs, what is said when it cannot, and the op suite under every other setting of this machine."""

import importlib.util
import json
import os
import platform
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import pyml
from pyml import backend, info
from pyml.backend import BackendError, load_extension, stamp_key
from pyml.ops import OPS
from pyml.testing import arguments, assert_accurate, samples, verify
from tests.conftest import INTERPRETED
from tests.op_helpers import GENERIC

OP = OPS["kan_linear"]
ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(INTERPRETED, reason="about the process that does not interpret")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch, tmp_path):
    """No choice made by the user's environment or cache, or remembered from another test."""
    for name in ("PYML_BACKEND", "PYML_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYML_CACHE", str(tmp_path / "cache"))
    for cached in (backend._auto, backend._warn_once, backend.verified_here):
        cached.cache_clear()
    yield
    for cached in (backend._auto, backend._warn_once, backend.verified_here):
        cached.cache_clear()


def a_call(name=None):
    sample = next(s for s in samples(OP) if s.tiny)
    return pyml.ops.kan_linear(**arguments(OP, sample, torch.float32, "cpu"), backend=name)


needs_extension = pytest.mark.skipif(load_extension() is not None, reason=str(load_extension()))


# --- choosing --------------------------------------------------------------------------------------------------------


@needs_extension
def test_argument_beats_context_beats_environment_beats_auto(monkeypatch):
    assert backend.pick(OP, "cpu", None) == "cpp"
    monkeypatch.setenv("PYML_BACKEND", "reference")
    assert backend.pick(OP, "cpu", None) == "reference"
    with pyml.use_backend("cpp"):
        assert backend.pick(OP, "cpu", None) == "cpp"
        assert backend.pick(OP, "cpu", "reference") == "reference"
        with pyml.use_backend("reference"):
            assert backend.pick(OP, "cpu", None) == "reference"
        assert backend.pick(OP, "cpu", None) == "cpp"
    assert backend.pick(OP, "cpu", None) == "reference"
    monkeypatch.setenv("PYML_BACKEND", "auto")
    assert backend.pick(OP, "cpu", None) == "cpp"


def test_context_is_left_after_an_error_and_is_of_one_thread():
    with pytest.raises(ZeroDivisionError), pyml.use_backend("reference"):
        raise ZeroDivisionError
    seen = []
    with pyml.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(getattr(backend._forced, "name", None)))
        thread.start()
        thread.join()
    assert seen == [None] and getattr(backend._forced, "name", None) is None


def test_forced_backend_that_cannot_run_raises_and_says_why(monkeypatch):
    with pytest.raises(BackendError, match=r"^kan_linear: backend 'cuda' cannot run: .+"):
        a_call("cuda")
    with pytest.raises(BackendError, match=r"^kan_linear: backend 'triton' cannot run: .+"):
        a_call("triton")
    with pytest.raises(BackendError, match="expected one of reference, cpp, cuda, triton, got 'fast'"):
        a_call("fast")
    monkeypatch.setenv("PYML_BACKEND", "fast")
    with pytest.raises(BackendError, match="expected one of reference, cpp, cuda, triton, got 'fast'"):
        a_call()


def test_without_the_extension_the_reference_runs_with_one_warning(monkeypatch):
    monkeypatch.setattr(backend, "load_extension", lambda: "the extension pyml._C is not built")
    backend._unusable.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="slow reference: the extension pyml._C is not built") as caught:
            assert backend.pick(OP, "cpu", None) == "reference"
            assert backend.pick(OP, "cpu", None) == "reference"
        assert len(caught) == 1
        with pytest.raises(BackendError, match="'cpp' cannot run: the extension pyml"):
            backend.pick(OP, "cpu", "cpp")
    finally:
        backend._unusable.cache_clear()


def test_gpu_kernels_wait_for_verify(monkeypatch):
    """As on a GPU: nothing is chosen by itself before the stamp, and then the preferred backend that passed."""
    monkeypatch.setattr(backend, "unusable", lambda op, name, device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Test GPU")
    with pytest.warns(RuntimeWarning, match="pyml verify --device cuda"):
        assert backend.pick(OP, "cuda", None) == "reference"
    assert backend.pick(OP, "cuda", OP.cuda_preference[0]) == OP.cuda_preference[0]
    for passed in (["cuda"], ["triton"], ["cuda", "triton"]):
        verify.write_stamp("cuda", {OP.name: passed})
        backend._auto.cache_clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            chosen = backend.pick(OP, "cuda", None)
        assert chosen == next(name for name in OP.cuda_preference if name in passed)
    verify.write_stamp("cuda", {"another_op": ["cuda"]})
    backend._auto.cache_clear()
    assert backend.pick(OP, "cuda", None) == "reference"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep caches elsewhere")
def test_the_cache_needs_no_other_package(monkeypatch, tmp_path):
    """`make gpu-build` installs pyml alone."""
    monkeypatch.delenv("PYML_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert backend.cache_folder() == tmp_path / "pyml"
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    assert backend.cache_folder() == tmp_path / "pyml"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert backend.cache_folder() == Path.home() / ".cache" / "pyml"


def test_stamp_of_other_versions_stays_and_a_broken_one_is_replaced(monkeypatch):
    path = backend.stamp_path()
    path.parent.mkdir(parents=True)
    path.write_text('{"another machine": {"kan_linear": ["cuda"]}}')
    verify.write_stamp("cpu", {"kan_linear": ["cpp"]})
    assert json.loads(path.read_text()) == {
        "another machine": {"kan_linear": ["cuda"]},
        stamp_key("cpu"): {"kan_linear": ["cpp"]},
    }
    key = json.dumps(stamp_key("cpu"))
    for broken in ('{"cut o', "", "[]", "7", "null", "\x00", f"{{{key}: 3}}", f'{{{key}: {{"kan_linear": "cpp"}}}}'):
        path.write_text(broken)
        backend.verified_here.cache_clear()
        assert backend.verified_here("cpu") == {}, broken
        verify.write_stamp("cpu", {"kan_linear": ["cpp"]})
        assert backend.verified_here("cpu") == {"kan_linear": ["cpp"]}
    path.write_bytes(b"\xff\xfe{")
    assert backend.read_stamps() == {}


@pytest.fixture
def kernels_of(monkeypatch):
    """The fingerprint of kernels that were built from these sources with this folder of Triton kernels."""
    find = importlib.util.find_spec

    def use(sources: str, folder: Path) -> str:
        spec = SimpleNamespace(submodule_search_locations=[str(folder)])
        monkeypatch.setattr(backend, "built_facts", lambda: {"sources": sources})
        monkeypatch.setattr(
            backend.importlib.util, "find_spec", lambda name: spec if name == "pyml.triton_kernels" else find(name)
        )
        backend.kernels.cache_clear()
        backend.verified_here.cache_clear()
        return backend.kernels()

    yield use
    backend.kernels.cache_clear()


def test_changed_kernels_count_as_not_verified(kernels_of, tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton/one.py").write_text("a = 1\n")
    first = kernels_of("0123", tmp_path / "triton")
    verify.write_stamp("cpu", {OP.name: ["cpp"]})
    assert backend.verified_here("cpu") == {OP.name: ["cpp"]}
    assert kernels_of("4567", tmp_path / "triton") != first, "built anew from other sources"
    assert backend.verified_here("cpu") == {}
    (tmp_path / "triton/one.py").write_text("a = 2\n")
    assert kernels_of("0123", tmp_path / "triton") != first, "a Triton kernel was edited"
    assert backend.verified_here("cpu") == {}
    (tmp_path / "triton/one.py").write_text("a = 1\n")
    assert kernels_of("0123", tmp_path / "triton") == first
    assert backend.verified_here("cpu") == {OP.name: ["cpp"]}


def test_the_installed_triton_kernels_are_in_the_fingerprint():
    spec = importlib.util.find_spec("pyml.triton_kernels")
    assert spec and "bspline.py" in {
        p.name for folder in spec.submodule_search_locations for p in Path(folder).iterdir()
    }


@pytest.mark.parametrize(
    ("arches", "gpu", "runs"),
    [
        ("8.0;9.0", (9, 0), True), ("8.0", (8, 9), True), ("8.9", (8, 0), False), ("8.0;9.0", (10, 0), False),
        ("8.0;9.0+PTX", (10, 0), True), ("10.0+PTX", (9, 0), False), ("9.0a", (9, 0), True), ("9.0a", (9, 1), False),
        ("9.0a+PTX", (10, 0), False), ("10.0f", (10, 3), True), ("7.5 12.0", (12, 0), True), ("Hopper", (9, 0), True),
    ],
)  # fmt: skip
def test_code_for_other_gpus_does_not_count_as_usable(arches, gpu, runs, monkeypatch):
    assert backend.arches_run_on(arches, gpu) == runs
    facts = SimpleNamespace(build_info=lambda: {"cuda": True, "cuda_arches": arches})
    monkeypatch.setitem(sys.modules, "pyml._C", facts)
    monkeypatch.setattr(pyml, "_C", facts, raising=False)
    monkeypatch.setattr(backend, "load_extension", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: gpu)
    backend._unusable.cache_clear()
    try:
        reason = backend.unusable(OP, "cuda", "cuda")
    finally:
        backend._unusable.cache_clear()
    here = f"{gpu[0]}.{gpu[1]}"
    refused = f"pyml was built for GPUs {arches} and this one is {here}: rebuild with TORCH_CUDA_ARCH_LIST={here}"
    assert reason == (None if runs else refused)


# --- pyml verify and the error rule ----------------------------------------------------------------------------------


def test_error_rule():
    truth = torch.linspace(-8, 8, 100, dtype=torch.float64).view(10, 10)
    same = truth.float()
    assert_accurate("y", same, truth, same)
    assert_accurate("y", truth, truth, truth)
    slightly = same.clone()
    slightly[3, 4] += 3e-5
    with pytest.raises(AssertionError, match=r"^y\[3, 4\]: error 3.\d+e-05 is above 4.\d+e-06 .*1 of 100 entries"):
        assert_accurate("y", slightly, truth, same)
    assert_accurate("y", slightly, truth, same + 2e-5)  # torch itself is as far off
    for bad in (float("nan"), float("inf")):
        broken = same.clone()
        broken[0, 1] = bad
        with pytest.raises(AssertionError, match=r"^y\[0, 1\]"):
            assert_accurate("y", broken, truth, same)
    with pytest.raises(AssertionError, match=r"expected shape \[10, 10\], got \[10\]"):
        assert_accurate("y", same[0], truth, same)
    with pytest.raises(AssertionError, match=r"expected dtype torch\.float32, got torch\.float64"):
        assert_accurate("y", truth, truth, same)
    wrong = truth.clone()
    wrong[2, 2] += 1e-10
    with pytest.raises(AssertionError, match=r"y\[2, 2\]: error 1e-10"):
        assert_accurate("y", wrong, truth, truth)
    nothing = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(AssertionError, match="above 0"):  # where the truth is 0 everywhere, so is the result
        assert_accurate("y", torch.full((3,), 1e-30), nothing, nothing.float())


@needs_extension
def test_verify_reports_a_broken_kernel_and_does_not_stamp_it(monkeypatch, capsys):
    only = {name: OPS[name] for name in ("bspline_basis",)}
    monkeypatch.setattr(verify, "OPS", only)
    few = [s for s in samples(OPS["bspline_basis"]) if s.tiny]
    monkeypatch.setattr(verify, "samples", lambda op: few)
    assert verify.main("cpu") == 0
    assert backend.verified_here("cpu")["bspline_basis"] == ["cpp"]
    assert "passed" in capsys.readouterr().out

    right = OPS["bspline_basis"].run["cpp"]
    monkeypatch.setitem(OPS["bspline_basis"].run, "cpp", lambda *a: right(*a) * 1.001)
    assert verify.main("cpu") == 1
    assert backend.verified_here("cpu") == {}
    printed = capsys.readouterr().out
    assert "failed" in printed and "bspline_basis on cpp: smooth" in printed and "error" in printed


def test_verify_with_wrong_arguments_says_so(capsys):
    assert verify.main("tpu") == 2
    assert capsys.readouterr().err == "verify: device: expected cpu or cuda, got 'tpu'\n"
    assert verify.main("cpu", record=Path("x.json"), commit="abc") == 2
    assert "--record: expected --device cuda and --commit" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert verify.main("cuda") == 1
        assert capsys.readouterr().err == "verify: device: expected a GPU that torch can see, got none\n"


def test_record_shows_in_info(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Test GPU")
    path = tmp_path / "verified.json"
    verify.write_record(path, "abc1234", {"kan_linear": ["triton"]})
    verify.write_record(path, "def5678", {"kan_linear": ["triton"], "wkan_linear": ["cuda"]})
    record = json.loads(path.read_text())
    assert list(record) == ["Test GPU"] and record["Test GPU"]["commit"] == "def5678"
    monkeypatch.setattr(info, "verified", lambda: record)
    assert info.seen(OPS["kan_linear"], "triton") == "verified on Test GPU at def5678"
    assert info.seen(OPS["kan_linear"], "cuda") == "compiled, never executed"
    assert "verified on Test GPU at def5678 |" in info.markdown()
    monkeypatch.setattr(info, "kernels", lambda: "other kernels")
    assert info.seen(OPS["kan_linear"], "triton") == "verified on Test GPU at def5678, changed since"


# --- pyml info -------------------------------------------------------------------------------------------------------


def run(*command: str, timeout: int = 900, **environment: str) -> subprocess.CompletedProcess:
    kept = {n: v for n, v in os.environ.items() if n not in ("PYTEST_ADDOPTS", "PYTEST_CURRENT_TEST")}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=kept | environment, capture_output=True, text=True, timeout=timeout
    )


def test_info_says_what_runs_and_why_not(monkeypatch):
    as_module = run("-m", "pyml.info", "--ops")
    assert as_module.returncode == 0 and as_module.stderr == ""
    for op in OPS:
        assert as_module.stdout.count(f" {op} ") == 2, "one row in each table"
    for word in ("torch", torch.__version__, "double backward", "any thread count", "auto on cpu"):
        assert word in as_module.stdout
    if not torch.cuda.is_available():
        assert "no (1)" in as_module.stdout and "\n(1) " in as_module.stdout
    as_command = run("-c", "import sys; from pyml.cli import main; sys.exit(main())", "info", "--ops")
    assert as_command.stdout == as_module.stdout, "`pyml info` and `python -m pyml.info` are the same"


def test_info_shows_a_backend_that_was_asked_for_and_cannot_run():
    shown = run("-m", "pyml.info", PYML_BACKEND="abacus")
    assert shown.returncode == 0 and "error (" in shown.stdout
    assert "PYML_BACKEND: expected one of reference, cpp, cuda, triton, got 'abacus'" in shown.stdout


def test_auto_undoes_a_forced_backend():
    with pyml.use_backend("reference"), pyml.use_backend("auto"):
        assert backend.pick(OPS["kan_linear"], "cpu", None) == ("cpp" if load_extension() is None else "reference")
    with pytest.raises(BackendError, match="expected one of reference, cpp, cuda, triton, got 'abacus'"):
        pyml.use_backend("abacus").__enter__()


@needs_extension
def test_an_unknown_instruction_set_is_refused_in_one_sentence():
    sentence = "PYML_CPU_ISA: expected default, avx2 or avx512, got 'avx1024'"
    imported = run("-c", "import torch\nfrom pyml import _C", PYML_CPU_ISA="avx1024")
    assert imported.returncode == 1 and imported.stderr.strip().splitlines()[-1] == f"ImportError: {sentence}"
    shown = run("-m", "pyml.info", PYML_CPU_ISA="avx1024")
    assert shown.returncode == 0 and f"pyml._C cannot be loaded: {sentence}" in " ".join(shown.stdout.split())
    for known in ("", "default", "avx2", "avx512"):
        assert run("-c", "import torch\nfrom pyml import _C", PYML_CPU_ISA=known).returncode == 0


# --- the op suite under other settings -------------------------------------------------------------------------------


def assert_passes(result: subprocess.CompletedProcess) -> None:
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    assert " passed" in result.stdout.splitlines()[-1]


@pytest.mark.slow
@needs_extension
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="one variant only on this processor")
@pytest.mark.parametrize("isa", ["default", "avx2"])
def test_every_instruction_set_agrees_with_the_reference(isa, device):
    """The variants that this processor would not choose by itself."""
    if device != "cpu":
        pytest.skip("about CPU kernels")
    used = run("-c", "from pyml import _C; print(_C.build_info()['isa'])", PYML_CPU_ISA=isa).stdout.strip()
    if used != isa:
        pytest.skip(f"this processor has no {isa}")
    assert_passes(run("-m", "pytest", "tests/test_ops.py", "-q", "-k", "agrees and cpp or bits", PYML_CPU_ISA=isa))


@pytest.mark.slow
@needs_extension
def test_no_kernel_reads_scratch_that_it_did_not_write(device):
    """Scratch memory is kept between calls: what is left there can be right by luck. Here it is NaN each time, and even
    the smallest call is split among the threads."""
    if device != "cpu":
        pytest.skip("about CPU kernels")
    environment = {"PYML_POISON_SCRATCH": "1", "OMP_WAIT_POLICY": "passive"}  # tiny tasks: waiting would be all they do
    assert_passes(run("-m", "pytest", "tests/test_ops.py", "-q", "-k", "cpp and (agrees or bits)", **environment))


@pytest.mark.slow
def test_triton_kernels_under_the_interpreter(device):
    """Tiny samples only: the interpreter takes milliseconds for each program. Second derivatives are compared with the
    reference there; finite differences of first derivatives would take minutes and show the same."""
    if device != "cpu":
        pytest.skip("the kernels themselves run on the GPU")
    if reason := backend.triton_reason():
        pytest.skip(reason)
    assert_passes(run("-m", "pytest", *GENERIC, "-q", "-k", "triton and not gradgradcheck", TRITON_INTERPRET="1"))
