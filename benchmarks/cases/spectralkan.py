"""SpectralKAN as a whole: one training step, and the prediction of a whole scene.

The other contenders run the same model, with the same parameters, on plain torch.
"""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyml.reference import bspline_baselines as baselines

from ..registry import Case, Contender, Cost, Registry, Setup, Target
from .common import Inputs

STEP, SCENE = "training step", "whole scene"
PATCH, HIDDEN, CLASSES, G = 5, 16, 2, 5
BATCH = 1000  # patches of one forward call where patches are formed
MEASURED_BATCHES = 20
Network = Any  # a module, or what torch.compile makes of it


def _plain(model: nn.Module, form: Callable[..., Tensor]) -> Network:
    from pyml.nn import WKANLinear

    return baselines.on_plain_torch(model, {WKANLinear: form})


def _compiled(model: nn.Module) -> Network:
    return torch.compile(_plain(model, baselines.wkan_closed), dynamic=False)


def _model(bands: int, inputs: Inputs, seed: int) -> nn.Module:
    from pyml.methods.spectralkan.model import SpectralKAN

    torch.manual_seed(seed)
    return SpectralKAN(num_classes=CLASSES, bands=bands, patch_size=PATCH).to(inputs.device, inputs.dtype)


def step_setup(batch: int, bands: int, setup: Setup) -> dict[str, Contender]:
    """Forward, cross-entropy, backward and Adam on ``batch`` patches."""
    inputs = Inputs(setup)
    x = inputs.uniform(batch, bands, PATCH, PATCH)
    labels = (inputs.uniform(batch).float() > 0).long()
    model = _model(bands, inputs, setup.seed)

    def train(make: Callable[[], Network], mode: str) -> Callable[[], Any]:
        network = make()
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)

        def call() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(network(x), labels)
            loss.backward()
            optimizer.step()
            return loss

        return call

    makes: dict[str, Callable[[], Network]] = {
        "pyml": partial(copy.deepcopy, model),  # each trains a copy of its own, all from one start
        "eager": lambda: _plain(model, baselines.wkan_eager),
        "compiled": partial(_compiled, model),
    }
    return {name: Contender(name, partial(train, make)) for name, make in makes.items()}


def scene_setup(height: int, width: int, bands: int, setup: Setup) -> dict[str, Contender]:
    """Class scores of every pixel of a difference image ``[bands, height, width]``."""
    inputs = Inputs(setup)
    scene = inputs.uniform(bands, height, width)
    model = _model(bands, inputs, setup.seed).eval()
    batches = math.ceil(height * width / BATCH)
    scale = batches / MEASURED_BATCHES

    def whole(mode: str) -> Callable[[], Any]:
        from pyml.methods.spectralkan.predict import predict_scene

        return torch.no_grad()(lambda: predict_scene(model, scene, border="replicate"))

    def on_patches(make: Callable[[], Network], mode: str) -> Callable[[], Any]:
        network = make().eval()
        half = PATCH // 2

        @torch.no_grad()
        def call() -> Tensor:
            padded = F.pad(scene.unsqueeze(0), (half,) * 4, mode="replicate")
            view = padded.squeeze(0).unfold(1, PATCH, 1).unfold(2, PATCH, 1)  # [bands, H, W, 5, 5], no copy
            scores = []
            for n in range(MEASURED_BATCHES):
                pixel = torch.arange(n * BATCH, (n + 1) * BATCH, device=scene.device) % (height * width)
                patch = view[:, pixel // width, pixel % width].transpose(0, 1).contiguous()
                scores.append(network(patch))
            return torch.cat(scores)

        return call

    def part(name: str, make: Callable[[], Network]) -> Contender:
        return Contender(name, partial(on_patches, make), scale=scale, same_result=False)

    return {
        "pyml": Contender("pyml", whole),
        "pyml on patches": part("pyml on patches", lambda: model),
        "eager": part("eager", lambda: _plain(model, baselines.wkan_eager)),
        "compiled": part("compiled", partial(_compiled, model)),
    }


def _cost(pixels: int, bands: int, train: bool, shared: bool, mode: str, size: int) -> Cost:
    """Both layers on every pixel; ``shared``: a value is read, and goes through the basis, once for all patches."""
    from .bspline import wkan_cost

    kind = "forward+backward" if train else "forward"
    values = pixels * bands if shared else None
    layers = [
        wkan_cost(pixels * bands, PATCH * PATCH, HIDDEN, G, kind, size, pixels=values),
        wkan_cost(pixels * bands, HIDDEN, 1, G, kind, size),
        wkan_cost(pixels, bands, CLASSES, G, kind, size),
    ]
    moved = size * (pixels * bands * (1 if shared else PATCH * PATCH) + pixels * CLASSES)
    return Cost(sum(c.flops for c in layers), moved, sum(c.exps for c in layers), sum(c.matrix for c in layers))


def register(registry: Registry) -> None:
    names: dict[str, str | None] = {"pyml": None, "eager": None, "compiled": None}
    registry.add(
        Case(
            "bspline", "SpectralKAN step", "64 patches x 224 bands", partial(step_setup, 64, 224), names,
            partial(_cost, 64, 224, True, False), modes=(STEP,), note="forward, backward and Adam",
        )
    )  # fmt: skip
    registry.add(
        Case(
            "bspline", "SpectralKAN scene", "450x140x155", partial(scene_setup, 450, 140, 155),
            {**names, "pyml on patches": None}, partial(_cost, 450 * 140, 155, False, True), modes=(SCENE,),
            targets=(Target("seconds", 1.0, mode=SCENE), Target("bytes", 150e6, mode=SCENE)),
            note="forms on patches: scaled from 20 batches of 1,000 patches",
        )
    )  # fmt: skip
