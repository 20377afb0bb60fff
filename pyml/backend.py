"""Which implementation of an op runs. The whole rule is `pick`.

explicit ``backend=`` > ``with pyml.use_backend(...)`` > ``PYML_BACKEND`` > auto. A forced backend that cannot run
raises and says why. Auto on a CPU is ``cpp``; on CUDA it is the first of the op's ``cuda_preference`` that is usable
and that `pyml verify` has passed on this machine. Where nothing else is left, ``reference`` runs, with one warning.
"""

import functools
import hashlib
import importlib.util
import json
import os
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pyml.ops._registry import Op

BACKENDS = ("reference", "cpp", "cuda", "triton")

_forced = threading.local()
_checks = {"on": True}


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run here."""


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend inside a ``with`` block (this thread only); "auto" undoes what is around it.

    A compiled graph keeps what it was traced with.
    """
    if name != "auto":
        _known(name)
    before = getattr(_forced, "name", None)
    _forced.name = name
    try:
        yield
    finally:
        _forced.name = before


def set_checks(on: bool) -> None:
    """Turn the status read after a CUDA op on or off (it waits for the GPU). CPU checks always run."""
    _checks["on"] = bool(on)


def checks() -> bool:
    """Whether CUDA ops read their status word, see `set_checks`."""
    return _checks["on"]


def _known(name: str) -> str:
    if name not in BACKENDS:
        raise BackendError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


@functools.cache
def built_facts() -> dict[str, str]:
    """What the build wrote beside pyml._C: its torch, and a fingerprint of its sources. Empty when there is none."""
    try:
        facts = json.loads(Path(__file__).with_name("_built.json").read_text())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


@functools.cache
def load_extension() -> str | None:
    """Load pyml._C once; the reason why it cannot be loaded, or None."""
    try:
        from pyml import _C  # noqa: F401
    except ImportError as error:
        with_torch = built_facts().get("torch", torch.__version__)
        if with_torch != torch.__version__:
            return (
                f"pyml._C was built with torch {with_torch} and torch {torch.__version__} is running: "
                "rebuild with pip install --force-reinstall --no-deps ."
            )
        if importlib.util.find_spec("pyml._C") is None:
            return "the extension pyml._C is not built (pip install . builds it)"
        return f"pyml._C cannot be loaded: {error}"
    return None


@functools.cache
def triton_reason() -> str | None:
    """Why Triton kernels cannot run on this machine at all, or None."""
    if missing := load_extension():
        return missing  # the Triton ops take their schemas from it
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed (pip install 'pyml[triton]')"
    return None


@functools.cache
def _unusable(name: str, has_cpp: bool, has_cuda_kernel: bool, has_triton: bool, device: str) -> str | None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if name == "reference":
        return None
    if name == "cpp":
        if not has_cpp:
            return "this op has no C++ kernel"
        return load_extension() or (None if device == "cpu" else f"the cpp backend runs on cpu tensors, got {device}")
    if name == "triton":
        if not has_triton:
            return "this op has no Triton kernel"
        if reason := triton_reason():
            return reason
        if device == "cpu":
            return None if interpreted else "Triton runs cpu tensors only under TRITON_INTERPRET=1"
        return None if torch.cuda.is_available() else "no GPU is visible"
    if not has_cuda_kernel:
        return "this op has no CUDA kernel"
    if reason := load_extension():
        return reason
    from pyml import _C

    if not _C.build_info()["cuda"]:
        return "pyml was built without CUDA (needs nvcc and a CUDA torch of the same major version)"
    if device != "cuda":
        return f"the cuda backend runs on cuda tensors, got {device}"
    if not torch.cuda.is_available():
        return "no GPU is visible"
    arches, gpu = _C.build_info()["cuda_arches"], torch.cuda.get_device_capability()
    if not arches_run_on(arches, gpu):
        here = f"{gpu[0]}.{gpu[1]}"
        return f"pyml was built for GPUs {arches} and this one is {here}: rebuild with TORCH_CUDA_ARCH_LIST={here}"
    return None


