"""Train LSNet, its ablations and baselines on pairs of images, and write what a table needs."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from pyml.methods._engine import few_threads, fit, seed_everything
from pyml.methods._measure import BEST_PSNR, Cost, flops, image_scores, parameters
from pyml.methods._pictures import to_float
from pyml.methods._recipe import FROM_ZERO, NOT_NEGATIVE, SHARE, Recipe, Rule
from pyml.methods._sweep import Report, sweep
from pyml.methods.lsnet.archs import ARCHS, LSNETS, Affine, attention_flops, build
from pyml.methods.lsnet.data import Batches, Pairs, Split, check_crop, check_differ, describe, split_pairs
from pyml.methods.lsnet.figures import COLUMNS, save_sheet
from pyml.methods.lsnet.predict import enhance
from pyml.methods.lsnet.report import TABLES

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Options(Recipe):
    """Our recipe: the loss and the schedule of the paper (arXiv 2405.16197) are not known to us."""

    known_archs: ClassVar = ARCHS
    rules: ClassVar = {
        "test_fraction": SHARE, "split_seed": FROM_ZERO, "ssim_weight": NOT_NEGATIVE, "validate_every": FROM_ZERO,
        "ema": Rule("a decay from 0 (off) to below 1", lambda value: 0 <= value < 1),
    }  # fmt: skip

    archs: tuple[str, ...] = ("lsnet",)
    epochs: int = 20
    batch_size: int = 4
    learning_rate: float = 5e-3
    crop_size: int = 128
    test_fraction: float = 0.25
    split_seed: int = 0
    ssim_weight: float = 0.2
    ema: float = 0.0
    validate_every: int = 1


def train(
    pairs: Pairs, options: Options, out: Path, *, resume: bool = False, device: str = "auto", quiet: bool = False
) -> dict[str, Any]:
    """Train every arch of ``options`` with every seed on one split.

    ``out`` gets ``config.json``, ``metrics.json``, ``table.md`` and, in ``<arch>/seed<k>/``, checkpoint, logs, scores
    and contact sheet. After a kill, ``resume=True`` goes on from the last finished epoch and ends with the same
    weights, bit for bit.

    Returns:
        The content of ``metrics.json``.
    """
    options.check()
    check_crop(pairs, options.crop_size)
    check_differ(pairs)
    split = split_pairs(pairs, options.test_fraction, options.split_seed)

    def go(arch: str, seed: int, folder: Path, accelerator: "Accelerator", report: Report) -> dict[str, Any]:
        return _Run(arch, seed, pairs, split, options).go(folder, accelerator, report)

    def note(values: dict[str, float]) -> str:
        measured = f" test {values['test_psnr']:.2f} dB" if not math.isnan(values.get("test_psnr", math.nan)) else ""
        return f"loss {values['loss']:.4f} crops {values['psnr']:.2f} dB{measured}"

    facts = {"method": "lsnet", **describe(pairs, split)}
    return sweep(out, options, facts, TABLES, go, note=note, resume=resume, device=device, quiet=quiet)


class _Run:
    """One arch, one seed."""

    def __init__(self, arch: str, seed: int, pairs: Pairs, split: Split, options: Options) -> None:
        self.arch, self.seed, self.pairs, self.split, self.options = arch, seed, pairs, split, options

    def go(self, folder: Path, accelerator: "Accelerator", report: Report) -> dict[str, Any]:
        """Train (or fit), enhance the test images, score."""
        self.world = accelerator.num_processes
        seed_everything(self.seed)
        model = build(self.arch).to(accelerator.device)
        if self.arch in LSNETS:
            model, cost = self._train(model, folder, accelerator, report)
        else:
            with Cost(accelerator.device) as fitting:
                if isinstance(model, Affine):
                    model.fit(self.pairs, self.split.train)
            cost = {"train_seconds": fitting.seconds, "train_peak_mb": fitting.peak_mb}
        if not accelerator.is_main_process:
            return {}
        model.eval()
        images = self._images(accelerator.device)
        with Cost(accelerator.device) as one:
            enhance(model, images[0])
        with Cost(accelerator.device) as whole:
            after = [enhance(model, image) for image in images]
        measured = {"image_seconds": whole.seconds / len(images), "image_peak_mb": one.peak_mb}
        after = [image.cpu() for image in after]
        scores = self._scores(after)
        example = images[0].unsqueeze(0)
        attention = attention_flops(model, example.shape)
        count = len(after)
        kept = sorted({i * count // COLUMNS for i in range(COLUMNS)})  # spread over the test images
        shown = [self.split.test[i] for i in kept]
        before, targets = ([to_float(side[i]) for i in shown] for side in (self.pairs.inputs, self.pairs.targets))
        save_sheet(
            {"before": before, "after": [after[i] for i in kept]}, targets, [self.pairs.names[i] for i in shown],
            folder / "contact_sheet.png",
            f"{self.arch}, seed {self.seed}: {scores['psnr']:.2f} dB, SSIM {scores['ssim']:.4f} over all test images",
        )  # fmt: skip
        return {
            "model": {
                "parameters_stored": sum(p.numel() for p in model.parameters()),
                "parameters_used": parameters(model),
                "flops": (total := flops(model, example)), "attention_flops": attention,
                "gflop": total / 1e9, "attention_gflop": attention / 1e9, "image_size": list(example.shape[2:]),
            },
            "scores": {**scores, **cost, **measured},
        }  # fmt: skip

    def _train(
        self, model: nn.Module, folder: Path, accelerator: "Accelerator", report: Report
    ) -> tuple[nn.Module, dict[str, float]]:
        """The trained network (its average, where one is kept) and what training cost."""
        from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

        options = self.options
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(options.ema)) if options.ema else None
        final: nn.Module = model if average is None else average.module
        weights = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(weights, lr=options.learning_rate)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs)
        batches = Batches(self.pairs, self.split.train, options.crop_size, options.batch_size, self.seed, accelerator)

        def validate(epoch: int) -> dict[str, float]:
            due = options.validate_every and epoch % options.validate_every == 0
            if not due:
                return {"test_psnr": math.nan, "test_ssim": math.nan}
            final.eval()
            scores = self._scores([enhance(final, image) for image in self._images(accelerator.device)])
            return {f"test_{name}": value for name, value in scores.items()}

        with few_threads(options.batch_size * 3 * options.crop_size**2):
            fitted = fit(
                model, optimizer, scheduler, epochs=options.epochs, batches=batches, loss=self._loss, folder=folder,
                info={"method": "lsnet", "arch": self.arch, "seed": self.seed}, accelerator=accelerator, report=report,
                validate=validate, average=average,
            )  # fmt: skip
        return final, {"train_seconds": fitted.seconds, "train_peak_mb": fitted.peak_mb}

    def _loss(self, model: nn.Module, batch: tuple[Tensor, Tensor, Tensor, int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean of L1 + weight * (1 - SSIM) over the whole batch; processes average gradients, hence the factor."""
        from torchmetrics.functional.image import structural_similarity_index_measure

        inputs, targets, counted, pairs = batch
        found = model(inputs)
        each = (found - targets).abs().mean((1, 2, 3))
        if self.options.ssim_weight:
            ssim = structural_similarity_index_measure(found, targets, data_range=1.0, reduction="none")
            assert isinstance(ssim, Tensor)  # a pair only where the full image is asked for
            each = each + self.options.ssim_weight * (1 - ssim)
        total = (each * counted).sum()
        with torch.no_grad():
            error = (found.clamp(0, 1) - targets).square().mean((1, 2, 3))
            psnr = (-10 * error.log10()).clamp(max=BEST_PSNR)
        sums = {"loss": total, "psnr": (psnr * counted).sum(), "count": counted.sum()}
        return total * self.world / pairs, sums

    def _images(self, device: torch.device) -> list[Tensor]:
        """The test images."""
        return [to_float(self.pairs.inputs[i]).to(device) for i in self.split.test]

    def _scores(self, after: list[Tensor]) -> dict[str, float]:
        """Mean PSNR and SSIM over the test images."""
        each = [
            image_scores(image.cpu().unsqueeze(0), to_float(self.pairs.targets[i]).unsqueeze(0))
            for image, i in zip(after, self.split.test)
        ]
        return {name: sum(row[name] for row in each) / len(each) for name in each[0]}
