"""Builds pyml._C from csrc/: sources by glob, instruction set by file suffix, CUDA where torch and nvcc allow it."""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
FLAGS = json.loads((ROOT / "tools/isa_flags.json").read_text())
CXX_FLAGS = ["-O3", "-fvisibility=hidden", "-fopenmp", "-Wall", "-Wno-unknown-pragmas"]
NVCC_FLAGS = ["-O3", "--expt-relaxed-constexpr", "-lineinfo"]  # fast-math stays off: the error rule is tested


def sources(suffix: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob(f"*{suffix}"))


def fingerprint() -> str:
    """Of the kernels' sources: what `pyml verify` has passed holds only for these."""
    digest = hashlib.sha256()
    for name in sorted(s for suffix in (".cpp", ".cu", ".h", ".inl") for s in sources(suffix)):
        digest.update(name.encode() + b"\0" + (ROOT / name).read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def isa_of(source: str) -> str | None:
    found = re.search(r"_cpu_(default|avx2|avx512)\.cpp$", source)
    return found[1] if found else None


def nvcc_version() -> str | None:
    from torch.utils.cpp_extension import CUDA_HOME

    if not CUDA_HOME:
        return None
    text = subprocess.run([f"{CUDA_HOME}/bin/nvcc", "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+\.\d+)", text)
    return found[1] if found else None


def want_cuda() -> bool:
    """nvcc and a CUDA torch of the same major version; never whether a GPU is visible. PYML_CUDA=0/1 forces."""
    import torch

    asked, nvcc, built = os.environ.get("PYML_CUDA"), nvcc_version(), torch.version.cuda
    if asked not in (None, "", "0", "1"):
        raise SystemExit(f"pyml: PYML_CUDA: expected 0, 1 or nothing, got {asked!r}")
    if asked == "0":
        print("pyml: CPU build (PYML_CUDA=0)")
        return False
    problem = None
    if built is None:
        problem = "the installed torch is a CPU build"
    elif nvcc is None:
        problem = "no nvcc was found (set CUDA_HOME)"
    elif nvcc.split(".")[0] != built.split(".")[0]:
        problem = f"nvcc is {nvcc} and torch was built with CUDA {built}"
    if problem and asked == "1":
        raise SystemExit(f"pyml: PYML_CUDA=1 cannot be met: {problem}")
    print(f"pyml: CPU build: {problem}" if problem else f"pyml: CPU and CUDA build (nvcc {nvcc})")
    return problem is None


def cuda_arches() -> str:
    """TORCH_CUDA_ARCH_LIST, else the visible GPUs, else a list that covers data-centre GPUs with PTX of the newest."""
    import torch

    if asked := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return asked
    if torch.cuda.is_available():
        seen = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        return ";".join(f"{major}.{minor}" for major, minor in sorted(seen))
    major, minor = (int(part) for part in (nvcc_version() or "12.0").split("."))
    return "8.0;9.0;10.0+PTX" if (major, minor) >= (12, 8) else "8.0;9.0+PTX"


def toolchain() -> str:
    """Names the folder of objects: ninja sees a changed source or flag, not another compiler or torch in its place."""
    import torch

    compiler = subprocess.run([*os.environ.get("CXX", "c++").split(), "--version"], capture_output=True, check=False)
    facts = f"{platform.machine()} {torch.__version__} {nvcc_version()} {compiler.stdout.decode(errors='replace')}"
    return hashlib.sha256(facts.encode()).hexdigest()[:8]


def limit_jobs() -> None:
    """MAX_JOBS: at most one compiler for each core and each 3 GB of free memory."""
    if "MAX_JOBS" not in os.environ:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        os.environ["MAX_JOBS"] = str(max(1, min(len(os.sched_getaffinity(0)), free // (3 << 30))))


def extension_and_command():
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    cuda = want_cuda()
    limit_jobs()
    files = [s for s in sources(".cpp") if cuda or not s.endswith("_cuda.cpp")]
    if platform.machine() not in ("x86_64", "AMD64"):
        files = [s for s in files if isa_of(s) in (None, "default")]
    defines = []
    if cuda:
        files += sources(".cu")
        arches = os.environ["TORCH_CUDA_ARCH_LIST"] = cuda_arches()
        defines = [("PYML_WITH_CUDA", None), ("PYML_CUDA_ARCHES", f'"{arches}"')]

    class Build(BuildExtension):
        """Compiles each instruction-set variant with its own flags first, then links it as an extra object.

        Beside the library it writes _built.json, the facts that cannot be asked of a library that does not load.
        """

        def finalize_options(self):
            given = self.build_temp
            super().finalize_options()
            if given is None:  # else every editable build compiles all sources: setuptools takes a temporary folder
                self.build_temp = str(ROOT / "build" / f"temp.{sys.implementation.cache_tag}-{toolchain()}")

        def build_extension(self, ext):
            variants = [s for s in ext.sources if isa_of(s)]
            ext.sources = [s for s in ext.sources if not isa_of(s)]
            for isa in sorted({isa_of(s) for s in variants}):
                ext.extra_objects += self.compiler.compile(
                    [s for s in variants if isa_of(s) == isa],
                    output_dir=self.build_temp,
                    include_dirs=ext.include_dirs,
                    extra_postargs={"cxx": FLAGS["common"] + FLAGS[f"_cpu_{isa}"]},
                    depends=ext.depends,
                )
            super().build_extension(ext)
            facts = {"torch": torch.__version__, "sources": fingerprint()}
            Path(self.get_ext_fullpath(ext.name)).with_name("_built.json").write_text(json.dumps(facts) + "\n")

        def copy_extensions_to_source(self):
            """Editable and in-place builds: setuptools copies the library and knows nothing of the file beside it."""
            super().copy_extensions_to_source()
            build_py = self.get_finalized_command("build_py")
            for ext in self.extensions:
                library, built = (Path(path) for path in self._get_inplace_equivalent(build_py, ext))
                shutil.copyfile(built.with_name("_built.json"), library.with_name("_built.json"))

    kind = CUDAExtension if cuda else CppExtension
    extension = kind(
        "pyml._C",
        files,
        include_dirs=[str(ROOT / "csrc")],
        define_macros=defines,
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS} if cuda else {"cxx": CXX_FLAGS},
        depends=sources(".h") + sources(".inl") + [s for s in files if isa_of(s)],
        extra_link_args=["-fopenmp"],
    )
    return extension, Build


def building() -> bool:
    """Metadata and source archives must not need torch."""
    commands = {"build", "build_ext", "bdist_wheel", "editable_wheel", "develop", "install"}
    return not commands.isdisjoint(sys.argv)


if building():
    extension, command = extension_and_command()
    setup(ext_modules=[extension], cmdclass={"build_ext": command})
else:
    setup()