def arches_run_on(arches: str, gpu: tuple[int, int]) -> bool:
    """Whether code for this TORCH_CUDA_ARCH_LIST runs on a GPU of compute capability ``(major, minor)``.

    Machine code runs on later minors of its major, code of an ``a`` target nowhere else, PTX on anything later. A list
    with names instead of numbers (``Hopper``) is believed.
    """
    for item in re.split(r"[;,\s]+", arches.strip()):
        found = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item)
        if not found:
            return True
        major, minor, special, ptx = int(found[1]), int(found[2]), found[3], found[4]
        later = (major, minor) == gpu if special == "a" else (major, minor) <= gpu
        if later and (major == gpu[0] or (ptx and not special)):
            return True
    return False


def unusable(op: "Op", name: str, device: str) -> str | None:
    """Why backend ``name`` cannot run ``op`` on this kind of device, or None."""
    return _unusable(_known(name), op.has_cpp, op.has_cuda, op.has_triton, device)


def cache_folder() -> Path:
    """Where pyml keeps what it can make again: ``PYML_CACHE``, else the user's cache."""
    if chosen := os.environ.get("PYML_CACHE"):
        return Path(chosen)
    try:
        from platformdirs import user_cache_path
    except ImportError:  # `make gpu-build` installs no other package, and this one is seldom there
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "pyml")
    return user_cache_path("pyml")


def stamp_path() -> Path:
    """Where `pyml verify` notes what it has seen run on this machine."""
    return cache_folder() / "verified.json"


def read_stamps() -> dict[str, dict[str, list[str]]]:
    """What is noted there; what is missing, cut off or no record counts as nothing noted."""
    try:
        stamps = json.loads(stamp_path().read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(stamps, dict):
        return {}
    return {
        key: {op: names for op, names in ops.items() if isinstance(names, list)}
        for key, ops in stamps.items()
        if isinstance(ops, dict)
    }


@functools.cache
def kernels() -> str:
    """A fingerprint of the installed kernels: of the sources that were built, and of the Triton files."""
    digest = hashlib.sha256(str(built_facts().get("sources")).encode())
    spec = importlib.util.find_spec("pyml.triton_kernels")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).rglob("*.py")):
            digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def stamp_key(device: str) -> str:
    """What a stamp holds for: this kind of machine, these versions, these kernels."""
    from pyml._version import __version__

    name = torch.cuda.get_device_name() if device == "cuda" else device
    return f"{name} | pyml {__version__} | torch {torch.__version__} | kernels {kernels()}"


@functools.cache
def verified_here(device: str) -> dict[str, list[str]]:
    """op -> GPU backends that `pyml verify` passed on this machine with these versions."""
    return read_stamps().get(stamp_key(device), {})


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


@functools.cache
def _auto(op: "Op", device: str) -> tuple[str, str | None]:
    """The backend that runs when nobody asked for one, and a warning to give once."""
    if device == "cpu":
        reason = unusable(op, "cpp", device)
        return ("reference", f"pyml runs its slow reference: {reason}") if reason else ("cpp", None)
    if device != "cuda":
        return "reference", f"pyml has no kernel for {device} tensors: the slow reference runs"
    usable = [name for name in op.cuda_preference if unusable(op, name, device) is None]
    for name in usable:
        if name in verified_here(device).get(op.name, []):
            return name, None
    if usable:
        return "reference", (
            f"{op.name}: the {usable[0]} kernel has not been verified on this GPU, so the slow reference runs: run "
            f"`pyml verify --device cuda` once (some minutes), or pass backend={usable[0]!r}"
        )
    return "reference", f"{op.name}: no GPU kernel is usable, the slow reference runs (see `pyml info`)"


@torch.compiler.assume_constant_result
def _chosen(op: "Op", device: str, backend: str | None) -> str:
    want = backend or getattr(_forced, "name", None) or os.environ.get("PYML_BACKEND") or None
    if want is None or want == "auto":
        name, warning = _auto(op, device)
        if warning:
            _warn_once(warning)
        return name
    if reason := unusable(op, want, device):
        raise BackendError(f"{op.name}: backend {want!r} cannot run: {reason}")
    return want


def pick(op: "Op", device: str, backend: str | None) -> str:
    """The backend that runs ``op`` on this kind of device (``"cpu"``, ``"cuda"``)."""
    return _chosen(op, device, backend)
