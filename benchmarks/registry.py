"""What a benchmark case is, and the one list of them.

A case names its contenders; each is built on its own, so that a fresh process can hold just one (peak memory) or all of
them in turn (time).
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pyml.methods import UserError

FORWARD, BOTH = "forward", "forward+backward"
MODES = (FORWARD, BOTH)
TRITON_FP32 = "PYML_TRITON_FP32"  # how Triton kernels multiply fp32: ieee (default), tf32x3 or tf32
TRITON_3X = "pyml triton 3xTF32"  # fp32 products as three TF32 ones; the others are exact fp32
GPU_NAMES = (
    "pyml cuda",
    "pyml triton",
    TRITON_3X,
    "compiled+graph",
    "eager+graph",
)  # contenders that exist on a GPU only
TARGET_THREADS = 2  # of most targets on a CPU
OF_CASES = ("growth", "pace")  # measures whose `against` is another case
KNOWN = ("bspline", "topk_attention", "hetero_noise", "head_update", "batched_ot")  # in this order
FAMILIES = tuple(name for name in KNOWN if importlib.util.find_spec(f"{__package__}.cases.{name}") is not None)

Call = Callable[[], Any]


@dataclass(frozen=True)
class Cost:
    """Useful work of one call: only what the maths needs (local support, kept keys), each tensor moved once.

    ``matrix`` is the part of ``flops`` that a matrix unit could do; it counts against the matrix rate where that is the
    faster one (GPU), else everything counts against the FMA rate.
    """

    flops: float = 0.0
    bytes: float = 0.0
    exps: float = 0.0
    matrix: float = 0.0


@dataclass(frozen=True)
class Target:
    """A figure that the row must reach.

    measure: ``"speedup"`` (time of ``against`` over ours), ``"slowdown"`` (ours over ``against``), ``"seconds"``,
    ``"backward"`` (our forward and backward over our forward alone), ``"ceiling"`` (fraction of the one named by
    ``against``: ``"fma"``, or ``"binding"`` for the one that binds), ``"bytes"`` (extra memory), ``"memory"`` (extra
    memory of ``against`` over ours), ``"growth"`` (our extra memory over that in the case named by ``against``) or
    ``"pace"`` (our time for each useful operation over that in the case named by ``against``).
    """

    measure: str
    bound: float
    against: str = ""
    mode: str = FORWARD
    threads: int = TARGET_THREADS
    device: str = "cpu"
    dtype: str = ""  # the first one that was run

    @property
    def at_least(self) -> bool:
        return self.measure in ("speedup", "ceiling", "memory")


@dataclass(frozen=True)
class Setup:
    """What a case is built for."""

    device: str = "cpu"
    dtype: str = "float32"
    seed: int = 0


@dataclass(frozen=True)
class Contender:
    """One implementation in a case. ``build(mode)`` returns the call to time; its result is the output."""

    name: str
    build: Callable[[str], Call]
    scale: float = 1.0  # the whole case is this many times the measured call
    same_result: bool = True  # compare the output with that of pyml
    graphed: bool = False  # a CUDA graph owns its memory: peak memory is not measured
    forward_only: str = ""  # why there is no gradient, where there is none
    stateful: bool = False  # the first call makes what is kept, such as moments: the memory counts it

    def runs(self, mode: str) -> bool:
        return not self.forward_only or mode == FORWARD

    def anew(self, mode: str) -> Callable[[], Call] | None:
        """Builds it once more, where its memory is that of a first call."""
        return partial(self.build, mode) if self.stateful else None


@dataclass(frozen=True)
class Case:
    """A shape of an op or of a method's step, with everything that it is compared with.

    ``contenders`` maps each name to the module that it needs (None: nothing); ``setup`` prepares
    all of them and builds none.
    """

    family: str
    op: str
    shape: str
    setup: Callable[[Setup], dict[str, Contender]]
    contenders: dict[str, str | None]
    cost: Callable[[str, int], Cost]  # (mode, bytes of an element) -> useful work
    modes: tuple[str, ...] = MODES
    targets: tuple[Target, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")
    quick: bool = False
    time_it: bool = True  # False: memory only
    note: str = ""

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape}"


@dataclass
class Registry:
    """The cases of all families, in the order in which they were added."""

    cases: list[Case] = field(default_factory=list)

    def add(self, case: Case) -> None:
        if any(c.name == case.name for c in self.cases):
            raise ValueError(f"benchmarks: two cases are called {case.name!r}")
        unknown = [t.against for t in case.targets if t.measure in ("speedup", "slowdown", "memory")]
        unknown = [name for name in unknown if name not in case.contenders]
        if unknown or "pyml" not in case.contenders:
            raise ValueError(f"benchmarks: {case.name}: no contender called {(unknown or ['pyml'])[0]!r}")
        self.cases.append(case)

    def find(self, name: str) -> Case:
        return next(c for c in self.cases if c.name == name)

    def of(self, families: list[str] | tuple[str, ...]) -> Iterator[Case]:
        return (c for c in self.cases if c.family in families)


def load(families: list[str] | tuple[str, ...]) -> Registry:
    """The cases of these families."""
    registry = Registry()
    for family in families:
        if family not in FAMILIES:
            raise UserError(f"bench: family: expected one of {', '.join(FAMILIES)}, got {family!r}")
        importlib.import_module(f"{__package__}.cases.{family}").register(registry)
    return registry


def missing(case: Case) -> dict[str, str]:
    """Contender -> the module that it needs and that is not installed."""
    return {
        name: module
        for name, module in case.contenders.items()
        if module is not None and importlib.util.find_spec(module) is None
    }


def ops_without_cases() -> list[str]:
    """Registered ops that no case measures: the test suite fails while there is one."""
    importlib.import_module("pyml.ops")
    ops = importlib.import_module("pyml.ops._registry").OPS
    return sorted(ops.keys() - {case.op for case in load(FAMILIES).cases})
