"""One training step of EnLa with transport in its logits, and the same step with the transport on plain torch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyml.reference import batched_ot_baselines as baselines

from ..registry import BOTH, Case, Contender, Cost, Registry, Setup
from .common import Inputs

STEP = "training step"
EPS, ITERATIONS, TEXTS, HEADS = 0.1, 100, 4, 4
PLOT, NONE = "PLOT's loop", "no transport"
Form = Callable[..., tuple[Tensor, Tensor]]


class PlainAlignment(nn.Module):
    """`OTAlignment.similarity` as PLOT's code has it, on a plan that one of the baselines finds."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.form = form

    def similarity(self, local: Tensor, text: Tensor) -> Tensor:
        """``[B, M, D]``, ``[N, K, D]`` -> ``[B, K]``; the plan is a constant."""
        sim = torch.einsum("bmd,nkd->bkmn", F.normalize(local, dim=-1), F.normalize(text, dim=-1))
        with torch.no_grad():
            plan = self.form((1 - sim).flatten(0, 1), EPS, ITERATIONS)[0]
        return (plan.view(sim.shape) * sim).sum((-1, -2))


def _forms() -> dict[str, Form]:
    from .batched_ot import COMPILED_LOG, KERNEL, LOG

    log = torch.compile(baselines.log_block, dynamic=False)
    return {
        LOG: baselines.log_domain,
        COMPILED_LOG: partial(baselines.log_domain, block=log),
        KERNEL: baselines.kernel_space,
        PLOT: baselines.plot_loop,
    }


def _clip(side: int, patch: int, width: int, layers: int, joint: int) -> Any:
    """A CLIPModel of this size; the numbers in it do not matter to the time."""
    from transformers import CLIPConfig, CLIPModel

    vision = {
        "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, "image_size": side,
        "num_attention_heads": HEADS, "patch_size": patch,
    }  # fmt: skip
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    return CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=joint))


def step_setup(batch: int, classes: int, sizes: tuple[int, int, int, int, int], setup: Setup) -> dict[str, Contender]:
    """Forward, cross entropy, backward and AdamW of the learned tensors; the frozen image tower runs each time."""
    from pyml.nn import EnLa

    inputs = Inputs(setup)
    torch.manual_seed(setup.seed)
    clip = _clip(*sizes).to(inputs.device, inputs.dtype)
    images = inputs.normal(batch, 3, sizes[0], sizes[0])
    texts = inputs.normal(TEXTS, classes, sizes[-1])
    labels = (inputs.uniform(batch, low=0.0).float() * classes).long()

    def train(form: Form | None, ot: str | None, mode: str) -> Callable[[], Any]:
        torch.manual_seed(setup.seed)
        network = EnLa(clip, texts, pool="mean", ot=ot, eps=EPS, max_iter=ITERATIONS)
        if form is not None:
            network.alignment = PlainAlignment(form)  # type: ignore[assignment]
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)

        def call() -> Tensor:
            optimizer.zero_grad()
            loss = network.loss(images, labels)
            loss.backward()
            optimizer.step()
            return loss

        return call

    made = {"pyml": None, **_forms()}
    found = {name: Contender(name, partial(train, form, "logit")) for name, form in made.items()}
    found[NONE] = Contender(NONE, partial(train, None, None), same_result=False)
    return found


def _step_cost(batch: int, n: int, mode: str, size: int) -> Cost:
    from .batched_ot import solve_cost

    return solve_cost(batch, n, TEXTS, BOTH, size)


def register(registry: Registry) -> None:
    from .batched_ot import COMPILED_LOG, KERNEL, LOG

    names: dict[str, str | None] = dict.fromkeys(("pyml", LOG, COMPILED_LOG, KERNEL, PLOT, NONE), "transformers")
    for batch, classes, sizes in ((32, 24, (32, 8, 96, 3, 64)), (32, 100, (112, 16, 192, 4, 256))):
        places = (sizes[0] // sizes[1]) ** 2
        registry.add(
            Case(
                "batched_ot", "EnLa step", f"{batch * classes} problems of {places}x{TEXTS}",
                partial(step_setup, batch, classes, sizes), names, partial(_step_cost, batch * classes, places),
                modes=(STEP,), devices=("cpu",), note="forward, backward and AdamW with the frozen image tower "
                f"({sizes[3]} layers of {sizes[2]}) of {batch} images; costs are those of the transport",
            )
        )  # fmt: skip
