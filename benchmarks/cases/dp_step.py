"""One DP training step with the optimizer of pyml and with that of Opacus: model, batch and per-sample gradients are
the same, and only what comes after the backward pass differs. Under ghost clipping neither has such gradients."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyml.reference import hetero_noise_baselines as baselines

from ..registry import Case, Contender, Cost, Registry, Setup
from .common import Inputs

Step = Callable[[Tensor, Tensor], Tensor]  # (images, labels) -> loss
STEP = "training step"
SCALED, OPACUS, BARE = "pyml, a scale by element", "Opacus", "not private"
CLASSES, SIDE, PIXELS, MLP_SIZE = 10, 8, 784, 9_972_840
NOISE, CLIP, RATE = 1.1, 1.0, 1e-3  # a small rate: weights stay of the size that they have, however long it runs


def _digits() -> nn.Module:
    from pyml.methods.dp_sgd.model import build

    return build(SIDE, CLASSES)


def _mlp() -> nn.Module:
    """MLP_SIZE numbers."""
    return nn.Sequential(nn.Linear(PIXELS, 3000), nn.ReLU(), nn.Linear(3000, 2530), nn.ReLU(), nn.Linear(2530, CLASSES))


def _ours(params: list[Tensor], batch: int, scale: list[Tensor] | None) -> Any:
    from pyml.optim import HeteroNoiseOptimizer

    return HeteroNoiseOptimizer(
        torch.optim.SGD(params, lr=RATE), noise_multiplier=NOISE, clip=CLIP, sample_rate=0.01,
        expected_batch_size=batch, scale=scale, provenance=None if scale is None else "public", seed=1,
    )  # fmt: skip


def _scaled(inputs: Inputs, params: list[Tensor], batch: int) -> Any:
    return _ours(params, batch, [inputs.uniform(*p.shape, low=0.5, high=1.5) for p in params])


def _step(make: Callable[[list[Tensor]], Any], private: bool, net: Any) -> Step:
    if private:
        from opacus.grad_sample import GradSampleModule

        net = GradSampleModule(net)
    optimizer = make(list(net.parameters()))

    def step(x: Tensor, labels: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(net(x), labels)
        loss.backward()
        optimizer.step()
        # At the end of a step, not before the next one: nothing of it is left when memory is read between two.
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def _ghost_step(batch: int, net: Any) -> Step:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    from pyml.optim import GhostNoiseOptimizer

    net = GradSampleModuleFastGradientClipping(net, loss_reduction="sum")
    optimizer = GhostNoiseOptimizer(
        torch.optim.SGD(net.parameters(), lr=RATE), module=net, noise_multiplier=NOISE, clip=CLIP, sample_rate=0.01,
        expected_batch_size=batch, seed=1,
    )  # fmt: skip

    def step(x: Tensor, labels: Tensor) -> Tensor:
        losses = nn.functional.cross_entropy(net(x), labels, reduction="none")
        optimizer.backward(losses)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return losses.detach().mean()

    return step


def _opacus_ghost_step(batch: int, net: Any) -> Step:
    """What Opacus' PrivacyEngine makes with grad_sample_mode="ghost", less its loader and accountant."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    net = GradSampleModuleFastGradientClipping(net, max_grad_norm=CLIP)
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(net.parameters(), lr=RATE), noise_multiplier=NOISE, max_grad_norm=CLIP,
        expected_batch_size=batch,
    )  # fmt: skip
    criterion = DPLossFastGradientClipping(net, optimizer, nn.CrossEntropyLoss())

    def step(x: Tensor, labels: Tensor) -> Tensor:
        loss = criterion(net(x), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def _contenders(
    steps: Mapping[str, Callable[[Any], Step]], make: Callable[[], nn.Module], shape: tuple[int, ...], setup: Setup,
    inputs: Inputs,
) -> dict[str, Contender]:  # fmt: skip
    """Each starts from the same weights and has the same batch. Noise is another one in each: results cannot be
    compared."""
    x = inputs.normal(*shape)
    labels = torch.randint(CLASSES, shape[:1], generator=inputs.generator).to(inputs.device)

    def train(step_of: Callable[[Any], Step], mode: str) -> Callable[[], Tensor]:
        torch.manual_seed(setup.seed)
        return partial(step_of(make().to(inputs.device, inputs.dtype)), x, labels)

    return {name: Contender(name, partial(train, step), same_result=False) for name, step in steps.items()}


def step_setup(make: Callable[[], nn.Module], shape: tuple[int, ...], setup: Setup) -> dict[str, Contender]:
    """Forward, cross entropy, backward, and for the private ones clip, noise and update."""
    inputs, batch = Inputs(setup), shape[0]
    steps = {
        "pyml": partial(_step, partial(_ours, batch=batch, scale=None), True),
        SCALED: partial(_step, partial(_scaled, inputs, batch=batch), True),
        OPACUS: partial(_step, partial(baselines.opacus_sgd, lr=RATE, multiplier=NOISE, clip=CLIP, batch=batch), True),
        BARE: partial(_step, partial(torch.optim.SGD, lr=RATE), False),
    }
    return _contenders(steps, make, shape, setup, inputs)


def ghost_setup(make: Callable[[], nn.Module], shape: tuple[int, ...], setup: Setup) -> dict[str, Contender]:
    """Forward, backward (norms), clipped sum (Opacus: a second backward pass), noise and update; the last: no noise."""
    steps = {
        "pyml": partial(_ghost_step, shape[0]), OPACUS: partial(_opacus_ghost_step, shape[0]),
        BARE: partial(_step, partial(torch.optim.SGD, lr=RATE), False),
    }  # fmt: skip
    return _contenders(steps, make, shape, setup, Inputs(setup))


def register(registry: Registry) -> None:
    names = {"pyml": "opacus", SCALED: "opacus", OPACUS: "opacus", BARE: None}
    # 1e7 gradients of 16 samples are 0.64 GB; of 64 they would be 2.6 GB, and the same work a number.
    for name, make, shape, size in (
        ("digits CNN, batch 64", _digits, (64, 1, SIDE, SIDE), 9_258),
        ("MLP of 1e7 parameters, batch 16", _mlp, (16, PIXELS), MLP_SIZE),
    ):
        registry.add(
            Case(
                "hetero_noise", "DP-SGD step", name, partial(step_setup, make, shape), names,
                partial(_cost, shape[0], size), modes=(STEP,),
                note="forward, cross entropy, gradients of samples (hooks of Opacus in both), clip, noise and SGD; "
                "costs are those of reading the gradients of the samples once",
            )
        )  # fmt: skip
    registry.add(
        Case(
            "hetero_noise", "ghost DP step", "MLP of 1e7 parameters, batch 16",
            partial(ghost_setup, _mlp, (16, PIXELS)), {name: names[name] for name in ("pyml", OPACUS, BARE)},
            lambda mode, element: Cost(bytes=4 * MLP_SIZE * element), modes=(STEP,),
            note="ghost clipping (hooks of Opacus in both): norms of the gradients of samples, their clipped sum "
            "(Opacus: a second backward pass), noise and SGD; costs are those of three reads of the weights and one "
            "write",
        )
    )  # fmt: skip


def _cost(batch: int, size: int, mode: str, element: int) -> Cost:
    return Cost(bytes=size * (batch + 2) * element)
