"""CUDA sources without a GPU: compiled for GPUs with nvcc, and run on the CPU by tests/cuda_emulation.py.

The emulation compiles the same kernels and the same torch side with g++, and the generic tests of tests/test_ops.py run
on them. It shows wrong indices, missing barriers and unwritten outputs; it cannot show what only the hardware has.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pyml.backend import load_extension
from tests.conftest import INTERPRETED
from tests.cuda_emulation import standard
from tests.op_helpers import GENERIC

ROOT = Path(__file__).resolve().parent.parent
NVCC = shutil.which("nvcc")
SOURCES = sorted(ROOT.glob("csrc/*/*.cu"))

pytestmark = [pytest.mark.slow, pytest.mark.skipif(INTERPRETED, reason="nothing to interpret")]
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
needs_gxx = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


def succeeds(*command: object, folder: Path | None = None, **environment: str) -> str:
    arguments = [str(part) for part in command]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYML_")} | environment
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, env=clean, cwd=folder or ROOT)
    assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


def test_no_two_sources_share_an_object_file():
    """setuptools names an object after its source without the suffix."""
    stems = [p.with_suffix("") for suffix in ("*.cpp", "*.cu") for p in ROOT.glob(f"csrc/**/{suffix}")]
    assert len(stems) == len(set(stems)), f"same name, two suffixes: {sorted(s for s in stems if stems.count(s) > 1)}"


ARCHES = [90, *(pytest.param(arch, marks=pytest.mark.full) for arch in (80, 100))]


@pytest.fixture(scope="module")
def nvcc_report(tmp_path_factory):
    """What nvcc says of a source for an arch, with the flags of setup.py. All sources of an arch start at once."""
    folder, reports = tmp_path_factory.mktemp("nvcc"), {}

    def compiled(source: Path, arch: int) -> str:
        return succeeds(
            NVCC, "-O3", "-std=c++17", "--expt-relaxed-constexpr", f"-arch=sm_{arch}", "-Werror", "all-warnings",
            "-Xptxas", "-v", "-Xcompiler", "-fPIC", f"-I{ROOT / 'csrc'}", "-c", source,
            "-o", folder / f"{source.stem}_{arch}.o",
        )  # fmt: skip

    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def report(source: Path, arch: int) -> str:
            if arch not in reports:
                reports[arch] = {each: pool.submit(compiled, each, arch) for each in SOURCES}
            return reports[arch][source].result()

        yield report


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
def test_nvcc_compiles(source, arch, nvcc_report):
    """A warning is a failure. No kernel may keep arrays in local memory."""
    report = nvcc_report(source, arch)
    frames = [int(line.split()[0]) for line in report.splitlines() if "bytes stack frame" in line]
    assert frames or "__global__" not in source.read_text(), f"{source.name}: no report of its kernels"
    assert max(frames, default=0) <= 64, f"{source.name}: a kernel has a stack frame of {max(frames)} bytes"


@needs_nvcc
@needs_gxx
def test_torch_side_compiles_against_the_cuda_headers(tmp_path):
    """A CPU wheel of torch carries c10/cuda but for one generated header, and no library to link: syntax only."""
    from torch.utils.cpp_extension import include_paths

    stub = tmp_path / "c10/cuda/impl/cuda_cmake_macros.h"
    stub.parent.mkdir(parents=True)
    stub.write_text("#pragma once\n")
    plan = succeeds(NVCC, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull)  # nvcc may be a script elsewhere
    top = next(line.split("TOP=")[1].strip() for line in plan.splitlines() if "TOP=" in line)
    system = [f"-isystem{path}" for path in (*include_paths(), tmp_path, Path(top) / "include")]
    for source in sorted(ROOT.glob("csrc/*/*_cuda.cpp")):
        flags = ["-fsyntax-only", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-DPYML_WITH_CUDA"]
        succeeds("g++", standard(), *flags, f"-I{ROOT / 'csrc'}", *system, source)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> Path:
    if reason := load_extension():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("cuda_emulation")
    succeeds(sys.executable, "-m", "tests.cuda_emulation", "build", folder)
    return folder


SESSIONS = {  # order of the threads, parts of the rows, what runs
    "forward": ("forward", "", "agrees_with and (float32 or bfloat16)"),
    "shuffled-one-part": ("shuffled", "1", "memory_layout or bits or unwritten or (agrees_with and float64)"),
    "backward-every": ("backward", "", ""),
    "shuffled-every": ("shuffled", "2", ""),
}


@needs_gxx
@pytest.mark.parametrize(
    "session", [pytest.param(name, marks=[pytest.mark.full] if "every" in name else []) for name in SESSIONS]
)
def test_generic_tests_pass_on_the_emulated_kernels(emulated, session):
    order, programs, chosen = SESSIONS[session]
    expression = f"cpp and ({chosen})" if chosen else "cpp"
    environment = {"PYML_EMULATION_ORDER": order} | ({"PYML_EMULATION_PROGRAMS": programs} if programs else {})
    command = [sys.executable, "-m", "tests.cuda_emulation", "run", emulated, *GENERIC, "-q", "-p"]
    out = succeeds(*command, "no:cacheprovider", "-k", expression, **environment)
    assert " passed" in out and "failed" not in out


FAMILIES = {  # tests of a family that run on its emulated kernels; what starts a process or needs a CPU is left out
    "tests/test_topk_attention_region.py": "",
    "tests/test_topk_attention_region_gpu.py": "",
    "tests/test_topk_attention_router.py": "not to_the_bit",
    "tests/test_topk_attention_token.py": "not errors and not memory and not threads and not long and not 5000",
    "tests/test_topk_attention_token_gpu.py": "cpp",
    "tests/test_batched_ot.py": "cpp and (sums or potentials or masked or weights_that or start_that or mates and 49)",
    "tests/test_batched_ot_gpu.py": "cpp",
    "tests/test_batched_ot_gradients.py": "cpp and (singular and (49 or 45) or stop or masses or second or bad and 6)",
    "tests/test_batched_ot_points.py": "cpp and not differences",
    "tests/test_hetero_noise.py": "not instruction and not tail and not moments",
    "tests/test_clip_sum.py": "",
    "tests/test_head_update_ops.py": "not fused and not instruction",
    "tests/test_head_update_lists.py": "",
    "tests/test_head_update_edit.py": "",
}


@needs_gxx
@pytest.mark.parametrize("tests", FAMILIES)
def test_tests_of_a_family_pass_on_the_emulated_kernels(emulated, tests):
    chosen = " and ".join(filter(None, ("not triton", FAMILIES[tests])))
    command = [sys.executable, "-m", "tests.cuda_emulation", "run", emulated, tests, "-q", "-p", "no:cacheprovider"]
    out = succeeds(*command, "-k", chosen)
    assert " passed" in out and "failed" not in out and "skipped" not in out


PROBE = """
#include "common/cuda.h"
namespace pyml {
struct P { float* out; int barrier; int beyond; };
__global__ void probe_kernel(P p) {
  PYML_SHARED(float, values);
  values[threadIdx.x + p.beyond] = float(threadIdx.x);
  if (p.barrier) __syncthreads();
  p.out[threadIdx.x] = values[(threadIdx.x + 1) % 64];
}
}
int main(int argc, char** argv) {
  float out[64];
  pyml::P p{out, argv[1][0] == '1', argv[1][1] == '1' ? 8 : 0};
  if (pyml::launch(pyml::probe_kernel, 1, 1, 64, 64 * sizeof(float), nullptr, p) != cudaSuccess) return 2;
  for (int i = 0; i < 64; ++i)
    if (out[i] != float((i + 1) % 64)) return 1;
}
"""


@needs_gxx
def test_the_emulation_catches_what_it_should(tmp_path):
    """A missing barrier gives NaN or an order-dependent result; a write behind shared memory stops the process."""
    (tmp_path / "probe.cu").write_text(PROBE)
    emulation = ["-DPYML_CUDA_EMULATION", "-x", "c++", "-include", str(ROOT / "tests/cpp/cuda_emulation.h")]
    paths = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/cpp'}"]
    succeeds("g++", "-std=c++17", *emulation, *paths, "probe.cu", "-o", "probe", folder=tmp_path)
    outcomes = {}
    for order in ("forward", "backward", "shuffled"):
        for variant in ("10", "00", "11"):  # barrier?, write behind?
            environment = os.environ | {"PYML_EMULATION_ORDER": order}
            done = subprocess.run([tmp_path / "probe", variant], env=environment, capture_output=True, check=False)
            outcomes[order, variant] = (done.returncode, b"behind the shared memory" in done.stderr)
    for order in ("forward", "backward", "shuffled"):
        assert outcomes[order, "10"] == (0, False), "right with its barrier in every order"
        assert outcomes[order, "00"] == (1, False), f"{order}: a missing barrier went unnoticed"
        assert outcomes[order, "11"][1], f"{order}: a write behind shared memory went unnoticed"
