"""``pyml demo``: train on a generated scene, draw the change map, time the same work on the kernels and on torch."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyml.backend import pick
from pyml.methods._checkpoint import write_json
from pyml.methods._engine import few_threads
from pyml.methods._measure import Cost, alternate_seconds
from pyml.methods._options import choose_device, default_folder, set_threads
from pyml.methods.spectralkan.archs import map_patches
from pyml.methods.spectralkan.data import Scene, difference, pad_border, patch_view
from pyml.methods.spectralkan.predict import load_model, predict_scene
from pyml.methods.spectralkan.report import TABLES
from pyml.methods.spectralkan.scene import generate_scene
from pyml.methods.spectralkan.train import Options, train

# The network of the paper's parameter counts in the public code's form, which the demo also times on plain torch. The
# defaults of `pyml train spectralkan` (knots from the data) are more accurate: docs/spectralkan.md.
OPTIONS = Options(seeds=1, train_fraction=0.05, spectral_hidden=(16,), knots="uniform", extrapolation="zero")


def main(out: Path | None = None, *, device: str = "auto", threads: int | None = None) -> dict[str, Any]:
    """Run the demo and print two tables; returns what it measured, also written to ``demo.json``."""
    from rich.console import Console

    set_threads(threads)
    device = choose_device(device)
    console = Console()
    folder = out or default_folder("demo")
    scene = generate_scene(96, 96, 32)
    console.print(
        f"SpectralKAN in the public code's form on a generated scene of {_size(scene)}, "
        f"{OPTIONS.train_fraction:.0%} of the labels"
    )
    metrics = train(scene, OPTIONS, folder, device=device)
    TABLES.show(metrics, folder)
    run = folder / "spectralkan" / "seed0"
    model, _ = load_model(run / "checkpoint.safetensors")
    image = difference(scene.before, scene.after).to(device)
    rows = compare(model.to(device), image, scene)
    write_json(folder / "demo.json", rows)
    _print_gain(rows, console, device)
    console.print(f"change map: {run / 'change_map.png'}, with both images: {run / 'overview.png'}")
    return rows


def compare(model: torch.nn.Module, image: Tensor, scene: Scene, steps: int = 15) -> dict[str, Any]:
    """Time a training step and a map of the scene on the backend that is chosen here and on plain torch.

    Plain torch means the layers as the public code runs them, and the map patch by patch. Both do the same work from
    the same weights and with the same threads; ``agreement`` is the share of pixels that get the same label.
    """
    from pyml.nn import WKANLinear
    from pyml.ops.bspline import WKAN_LINEAR
    from pyml.reference.bspline_baselines import on_plain_torch, wkan_eager

    patch: int = model.patch_size  # type: ignore[assignment]
    plain = on_plain_torch(model, {WKANLinear: wkan_eager})

    @torch.no_grad()
    def plain_map(part: Tensor) -> Tensor:
        return map_patches(plain, pad_border(part, patch // 2, OPTIONS.border), patch)

    view = patch_view(pad_border(image, patch // 2, OPTIONS.border), patch)
    height, width = image.shape[1:]
    pixels = torch.arange(OPTIONS.batch_size, device=image.device) * 7 % (height * width)
    batch = view[pixels // width, pixels % width]
    labels = torch.from_numpy(scene.labels).to(image.device).flatten()[pixels].clamp_min(0)
    result: dict[str, Any] = {"backend": pick(WKAN_LINEAR, image.device.type, None), "scene": scene.name}
    networks = {"kernels": model, "torch": plain}
    calls = {name: _training_step(copy.deepcopy(network), batch, labels) for name, network in networks.items()}
    with few_threads(batch.numel()):
        seconds = alternate_seconds(calls, steps)
    maps = {}
    for name, mapped in (
        ("kernels", lambda part: predict_scene(model, part, border=OPTIONS.border)), ("torch", plain_map),
    ):  # fmt: skip
        mapped(image[:, :1])  # warm-up
        with Cost(image.device) as cost:
            scores = mapped(image)
        maps[name] = scores.argmax(0)
        result[name] = {"step_seconds": seconds[name], "map_seconds": cost.seconds, "map_peak_mb": cost.peak_mb}
    result["agreement"] = (maps["kernels"] == maps["torch"]).double().mean().item()
    return result


def _training_step(model: torch.nn.Module, batch: Tensor, labels: Tensor) -> Callable[[], None]:
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=OPTIONS.learning_rate)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(batch), labels).backward()
        optimizer.step()
        if batch.is_cuda:
            torch.cuda.synchronize()

    return step


def _size(scene: Scene) -> str:
    return f"{scene.before.shape[1]} x {scene.before.shape[2]} pixels and {scene.bands} bands"


def _print_gain(rows: dict[str, Any], console: Any, device: str) -> None:
    from rich.table import Table

    kernels, plain = rows["kernels"], rows["torch"]
    if rows["backend"] == "reference":
        console.print("No kernel can run here (see pyml info): both columns below are plain torch.")
    table = Table("same work, same weights", title=f"What the kernels gained here ({device})", title_justify="left")
    for column in (f"pyml ({rows['backend']})", "plain torch, eager", "gain"):
        table.add_column(column, justify="right")
    for name, key, scale, unit in (
        (f"training step, {OPTIONS.batch_size} pixels", "step_seconds", 1e3, "ms"),
        ("map of the whole scene", "map_seconds", 1e3, "ms"),
        ("extra memory of that map", "map_peak_mb", 1, "MB"),
    ):
        values = [row[key] * scale for row in (kernels, plain)]
        gain = f"{values[1] / values[0]:.1f} x" if values[0] > 0 else "-"
        table.add_row(name, *(f"{value:.1f} {unit}" for value in values), gain)
    console.print(table)
    console.print(f"The two maps agree on {rows['agreement']:.3%} of the pixels.")
