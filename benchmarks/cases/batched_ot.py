"""Cases of batched optimal transport: a fixed number of iterations, uniform weights. Costs count two products an
iteration and one exp an entry, never the exps that a log-domain loop takes anew."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyml import ops
from pyml.ops import OPS
from pyml.reference import batched_ot_baselines as baselines

from ..registry import BOTH, FORWARD, GPU_NAMES, Case, Contender, Cost, Registry, Setup, Target
from . import enla
from .common import Inputs, eager, ours

EPS, SMALL_EPS, ITERATIONS = 0.1, 0.01, 100
LOG, COMPILED_LOG = "eager log-domain", "compiled log-domain"
KERNEL, COMPILED_KERNEL = "kernel-space bmm", "compiled kernel-space"
GRAPHED, AT_EPS = "eager+graph", f"at eps {EPS}"
POT, OTT, GEOMLOSS = "POT batch log-domain", "OTT-JAX vmap", "GeomLoss"
DETACHED = "gradient of a detached plan, as in PLOT"

Form = Callable[[Tensor], Any]


def _detached(form: Callable[..., tuple[Tensor, Tensor]], eps: float = EPS, **options: Any) -> Form:
    """The transport cost of a plan that is a constant: what the envelope computes, without the unrolled graph."""

    def call(cost: Tensor) -> Tensor:
        with torch.no_grad():
            plan = form(cost.detach(), eps, ITERATIONS, **options)[0]
        return (plan * cost).sum((-1, -2))

    return call


def _unrolled(cost: Tensor) -> Tensor:
    return baselines.log_domain(cost, EPS, ITERATIONS)[1]


def _pot(cost: Tensor) -> Tensor:
    from ot.batch import solve_batch

    with torch.no_grad():
        plan = solve_batch(cost.detach(), EPS, max_iter=ITERATIONS, tol=0.0, method="log_sinkhorn").plan
    return (plan * cost).sum((-1, -2))


def _geomloss(cost: Tensor) -> Tensor:
    """It spends its iterations on a falling eps, so its plan is another one."""
    from geomloss.ot import solve_batch

    with torch.no_grad():
        plan = solve_batch(cost.detach(), reg=EPS, max_iter=ITERATIONS).plan
    return (plan * cost).sum((-1, -2))


def _ott(cost: Tensor) -> Callable[[str], Callable[[], Any]]:
    """On the same numbers in its own arrays; jit under vmap, fixed iterations."""

    def build(mode: str) -> Callable[[], Any]:
        import jax
        from ott.geometry import geometry
        from ott.problems.linear import linear_problem
        from ott.solvers.linear import sinkhorn

        def one(c: Any) -> Any:
            solver = sinkhorn.Sinkhorn(min_iterations=ITERATIONS, max_iterations=ITERATIONS, lse_mode=True)
            found = solver(linear_problem.LinearProblem(geometry.Geometry(cost_matrix=c, epsilon=EPS)))
            return (found.matrix * c).sum()

        run, array = jax.jit(jax.vmap(one)), jax.numpy.asarray(cost.detach().numpy())
        return lambda: torch.from_dlpack(run(array).block_until_ready())

    return build


def _graphed(cost: Tensor) -> Callable[[str], Callable[[], Any]]:
    """The eager log-domain loop captured once as a CUDA graph: its kernels without their launches."""

    def build(mode: str) -> Callable[[], Any]:
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.stream(side):
            baselines.log_domain(cost, EPS, ITERATIONS)
        torch.cuda.current_stream().wait_stream(side)
        with torch.no_grad(), torch.cuda.graph(graph):
            transport = baselines.log_domain(cost, EPS, ITERATIONS)[1]

        def call() -> Tensor:
            graph.replay()
            return transport

        return call

    return build


def _pyml(implicit: bool, eps: float = EPS) -> Callable[..., Tensor]:
    def call(cost: Tensor, backend: str | None = None) -> Tensor:
        options: dict[str, Any] = {"plan_grad": "implicit"} if implicit else {}
        return ops.sinkhorn(cost, eps=eps, max_iter=ITERATIONS, backend=backend, **options).transport_cost

    return call


def solve_setup(batch: int, n: int, m: int, implicit: bool, setup: Setup) -> dict[str, Contender]:
    inputs = Inputs(setup)
    cost = inputs.uniform(batch, n, m, low=0.59, high=1.44)
    args, wanted = (cost,), [cost]
    found = ours(_pyml(implicit), OPS["sinkhorn_solve"], args, wanted, setup)
    if implicit:  # the gradients differ by what the unrolled loop has not converged to
        found["envelope"] = eager("envelope", _pyml(False), args, wanted, same_result=False)
        found["unrolled log-domain"] = eager("unrolled log-domain", _unrolled, args, wanted)
        return found
    log = torch.compile(baselines.log_block, dynamic=False)
    sums = torch.compile(baselines.sums_block, dynamic=False)
    forms = {
        LOG: _detached(baselines.log_domain),
        COMPILED_LOG: _detached(baselines.log_domain, block=log),
        KERNEL: _detached(baselines.kernel_space),
        COMPILED_KERNEL: _detached(baselines.kernel_space_sums, block=sums),
        POT: _pot,
        GEOMLOSS: _geomloss,
    }
    for name, form in forms.items():
        found[name] = eager(name, form, args, wanted, same_result=name != GEOMLOSS)
    found[OTT] = Contender(OTT, _ott(cost), forward_only="forward alone is compared")
    return found


def small_eps_setup(batch: int, n: int, m: int, setup: Setup) -> dict[str, Contender]:
    """Where kernel-space forms give NaN: against the log-domain ones, and ourselves at the usual eps."""
    cost = Inputs(setup).uniform(batch, n, m, low=0.59, high=1.44)
    args, wanted = (cost,), [cost]
    found = ours(_pyml(False, SMALL_EPS), OPS["sinkhorn_solve"], args, wanted, setup)
    found[AT_EPS] = eager(AT_EPS, _pyml(False), args, wanted, same_result=False)
    block = torch.compile(baselines.log_block, dynamic=False)
    found[LOG] = eager(LOG, _detached(baselines.log_domain, SMALL_EPS), args, wanted)
    found[COMPILED_LOG] = eager(COMPILED_LOG, _detached(baselines.log_domain, SMALL_EPS, block=block), args, wanted)
    return found


def large_setup(batch: int, n: int, m: int, setup: Setup) -> dict[str, Contender]:
    cost = Inputs(setup).uniform(batch, n, m, low=0.59, high=1.44)
    args, wanted = (cost,), [cost]
    found = ours(_pyml(False), OPS["sinkhorn_solve"], args, wanted, setup)
    found[LOG] = eager(LOG, _detached(baselines.log_domain), args, wanted)
    found[KERNEL] = eager(KERNEL, _detached(baselines.kernel_space), args, wanted)
    return found


def gpu_setup(batch: int, n: int, m: int, setup: Setup) -> dict[str, Contender]:
    cost = Inputs(setup).uniform(batch, n, m, low=0.59, high=1.44)
    graphed = Contender(GRAPHED, _graphed(cost), graphed=True, forward_only="forward alone is compared")
    return large_setup(batch, n, m, setup) | {GRAPHED: graphed}


def points_setup(batch: int, n: int, m: int, d: int, kind: str, setup: Setup) -> dict[str, Contender]:
    inputs = Inputs(setup)
    x, y = inputs.normal(batch, n, d), inputs.normal(batch, m, d)

    def run(x: Tensor, y: Tensor, backend: str | None = None) -> Tensor:
        return ops.pairwise_cost(x, y, kind, backend=backend)

    def product(x: Tensor, y: Tensor) -> Tensor:
        if kind == "cosine":
            x, y = torch.nn.functional.normalize(x, dim=-1), torch.nn.functional.normalize(y, dim=-1)
            return 1 - x @ y.transpose(-1, -2)
        square = (x * x).sum(-1).unsqueeze(-1) + (y * y).sum(-1).unsqueeze(-2)
        return square - 2 * (x @ y.transpose(-1, -2))

    contenders = ours(run, OPS["pairwise_cost"], (x, y), [x, y], setup)
    contenders["product"] = eager("product", product, (x, y), [x, y])
    return contenders


def plan_setup(batch: int, n: int, m: int, setup: Setup) -> dict[str, Contender]:
    inputs = Inputs(setup)
    cost = inputs.uniform(batch, n, m, low=0.59, high=1.44)
    found = ops.sinkhorn(cost, eps=EPS)
    args, wanted = (cost, found.f, found.g), [cost]

    def run(cost: Tensor, f: Tensor, g: Tensor, backend: str | None = None) -> Tensor:
        return ops.sinkhorn_plan(cost, None, None, f, g, EPS, backend=backend)

    def plain(cost: Tensor, f: Tensor, g: Tensor) -> Tensor:
        return torch.exp((f.unsqueeze(-1) + g.unsqueeze(-2) - cost) / EPS) / (n * m)

    contenders = ours(run, OPS["sinkhorn_plan"], args, wanted, setup)
    contenders["eager"] = eager("eager", plain, args, wanted)
    return contenders


def solve_cost(batch: int, n: int, m: int, mode: str, size: int) -> Cost:
    entries = batch * n * m
    work = 4.0 * entries * ITERATIONS
    if mode == FORWARD:
        return Cost(work, entries * size, entries)
    return Cost(work + 2 * entries, 3 * entries * size, 2 * entries)


def points_cost(batch: int, n: int, m: int, d: int, mode: str, size: int) -> Cost:
    terms = 2.0 * batch * n * m * d
    moved = batch * ((n + m) * d + n * m) * size
    return Cost(terms, moved) if mode == FORWARD else Cost(3 * terms, 3 * moved)


def _memory(batch: int, n: int, m: int) -> tuple[Target, ...]:
    return tuple(Target("bytes", 2 * 4 * batch * n * m, mode=mode) for mode in (FORWARD, BOTH))


def _solve(batch: int, n: int, m: int, over_log: float, over_kernel: float, **more: Any) -> Case:
    targets = (
        Target("speedup", over_log, COMPILED_LOG),
        Target("speedup", over_kernel, KERNEL),
        Target("speedup", over_kernel, COMPILED_KERNEL),
        Target("backward", 1.3, mode=BOTH),
        *_memory(batch, n, m),
    )
    return Case(
        "batched_ot", "sinkhorn_solve", f"{batch}x{n}x{m}", partial(solve_setup, batch, n, m, False),
        {"pyml": None, LOG: None, COMPILED_LOG: None, KERNEL: None, COMPILED_KERNEL: None, POT: "ot",
         GEOMLOSS: "geomloss", OTT: "ott"},
        partial(solve_cost, batch, n, m), targets=targets, devices=("cpu",),
        note=f"{ITERATIONS} iterations, eps {EPS}; kernel-space forms are unsafe below eps 0.02; GeomLoss spends its "
        f"iterations on a falling eps; {DETACHED}", **more,
    )  # fmt: skip


def _small_eps(batch: int, n: int, m: int) -> Case:
    return Case(
        "batched_ot", "sinkhorn_solve", f"{batch}x{n}x{m} eps {SMALL_EPS}", partial(small_eps_setup, batch, n, m),
        dict.fromkeys(("pyml", AT_EPS, LOG, COMPILED_LOG)), partial(solve_cost, batch, n, m), modes=(FORWARD,),
        targets=(Target("slowdown", 1.1, AT_EPS),), devices=("cpu",),
        note=f"{ITERATIONS} iterations; kernel-space forms give NaN here",
    )  # fmt: skip


def _on_gpu(batch: int, n: int, m: int) -> Case:
    return Case(
        "batched_ot", "sinkhorn_solve", f"{batch}x{n}x{m} GPU", partial(gpu_setup, batch, n, m),
        dict.fromkeys(("pyml", *GPU_NAMES[:2], LOG, KERNEL, GRAPHED)), partial(solve_cost, batch, n, m),
        targets=(Target("speedup", 20, GRAPHED, threads=0, device="cuda"),), devices=("cuda",),
        note=f"{ITERATIONS} iterations, eps {EPS}; {DETACHED}",
    )  # fmt: skip


def _points(batch: int, n: int, m: int, d: int, kind: str) -> Case:
    return Case(
        "batched_ot", "pairwise_cost", f"{batch}x{n}x{m}x{d} {kind}", partial(points_setup, batch, n, m, d, kind),
        dict.fromkeys(("pyml", "product", *GPU_NAMES[:2])), partial(points_cost, batch, n, m, d),
        note="the product of torch loses digits of far clouds, and its bits follow the batch",
    )  # fmt: skip


def register(registry: Registry) -> None:
    cases = [
        _solve(3200, 49, 4, 60, 40, quick=True),
        _solve(512, 196, 16, 28, 3.2),
        _solve(256, 64, 64, 14, 2),
        _solve(32, 256, 256, 10, 1.8),
        Case(
            "batched_ot", "sinkhorn_solve", "32x256x256 implicit", partial(solve_setup, 32, 256, 256, True),
            dict.fromkeys(("pyml", "envelope", "unrolled log-domain")), partial(solve_cost, 32, 256, 256),
            targets=(Target("backward", 2, mode=BOTH), _memory(32, 256, 256)[1]), devices=("cpu",),
            note="exact gradient of the transport cost",
        ),
        _small_eps(3200, 49, 4),
        _small_eps(32, 256, 256),
        Case(
            "batched_ot", "sinkhorn_solve", "1x2000x2000", partial(large_setup, 1, 2000, 2000),
            dict.fromkeys(("pyml", LOG, KERNEL)), partial(solve_cost, 1, 2000, 2000), targets=_memory(1, 2000, 2000),
            devices=("cpu",), note=f"{ITERATIONS} iterations, eps {EPS}; no speed is claimed here; {DETACHED}",
        ),
        _on_gpu(3200, 49, 4),
        _on_gpu(512, 196, 16),
        _points(256, 64, 64, 64, "sqeuclidean"),
        _points(32, 256, 256, 512, "cosine"),
        Case(
            "batched_ot", "sinkhorn_plan", "512x196x16", partial(plan_setup, 512, 196, 16),
            dict.fromkeys(("pyml", "eager")),
            lambda mode, size: Cost(3 * 512 * 196 * 16, 2 * 512 * 196 * 16 * size, 512 * 196 * 16), devices=("cpu",),
        ),
    ]  # fmt: skip
    for case in cases:
        registry.add(case)
    enla.register(registry)
