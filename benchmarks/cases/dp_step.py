"""One DP training step with the optimizer of pyml and with that of Opacus: model, batch and per-sample gradients are
the same, and only what comes after the backward pass differs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyml.reference import hetero_noise_baselines as baselines

from ..registry import Case, Contender, Cost, Registry, Setup
from .common import Inputs

STEP = "training step"
SCALED, OPACUS, BARE = "pyml, a scale by element", "Opacus", "not private"
CLASSES, SIDE, PIXELS = 10, 8, 784
NOISE, CLIP, RATE = 1.1, 1.0, 1e-3  # a small rate: weights stay of the size that they have, however long it runs


def _digits() -> nn.Module:
    from pyml.methods.dp_sgd.model import build

    return build(SIDE, CLASSES)


def _mlp() -> nn.Module:
    """9,972,840 numbers."""
    return nn.Sequential(nn.Linear(PIXELS, 3000), nn.ReLU(), nn.Linear(3000, 2530), nn.ReLU(), nn.Linear(2530, CLASSES))


def _ours(params: list[Tensor], batch: int, scale: list[Tensor] | None) -> Any:
    from pyml.optim import HeteroNoiseOptimizer

    return HeteroNoiseOptimizer(
        torch.optim.SGD(params, lr=RATE), noise_multiplier=NOISE, clip=CLIP, sample_rate=0.01,
        expected_batch_size=batch, scale=scale, provenance=None if scale is None else "public", seed=1,
    )  # fmt: skip


def _scaled(inputs: Inputs, params: list[Tensor], batch: int) -> Any:
    return _ours(params, batch, [inputs.uniform(*p.shape, low=0.5, high=1.5) for p in params])


def step_setup(make: Callable[[], nn.Module], shape: tuple[int, ...], setup: Setup) -> dict[str, Contender]:
    """Forward, cross entropy, backward, and for the private ones clip, noise and update."""
    inputs, batch = Inputs(setup), shape[0]
    x = inputs.normal(*shape)
    labels = torch.randint(CLASSES, (batch,), generator=inputs.generator).to(inputs.device)

    def train(optimizer: Callable[[list[Tensor]], Any], private: bool, mode: str) -> Callable[[], Any]:
        torch.manual_seed(setup.seed)
        net: Any = make().to(inputs.device, inputs.dtype)
        if private:
            from opacus.grad_sample import GradSampleModule

            net = GradSampleModule(net)
        steps = optimizer(list(net.parameters()))

        def call() -> Tensor:
            loss = nn.functional.cross_entropy(net(x), labels)
            loss.backward()
            steps.step()
            # At the end of a step, not before the next one: nothing of it is left when memory is read between two.
            steps.zero_grad(set_to_none=True)
            return loss.detach()

        return call

    made: dict[str, tuple[Callable[[list[Tensor]], Any], bool]] = {
        "pyml": (partial(_ours, batch=batch, scale=None), True),
        SCALED: (partial(_scaled, inputs, batch=batch), True),
        OPACUS: (partial(baselines.opacus_sgd, lr=RATE, multiplier=NOISE, clip=CLIP, batch=batch), True),
        BARE: (partial(torch.optim.SGD, lr=RATE), False),
    }
    # Noise is another one in each: results cannot be compared.
    return {name: Contender(name, partial(train, *how), same_result=False) for name, how in made.items()}


def register(registry: Registry) -> None:
    names = {"pyml": "opacus", SCALED: "opacus", OPACUS: "opacus", BARE: None}
    # 1e7 gradients of 16 samples are 0.64 GB; of 64 they would be 2.6 GB, and the same work a number.
    for name, make, shape, size in (
        ("digits CNN, batch 64", _digits, (64, 1, SIDE, SIDE), 9_258),
        ("MLP of 1e7 parameters, batch 16", _mlp, (16, PIXELS), 9_972_840),
    ):
        registry.add(
            Case(
                "hetero_noise", "DP-SGD step", name, partial(step_setup, make, shape), names,
                partial(_cost, shape[0], size), modes=(STEP,),
                note="forward, cross entropy, gradients of samples (hooks of Opacus in both), clip, noise and SGD; "
                "costs are those of reading the gradients of the samples once",
            )
        )  # fmt: skip


def _cost(batch: int, size: int, mode: str, element: int) -> Cost:
    return Cost(bytes=size * (batch + 2) * element)
