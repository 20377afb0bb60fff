"""The build: GPU sources compile without a GPU, nothing leaks between instruction sets, installs are clean."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import torch

from pyml.backend import load_extension

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
ISA_SOURCES = sorted(CSRC.rglob("*_cpu_*.cpp"))
FLAGS = json.loads((ROOT / "tools/isa_flags.json").read_text())
CXX = os.environ.get("CXX", "c++")


def name_of(path: Path) -> str:
    return str(path.relative_to(CSRC))


def run(*command: object, cwd: Path = ROOT, **environment: str) -> str:
    """Standard output and error of a command that must succeed; the suite's own settings do not reach it."""
    kept = {n: v for n, v in os.environ.items() if not n.startswith(("PYTEST_", "PYML_", "PIP_TARGET"))}
    kept.pop("PYTHONPATH", None)
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=kept | environment, capture_output=True, text=True, timeout=1800
    )
    text = result.stdout + result.stderr
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{text[-8000:]}"
    return text


# --- instruction sets ------------------------------------------------------------------------------------------------


def test_every_kernel_file_has_its_three_variants_and_flags():
    assert ISA_SOURCES
    for source in ISA_SOURCES:
        stem, isa = re.fullmatch(r"(.+)_cpu_(default|avx2|avx512)\.cpp", source.name).groups()
        assert f"_cpu_{isa}" in FLAGS
        assert f'#include "{source.parent.name}/{stem}_cpu.inl"' in source.read_text()
        assert {p.name for p in source.parent.glob(f"{stem}_cpu_*.cpp")} == {
            f"{stem}_cpu_{each}.cpp" for each in ("default", "avx2", "avx512")
        }
    for inline in CSRC.rglob("*.inl"):
        assert "torch/" not in inline.read_text() and "ATen/" not in inline.read_text(), f"{inline} includes torch"


def object_of(source: Path, folder: Path) -> Path:
    """That of the build in this checkout where it is newer than every source and flag, else compiled now."""
    inputs = [*CSRC.rglob("*"), ROOT / "setup.py", ROOT / "tools/isa_flags.json"]
    newest = max(path.stat().st_mtime for path in inputs if path.is_file())
    made = ROOT.glob(f"build/temp.{sys.implementation.cache_tag}-*/csrc/{name_of(source.with_suffix('.o'))}")
    if fresh := [path for path in made if path.stat().st_mtime > newest]:
        return fresh[0]
    target, isa = folder / "object.o", source.stem.rsplit("_", 1)[1]
    flags = ["-std=c++17", "-fPIC", "-fopenmp", *FLAGS["common"], *FLAGS[f"_cpu_{isa}"]]
    run(CXX, *flags, "-I", CSRC, "-c", source, "-o", target)
    return target


@pytest.mark.full
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
@pytest.mark.parametrize("source", ISA_SOURCES, ids=name_of)
def test_no_instruction_set_leaks_into_the_rest(source, tmp_path):
    """A weak symbol of the AVX-512 file could be the copy that the linker keeps, also where it cannot run."""
    isa, target = source.stem.rsplit("_", 1)[1], object_of(source, tmp_path)
    space = {"default": "DEFAULT", "avx2": "AVX2", "avx512": "AVX512"}[isa]
    symbols = [line.split(maxsplit=2) for line in run("nm", "-C", "--defined-only", target).splitlines()]
    leaks = [s[2] for s in symbols if len(s) == 3 and s[1] in "WVu" and f"pyml::{space}::" not in s[2]]
    assert not leaks, leaks


@pytest.mark.skipif(load_extension() is not None, reason=str(load_extension()))
@pytest.mark.skipif(shutil.which("ldd") is None, reason="ldd is not installed")
def test_the_extension_has_openmp():
    """Without it at::parallel_for runs on one thread and says nothing."""
    from pyml import _C

    assert re.search(r"lib(gomp|omp|iomp5)", run("ldd", _C.__file__))


def built_facts() -> dict[str, str]:
    """_built.json of the pyml that is running; every way to install writes it beside the library."""
    import pyml

    folder = Path(pyml.__file__).parent
    if not list(folder.glob("_C.*.so")):
        pytest.skip("the extension is not built")
    return json.loads((folder / "_built.json").read_text())


def test_the_build_leaves_its_facts_beside_the_library():
    facts = built_facts()
    assert facts["torch"] == torch.__version__
    assert re.fullmatch(r"[0-9a-f]{16}", facts["sources"])


# --- messages of the build -------------------------------------------------------------------------------------------


