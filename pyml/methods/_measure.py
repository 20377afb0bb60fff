"""What a run cost and how good it was: peak memory, seconds, operations, scores, and the machine it ran on."""

import ctypes
import gc
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

BEST_PSNR = 100.0  # dB: a root mean square error of 1e-5, which no picture of 8 bits can show
SILU_FLOPS = 4  # exp, add, divide, multiply
BASIS_FLOPS = 25  # the order + 1 cubic B-splines that are not zero at x, by their closed form


class Cost:
    """Wall seconds and extra peak memory of a block: ``with Cost(device) as cost: ...``, then ``cost.seconds``.

    On a CPU the memory is the high-water mark of the resident set above its level at the start (freed heap is given
    back first, so that an earlier run in the same process does not hide anything); on CUDA it is torch's own peak.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.seconds = 0.0
        self.peak_bytes = 0
        self._open = False
        self._before_pause = 0

    def __enter__(self) -> "Cost":
        gc.collect()
        self._before_pause = 0
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._base = torch.cuda.memory_allocated(self.device)
        else:
            _give_heap_back()
            self._base = _reset_resident_peak()
        self._open = True
        self._start = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds = time.perf_counter() - self._start
        self.peak_bytes = self._peak()
        self._open = False

    def _peak(self) -> int:
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else _resident_peak()
        return max(self._before_pause, peak - self._base)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What runs inside counts neither as time nor as memory."""
        self._before_pause = self._peak()
        start = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
                torch.cuda.reset_peak_memory_stats(self.device)
            else:
                _give_heap_back()
                _reset_resident_peak()
            self._start += time.perf_counter() - start

    def running(self) -> float:
        """Seconds so far, inside the block."""
        return time.perf_counter() - self._start

    @property
    def peak_mb(self) -> float:
        """Extra peak memory in MB (10^6 bytes): so far inside the block, of the block after it."""
        return (self._peak() if self._open else self.peak_bytes) / 1e6


def _give_heap_back() -> None:
    if sys.platform == "linux":
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        except (OSError, AttributeError):
            return  # not glibc: the figure is then an upper bound


def _status(field: str) -> int | None:
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    for line in status.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None


def _reset_resident_peak() -> int:
    """Start the kernel's high-water mark afresh; the resident bytes now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return _resident_peak()  # without the reset only growth beyond the old peak can be seen
    return _status("VmRSS") or _resident_peak()


def _resident_peak() -> int:
    peak = _status("VmHWM")
    if peak is not None:
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def parameters(model: nn.Module) -> int:
    """Trainable numbers of a model."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def flops(model: nn.Module, example: Tensor) -> int:
    """Floating-point operations of one forward pass; a multiply-add counts 2.

    KAN layers are counted on useful work, spline included: per input value the SiLU, the ``order + 1`` basis functions
    that are not zero and their weighted sum (once for a WKAN layer, once per output for a KAN layer), and the linear
    maps. `BiLevelRoutingAttention` counts itself, its two attention products included; convolutions around it count as
    their multiply-adds. A model without such layers is counted by torch's own counter: matrix products, in
    attention too, and convolutions.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from pyml.nn import BiLevelRoutingAttention, KANLinear, WKANLinear

    total = 0

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        if isinstance(layer, BiLevelRoutingAttention):
            total += layer.flops(inputs[0].shape)[0]
        elif isinstance(layer, nn.Conv2d):
            total += 2 * output.numel() * layer.weight[0].numel()
        else:
            values = inputs[0].numel()
            outputs = output.shape[-1]
            spline = 2 * (getattr(layer, "spline_order", 3) + 1)
            each = SILU_FLOPS + BASIS_FLOPS
            each += (spline + 2 * outputs + 2 * outputs) if isinstance(layer, WKANLinear) else (spline + 2) * outputs
            total += values * each

    kinds: tuple[type[nn.Module], ...] = (KANLinear, WKANLinear, BiLevelRoutingAttention)
    layers = [m for m in model.modules() if isinstance(m, kinds)]
    if not layers:
        # The counter knows attention as matrix products only: not in the kernels for a CPU, nor in the fused encoder
        # layer that torch takes in evaluation without gradients.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(example)
        return counter.get_total_flops()
    if any(isinstance(m, BiLevelRoutingAttention) for m in layers):
        inside = {m for layer in layers for m in layer.modules()}
        layers += [m for m in model.modules() if isinstance(m, nn.Conv2d) and m not in inside]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    try:
        with torch.no_grad():
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    return total


def change_scores(predicted: Tensor, truth: Tensor) -> dict[str, float]:
    """Overall accuracy, average (per-class) accuracy, Cohen's kappa and the F1 of class 1, on int64 class indices."""
    from torchmetrics.functional import accuracy, cohen_kappa, f1_score

    options: dict[str, Any] = {"task": "multiclass", "num_classes": 2}
    return {
        "oa": accuracy(predicted, truth, average="micro", **options).item(),
        "aa": accuracy(predicted, truth, average="macro", **options).item(),
        "kappa": cohen_kappa(predicted, truth, **options).item(),
        "f1": f1_score(predicted, truth, task="binary").item(),
    }


def image_scores(predicted: Tensor, truth: Tensor) -> dict[str, float]:
    """Mean PSNR (dB) and SSIM over the images of a batch ``[B, C, H, W]`` with values in 0..1; predicted is clipped.

    Equal images, whose PSNR is infinite, count as `BEST_PSNR`.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    predicted = predicted.clamp(0, 1)
    each = peak_signal_noise_ratio(predicted, truth, data_range=1.0, dim=(1, 2, 3), reduction="none")
    psnr = each.clamp(max=BEST_PSNR).mean()
    ssim = structural_similarity_index_measure(predicted, truth, data_range=1.0)
    assert isinstance(ssim, Tensor)  # a pair only where the full image is asked for
    return {"psnr": psnr.item(), "ssim": ssim.item()}


def summarise(rows: Sequence[Mapping[str, float | None]]) -> dict[str, dict[str, Any]]:
    """Mean, sample standard deviation (0 for one value) and the values themselves, name by name. None is a value that
    is missing; where all are, there is no mean."""
    found = {name: [value for row in rows if (value := row[name]) is not None] for name in rows[0]}
    return {
        name: {
            "mean": statistics.fmean(values) if values else None,
            "std": statistics.stdev(values) if len(values) > 1 else 0.0,
            "values": [row[name] for row in rows],
        }
        for name, values in found.items()
    }


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Versions and machine, for metrics.json."""
    from pyml import __version__
    from pyml.backend import load_extension

    device = torch.device(device)
    return {
        "pyml": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "extension": load_extension() or "loaded",
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def alternate_seconds(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median wall seconds of each call, which take turns, after one warm-up each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}
