"""Train SpectralKAN, its ablations or a rival on one scene with several seeds, and write what a table needs."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyml.methods import UserError
from pyml.methods._checkpoint import checksum
from pyml.methods._engine import epoch_generator, few_threads, fit, seed_everything
from pyml.methods._measure import Cost, change_scores, flops, parameters
from pyml.methods._recipe import COUNT, NOT_NEGATIVE, POSITIVE, SHARE, Recipe, Rule, among
from pyml.methods._sweep import Report, sweep
from pyml.methods.spectralkan.archs import ARCHS, ODD, build, fit_knots
from pyml.methods.spectralkan.data import (
    BORDERS,
    Scene,
    Split,
    check_differ,
    check_labels,
    difference,
    joint_range,
    pad_border,
    patch_view,
    split_pixels,
)
from pyml.methods.spectralkan.figures import save_figures
from pyml.methods.spectralkan.predict import predict_scene
from pyml.methods.spectralkan.report import TABLES
from pyml.ops.bspline import EXTRAPOLATIONS

if TYPE_CHECKING:
    from accelerate import Accelerator

KNOTS = ("data", "uniform")
KNOT_VALUES = 2**22  # values of training patches that the knots are fitted to: 34 MB in float64


@dataclass(frozen=True)
class Options(Recipe):
    """The recipe: that of the paper (arXiv 2407.00949) and its released code, but for ``knots`` and ``extrapolation``.

    The released code means ``knots="uniform", extrapolation="zero"``. Why the defaults differ: docs/spectralkan.md.
    """

    known_archs: ClassVar = tuple(ARCHS)
    rules: ClassVar = {
        "border": among(BORDERS), "knots": among(KNOTS), "extrapolation": among(EXTRAPOLATIONS), "patch_size": ODD,
        "spectral_hidden": Rule("widths of at least 1", lambda widths: all(width >= 1 for width in widths)),
        "train_fraction": SHARE, "block_size": COUNT, "weight_decay": NOT_NEGATIVE, "step_epochs": COUNT,
        "step_factor": POSITIVE,
    }  # fmt: skip

    archs: tuple[str, ...] = ("spectralkan",)
    seeds: int = 5
    epochs: int = 200
    batch_size: int = 64
    spectral_hidden: tuple[int, ...] = ()
    patch_size: int = 5
    knots: str = "data"
    extrapolation: str = "linear"
    train_fraction: float = 0.01
    split: str = "random"
    block_size: int = 32
    weight_decay: float = 0.0
    step_epochs: int = 10
    step_factor: float = 0.9
    border: str = "symmetric"


def train(
    scene: Scene, options: Options, out: Path, *, resume: bool = False, device: str = "auto", quiet: bool = False
) -> dict[str, Any]:
    """Train every arch of ``options`` with every seed; one seed means one split, shared by all archs.

    ``out`` gets ``config.json``, ``metrics.json``, ``table.md`` and, in ``<arch>/seed<k>/``, checkpoint, logs, scores
    and pictures. After a kill, ``resume=True`` goes on from the last finished epoch and ends with the same weights, bit
    for bit.

    Returns:
        The content of ``metrics.json``.
    """
    options.check()
    check_labels(scene.labels)
    check_differ(scene.before, scene.after)
    height, width = scene.before.shape[1:]
    if options.patch_size > min(height, width):
        raise UserError(
            f"patch-size: expected at most the sides of the images, {height} x {width}, got {options.patch_size}"
        )
    splits = {
        seed: split_pixels(
            scene.labels, options.train_fraction, seed, options.split, options.patch_size, options.block_size
        )
        for seed in options.seed_range
    }
    low, high = joint_range(scene.before, scene.after)
    image = difference(scene.before, scene.after, low, high)
    info = {
        "method": "spectralkan", "bands": scene.bands, "patch_size": options.patch_size, "border": options.border,
        "spectral_hidden": list(options.spectral_hidden), "extrapolation": options.extrapolation,
        "dropped_bands": list(scene.dropped_bands), "low": low.tolist(), "high": high.tolist(),
    }  # fmt: skip

    def go(arch: str, seed: int, folder: Path, accelerator: "Accelerator", report: Report) -> dict[str, Any]:
        there = image.to(accelerator.device)
        run = _Run(arch, seed, scene, there, splits[seed], options, {**info, "arch": arch, "seed": seed})
        return run.go(folder, accelerator, report)

    facts = {
        "method": "spectralkan", "scene": scene.name, "size": [height, width], "bands": scene.bands,
        "data_checksum": checksum((scene.before, scene.after, scene.labels)),
    }  # fmt: skip
    return sweep(
        out, options, facts, TABLES, go, resume=resume, device=device, quiet=quiet,
        note=lambda values: f"loss {values['loss']:.4f} accuracy {values['accuracy']:.4f}",
    )  # fmt: skip


class _Run:
    """One arch, one seed."""

    def __init__(
        self, arch: str, seed: int, scene: Scene, image: Tensor, split: Split, options: Options, info: dict[str, Any]
    ) -> None:
        self.arch, self.seed, self.scene, self.image = arch, seed, scene, image
        self.split, self.options, self.info = split, options, info

    def go(self, folder: Path, accelerator: "Accelerator", report: Any) -> dict[str, Any]:
        """Train, map, score."""
        options = self.options
        seed_everything(self.seed)
        bands = self.scene.bands
        model = build(self.arch, bands, options.patch_size, options.spectral_hidden, options.extrapolation)
        optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, options.step_epochs, options.step_factor)
        batches = Batches(self.image, self.scene.labels, self.split.train, self.seed, options, accelerator)
        if options.knots == "data":
            fit_knots(model, batches.sample(KNOT_VALUES).to("cpu"))
        with few_threads(options.batch_size * bands * options.patch_size**2):
            fitted = fit(
                model, optimizer, scheduler, epochs=options.epochs, batches=batches, loss=batches.loss, folder=folder,
                info=self.info, accelerator=accelerator, report=report,
            )  # fmt: skip
        row: dict[str, Any] = {}
        if accelerator.is_main_process:
            with Cost(accelerator.device) as mapping:
                predicted = predict_scene(model, self.image, border=options.border).argmax(0).cpu()
            truth = torch.from_numpy(self.scene.labels).flatten()
            scores = change_scores(predicted.flatten()[self.split.test], truth[self.split.test])
            example = self.image.new_zeros(1, bands, options.patch_size, options.patch_size)
            row = {
                "model": {"parameters": parameters(model), "flops_per_pixel": flops(model, example)},
                "scores": {
                    **scores, "train_pixels": len(self.split.train), "test_pixels": len(self.split.test),
                    "train_seconds": fitted.seconds, "map_seconds": mapping.seconds,
                    "train_peak_mb": fitted.peak_mb, "map_peak_mb": mapping.peak_mb,
                },
            }  # fmt: skip
            title = f"{self.arch}, seed {self.seed}: OA {scores['oa']:.4f}, kappa {scores['kappa']:.4f}"
            save_figures(predicted.numpy(), self.scene, folder, title)
        return row


class Batches:
    """The training pixels of one seed as batches; the scene stays one tensor and patches are cut out by index."""

    def __init__(
        self, image: Tensor, labels: Any, train: Tensor, seed: int, options: Options, accelerator: "Accelerator"
    ) -> None:
        width = labels.shape[1]
        device = image.device
        self.view = patch_view(pad_border(image, options.patch_size // 2, options.border), options.patch_size)
        self.rows, self.columns = (train // width).to(device), (train % width).to(device)
        self.labels = torch.from_numpy(labels).flatten()[train].to(device)
        self.seed, self.size = seed, options.batch_size
        self.rank, self.world = accelerator.process_index, accelerator.num_processes

    def __call__(self, epoch: int) -> Iterator[tuple[Tensor, Tensor, int]]:
        """(patches ``[B, bands, p, p]``, labels ``[B]``, pixels over all processes) of this process, shuffled."""
        order = torch.randperm(len(self.labels), generator=epoch_generator(self.seed, epoch)).to(self.labels.device)
        for batch in order.split(self.size):
            mine = batch[self.rank :: self.world]
            yield self.view[self.rows[mine], self.columns[mine]], self.labels[mine], len(batch)

    def sample(self, values: int) -> Tensor:
        """Patches ``[n, bands, p, p]`` spread evenly over the training pixels, all of them where ``values`` allows."""
        count = len(self.labels)
        wanted = min(count, max(1, values // self.view[0, 0].numel()))
        chosen = torch.arange(wanted, device=self.labels.device) * count // wanted
        return self.view[self.rows[chosen], self.columns[chosen]]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor, int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy over the whole batch: processes average their gradients, hence the factor."""
        patches, labels, pixels = batch
        scores = model(patches)
        total = F.cross_entropy(scores, labels, reduction="sum")
        sums = {
            "loss": total,
            "accuracy": (scores.argmax(1) == labels).sum(),
            "count": torch.tensor(float(len(labels)), device=labels.device),
        }
        return total * self.world / pixels, sums
