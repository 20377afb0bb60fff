"""Run the CUDA backend on the CPU: csrc/<family>/*_cuda.{cu,cpp} compiled with g++ on tests/cpp/cuda_emulation.h.

    python -m tests.cuda_emulation build FOLDER              compile into FOLDER/cuda_emulation.so
    python -m tests.cuda_emulation run FOLDER [pytest ...]   a pytest session where the `cpp` backend is that library

The schemas are read from csrc/library.cpp, so that op names, checks, autograd and tests are those of the real thing.
PYML_EMULATION_ORDER=forward|backward|shuffled sets the order in which the threads of a block run between barriers.
"""

import re
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["-O1", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-DPYML_CUDA_EMULATION"]


def standard() -> str:
    """torch 2.13 and newer need C++20."""
    import torch

    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    return "-std=c++20" if (major, minor) >= (2, 13) else "-std=c++17"


def compile_one(source: Path, folder: Path) -> Path:
    from torch.utils.cpp_extension import include_paths

    made = folder / f"{source.name}.o"
    emulation = ["-x", "c++", "-include", str(ROOT / "tests/cpp/cuda_emulation.h")] if source.suffix == ".cu" else []
    torch_headers = [] if source.suffix == ".cu" else [f"-isystem{path}" for path in include_paths()]
    paths = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/cpp'}", *torch_headers]
    command = ["g++", standard(), *FLAGS, *paths, *emulation, "-c", str(source), "-o", str(made)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return made


def build(folder: Path) -> Path:
    from torch.utils.cpp_extension import library_paths

    sources = sorted([*ROOT.glob("csrc/*/*_cuda.cpp"), *ROOT.glob("csrc/*/*.cu"), ROOT / "csrc/common/autograd.cpp"])
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda source: compile_one(source, folder), sources))
    library = folder / "cuda_emulation.so"
    link = [f"-L{path}" for path in library_paths()] + ["-lc10", "-ltorch_cpu", "-ltorch"]
    subprocess.run(["g++", "-shared", *map(str, objects), *link, "-o", str(library)], check=True)
    return library


def install(library: Path) -> None:
    """Define the ops from their schemas, load the emulated kernels, and stand in for the compiled module."""
    import torch

    keep = torch.library.Library("pyml", "DEF")
    for strings in re.findall(r'm\.def\(((?:\s*"[^"]*")+)', (ROOT / "csrc/library.cpp").read_text()):
        schema = "".join(re.findall(r'"([^"]*)"', strings))
        if "->" in schema:
            keep.define(schema)
    torch.ops.load_library(str(library))
    module = types.ModuleType("pyml._C")
    module.build_info = lambda: {"cuda": False, "isa": "cuda emulation"}  # type: ignore[attr-defined]
    module.library = keep  # type: ignore[attr-defined]
    sys.modules["pyml._C"] = module


def main() -> None:
    command, folder, *arguments = sys.argv[1:]
    if command == "build":
        print(build(Path(folder)))
        return
    import pytest

    install(Path(folder) / "cuda_emulation.so")
    from pyml.ops import OPS

    for op in OPS.values():  # what has no CUDA kernel yet is skipped, as it is on a GPU
        op.has_cpp = op.has_cuda
    raise SystemExit(pytest.main(arguments))


if __name__ == "__main__":
    main()