def test_an_extension_of_another_torch_names_both_and_the_way_out():
    code = (
        "import sys, pathlib, torch, pyml.backend as b; sys.modules.pop('pyml._C', None); import pyml; "
        "vars(pyml).pop('_C', None); sys.modules['pyml._C'] = None; torch.__version__ = '9.9.9'; "
        "b.load_extension.cache_clear(); print(b.load_extension())"
    )
    built = built_facts()["torch"]
    said = run(sys.executable, "-c", code).strip().splitlines()[-1]
    assert said.startswith(f"pyml._C was built with torch {built} and torch 9.9.9 is running: rebuild with pip install")


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch can build CUDA code")
def test_cuda_that_cannot_be_built_is_refused_when_forced(tmp_path):
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path],
        cwd=ROOT, env=os.environ | {"PYML_CUDA": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 1
    assert (
        result.stderr.strip()
        .splitlines()[-1]
        .startswith("pyml: PYML_CUDA=1 cannot be met: the installed torch is a CPU")
    )


@pytest.mark.parametrize("place", ["own", "user", "hidden"])
def test_the_build_asks_for_torch_only_where_there_is_none(place, monkeypatch, tmp_path):
    """pip's sandbox hides packages by variables; a torch of the user counts where the environment can see it."""
    pytest.importorskip("setuptools")
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import build_backend

    venv.create(tmp_path / "venv", system_site_packages=place == "user")
    python = tmp_path / "venv/bin/python"
    monkeypatch.setenv("PYTHONUSERBASE", str(tmp_path / "user"))
    folders = {"base": str(tmp_path / "venv"), "userbase": str(tmp_path / "user")}
    site = Path(sysconfig.get_path("purelib", "posix_prefix" if place == "own" else "posix_user", folders))
    for name, value in (("PYTHONPATH", str(tmp_path)), ("PYTHONNOUSERSITE", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "executable", str(python))

    build_backend._installed_torch.cache_clear()
    before = build_backend.get_requires_for_build_wheel()
    (site / "torch").mkdir(parents=True)
    (site / "torch/__init__.py").touch()
    build_backend._installed_torch.cache_clear()
    needed = build_backend.get_requires_for_build_editable()
    found = build_backend._installed_torch()
    build_backend._installed_torch.cache_clear()
    if place == "hidden":
        assert before == needed == ["torch>=2.10"]
    else:
        assert needed == [] and found == str(site)


def test_every_package_is_installed():
    """The list in pyproject.toml is written by hand: a folder that is missing there is missing after pip install."""
    text = (ROOT / "pyproject.toml").read_text()
    listed = ast.literal_eval(re.search(r"^packages = (\[.*?^\])", text, flags=re.S | re.M)[1])
    folders = dict(re.findall(r'^"(pyml\.[\w.]+)" = "([\w/]+)"', text, flags=re.M))
    for name in listed:
        assert list((ROOT / folders.get(name, name.replace(".", "/"))).glob("*.py")), f"{name} has no program file"
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "pyml").rglob("*.py")}
    for top in ("triton_kernels", "benchmarks"):
        found |= {".".join(("pyml", *p.parent.relative_to(ROOT).parts)) for p in (ROOT / top).rglob("*.py")}
    assert found == set(listed)


# --- installs into clean environments --------------------------------------------------------------------------------

_CHECK = """
import importlib, json, sys, torch, pyml
from pyml.backend import load_extension
assert load_extension() is None, load_extension()
x, grid, coeff = torch.rand(64, 3) * 2 - 1, torch.linspace(-2.2, 2.2, 12), torch.randn(4, 3, 8)
y, expected = (pyml.ops.kan_linear(x, grid, coeff, backend=b) for b in ("cpp", "reference"))
assert (y - expected).abs().max() < 1e-5
for name in ("pyml.nn", "pyml.methods", "pyml.benchmarks", "pyml.benchmarks.cases", "pyml.testing.verify", "pyml.cli"):
    importlib.import_module(name)
importlib.util.find_spec("pyml.triton_kernels").origin
from importlib.resources import files
assert (files("pyml") / "py.typed").is_file() and json.loads((files("pyml") / "verified.json").read_text()) is not None
print("torch", torch.__version__, "pyml at", pyml.__file__)
"""


def packages(python: Path) -> set[str]:
    listed = run(python, "-m", "pip", "list", "--format=freeze", "--disable-pip-version-check", cwd=python.parent)
    return {line.split("==")[0] for line in listed.splitlines() if "==" in line}


@pytest.fixture(scope="module")
def source_tree(tmp_path_factory):
    """What git would check out, changes included: building leaves nothing in the working tree."""
    target = tmp_path_factory.mktemp("source")
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z")
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    return target


@pytest.fixture(scope="module")
def only_torch(tmp_path_factory) -> tuple[Path, set[str]]:
    """The Python of an environment that holds only torch, and the packages that this means."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=True)
    python = folder / "bin/python"
    run(python, "-m", "pip", "install", f"torch=={torch.__version__.split('+')[0]}", cwd=folder)
    return python, packages(python)


@pytest.mark.full
@pytest.mark.parametrize("mode", [(), ("-e",)], ids=["install", "editable"])
def test_installs_where_there_is_only_torch(mode, source_tree, only_torch, tmp_path):
    """Plain `pip install .`: no flags, no second torch, run from somewhere else."""
    python, before = only_torch
    if more := packages(python) - before:  # the other mode was here
        run(python, "-m", "pip", "uninstall", "-y", *more, cwd=tmp_path)
    assert packages(python) == before
    which_torch = (
        "from importlib import metadata, util; print(metadata.version('torch'), util.find_spec('torch').origin)"
    )
    torch_before = run(python, "-c", which_torch, cwd=tmp_path)
    text = run(python, "-m", "pip", "install", *mode, source_tree, cwd=tmp_path)
    assert not re.search(r"Collecting torch\b|Downloading torch-", text), text
    assert run(python, "-c", which_torch, cwd=tmp_path) == torch_before
    place = run(python, "-c", _CHECK, cwd=tmp_path)
    assert (str(source_tree) if mode else str(python.parent.parent)) in place
    shown = run(python.parent / "pyml", "info", cwd=tmp_path)
    assert "kan_linear" in shown and "cpp" in shown
    assert not list(tmp_path.iterdir())
