"""From a model, its optimizer and its loader to private training: per-sample gradients, Poisson batches, the optimizer.

Opacus gives the gradients of the samples (its GradSampleModule), and its BatchMemoryManager works on what comes out.
Batches are drawn here: from a secret source, with an exact rate, and by several processes without losing empty ones.
"""

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, Sampler, SequentialSampler

from pyml.ops import _check
from pyml.optim._state import Watch, check_layers, check_order
from pyml.optim.ghost import GhostNoiseOptimizer
from pyml.optim.hetero_noise import HeteroNoiseOptimizer
from pyml.privacy import _arguments as arguments
from pyml.privacy import noise_multiplier as needed_multiplier
from pyml.privacy import secure_batch
from pyml.privacy.scales import Scale

OP = "make_private"
GRAD_SAMPLE_MODES = ("hooks", "functorch", "ghost")


class PoissonBatches(Sampler[list[int]]):
    """Batches in which each record is with the same chance, independently of all others; some are empty.

    Args:
        records: how many there are.
        sample_rate: the chance of each.
        key: gives 32 secret bytes; batch n is then a function of them and n (ChaCha20), the same for any number of
            processes. So a run that is resumed with ``resume="repeat"`` repeats what it did after its checkpoint,
            instead of releasing other sums under the same noise. Without a key each batch comes from the operating
            system.
        start: called when an iteration starts; gives the number of its first batch.
        rank, world: this process draws the records whose number is ``rank`` modulo ``world``.

    An epoch has ceil(1 / sample_rate) batches.
    """

    def __init__(
        self, records: int, sample_rate: float, *, key: Callable[[], bytes] | None = None,
        start: Callable[[], int] = lambda: 0, rank: int = 0, world: int = 1,
    ) -> None:  # fmt: skip
        self.num_samples = arguments.count("PoissonBatches", "records", records)
        self.sample_rate = arguments.share("PoissonBatches", "sample_rate", sample_rate)
        if self.num_samples == 0 or self.sample_rate == 0:
            expected = "at least one record, and a rate above 0"
            _check.fail("PoissonBatches", "records, sample_rate", expected, (records, sample_rate))
        self.key, self.start, self.rank, self.world = key, start, rank, world

    def __len__(self) -> int:
        return math.ceil(1 / self.sample_rate - 1e-9)

    def __iter__(self) -> Iterator[list[int]]:
        first = self.start()
        for n in range(first, first + len(self)):
            yield self._batch(n)

    def _batch(self, n: int) -> list[int]:
        if self.key is None:
            mine = len(range(self.rank, self.num_samples, self.world))
            return (secure_batch(mine, self.sample_rate) * self.world + self.rank).tolist()
        ciphers = arguments.package("PoissonBatches", "cryptography.hazmat.primitives.ciphers")
        place = bytes(8) + n.to_bytes(8, "little")  # block 0 of stream n
        stream = ciphers.Cipher(ciphers.algorithms.ChaCha20(self.key(), place), mode=None).encryptor()
        drawn = secure_batch(self.num_samples, self.sample_rate, stream=lambda size: stream.update(bytes(size)))
        return drawn[drawn % self.world == self.rank].tolist()


def make_private(
    model: nn.Module, optimizer: Optimizer, loader: DataLoader, *, clip: Any, noise_multiplier: float | None = None,
    target_epsilon: float | None = None, delta: float | None = None, epochs: int | None = None, scale: Any = None,
    provenance: Any = None, seed: int | None = None, poisson: bool = True, distributed: bool | None = None,
    grad_sample_mode: str = "hooks", loss_reduction: str = "mean", batch_first: bool = True, **options: Any,
) -> tuple[nn.Module, HeteroNoiseOptimizer, DataLoader]:  # fmt: skip
    """Model, optimizer and loader for private training; the loop stays what it was.

    Args:
        model: wrapped in Opacus' GradSampleModule. No batch norm, no running statistics; a forward pass in training
            that writes to a parameter or a floating buffer is an error. With several processes its parameters become
            those of rank 0; it is not to be wrapped in DistributedDataParallel, as the optimizer joins the processes.
        optimizer: of parameters of this model.
        loader: its batch size is the expected size of the whole batch, over all processes. Its batches are replaced by
            Poisson batches of the same data set.
        clip, scale, provenance, seed, distributed, loss_reduction, options: as in `HeteroNoiseOptimizer`. A seed also
            fixes the batches.
        noise_multiplier: or, in its place, ``target_epsilon``, ``delta`` and ``epochs``.
        poisson: False keeps the loader; nothing provable is known of its batches, so there is no finite epsilon.
        grad_sample_mode: "hooks", "functorch" for all layers, or "ghost", which keeps no gradients of samples: the
            optimizer is then a `GhostNoiseOptimizer`, with ``optimizer.backward(losses)`` in the loop.
        batch_first: as in Opacus.

    Returns:
        The wrapped model, a `HeteroNoiseOptimizer` and a loader. For batches beyond the memory:
        ``opacus.utils.batch_memory_manager.BatchMemoryManager(data_loader=loader, optimizer=optimizer,
        max_physical_batch_size=n)``, or `HeteroNoiseOptimizer.virtual_step`.

    Raises:
        ValueError, TypeError: one sentence naming the argument, what was expected and what came.
        ImportError: a package of the extra [privacy] is not installed.
    """
    _check.member(OP, "grad_sample_mode", grad_sample_mode, GRAD_SAMPLE_MODES)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        _check.fail(OP, "model", "a bare module, as the optimizer adds up the gradients", "DistributedDataParallel")
    check_layers(OP, model, grad_sample_mode)
    size, rate = _batches(loader)
    if (noise_multiplier is None) == (target_epsilon is None):
        expected = "one of noise_multiplier and target_epsilon"
        _check.fail(OP, "noise_multiplier", expected, "both" if target_epsilon is not None else "none")
    if noise_multiplier is None:
        if delta is None or epochs is None or target_epsilon is None:
            _check.fail(OP, "delta, epochs", "numbers beside target_epsilon", (delta, epochs))
        source = scale.provenance if isinstance(scale, Scale) else provenance
        if source is None and (scale is None or (isinstance(scale, int | float) and scale == 1)):
            source = "public"  # there is nothing that it could tell
        steps = arguments.count(OP, "epochs", epochs) * math.ceil(1 / rate - 1e-9)
        noise_multiplier = needed_multiplier(target_epsilon, rate, steps, delta=delta, provenance=source)
    kind = GhostNoiseOptimizer if grad_sample_mode == "ghost" else HeteroNoiseOptimizer
    private = kind(
        optimizer, noise_multiplier=noise_multiplier, clip=clip, sample_rate=rate, expected_batch_size=size,
        scale=scale, provenance=provenance, seed=seed, distributed=distributed, loss_reduction=loss_reduction,
        sampling="poisson" if poisson else "shuffled", **options,
    )  # fmt: skip
    members = {id(p) for p in model.parameters()}
    if not all(id(p) in members for p in private.params):
        _check.fail(OP, "optimizer", "one of parameters of the model", "other parameters")
    wrapped = _wrapped(model, grad_sample_mode, loss_reduction, batch_first)
    Watch(OP, model)
    recurrent = arguments.package(OP, "opacus.layers.dp_rnn").DPRNNBase
    for layer in model.modules():
        if isinstance(layer, recurrent):
            layer.register_forward_pre_hook(check_order, with_kwargs=True)
    if isinstance(private, GhostNoiseOptimizer):
        private.module = wrapped
    if private.world > 1:
        for t in (*model.parameters(), *model.buffers()):
            first = t.detach().contiguous()
            dist.broadcast(first, 0)
            t.data.copy_(first)
    return wrapped, private, _poisson(loader, private, rate) if poisson else loader


def _batches(loader: DataLoader) -> tuple[int, float]:
    """The expected batch size and the sample rate of a loader."""
    if isinstance(loader.dataset, IterableDataset) or not loader.batch_size:
        _check.fail(OP, "loader", "one with a batch size, over a data set with a length", "another")
    if not isinstance(loader.sampler, SequentialSampler | RandomSampler | DistributedSampler):
        expected = "a loader of the whole data set, in order or shuffled"
        _check.fail(OP, "loader", expected, type(loader.sampler).__name__)
    records = len(loader.dataset)  # type: ignore[arg-type]
    if records == 0:
        _check.fail(OP, "loader", "at least one record", 0)
    size = min(loader.batch_size, records)
    return size, size / records


def _wrapped(model: nn.Module, mode: str, loss_reduction: str, batch_first: bool) -> nn.Module:
    gradients = arguments.package(OP, "opacus.grad_sample")
    kind, options = gradients.GradSampleModule, {"force_functorch": mode == "functorch"}
    if mode == "ghost":  # the optimizer sums losses itself, each times its clip factor
        kind, loss_reduction, options = gradients.GradSampleModuleFastGradientClipping, "sum", {}
    if isinstance(model, gradients.AbstractGradSampleModule):
        if type(model) is not kind:
            _check.fail(OP, "model", f"a bare module, or Opacus' {kind.__name__}", type(model).__name__)
        if model.loss_reduction != loss_reduction or model.batch_first != batch_first:
            got = f"{model.loss_reduction!r}, {model.batch_first}"
            _check.fail(OP, "model", f"loss_reduction {loss_reduction!r} and batch_first {batch_first}", got)
        made = model
    else:
        made = kind(model, batch_first=batch_first, loss_reduction=loss_reduction, **options)
    # Opacus' hooks stand on the first layer too, whose input needs no gradient: torch would warn of each such model.
    # Appended, so that a filter of the caller's own comes first.
    warnings.filterwarnings("ignore", message="Full backward hook is firing", append=True)
    made.forbid_grad_accumulation()  # two backward passes, two draws: a record might be in both
    return made


def _poisson(loader: DataLoader, private: HeteroNoiseOptimizer, rate: float) -> DataLoader:
    """The same loader with Poisson batches. An empty one has the shapes and types of others, and no record."""
    dataset: Any = loader.dataset
    collate = arguments.package(OP, "opacus.data_loader").wrap_collate_with_empty(collate_fn=loader.collate_fn)
    collate([dataset[0]])  # it learns what a batch is made of, since the first one may be empty
    # Secure noise is never the same again: a batch that came again under it would be no sample of its own.
    key = None if private.secure else private.batch_key
    batches = PoissonBatches(len(dataset), rate, key=key, start=private._start, rank=private.rank, world=private.world)
    return DataLoader(
        dataset, batch_sampler=batches, collate_fn=collate, num_workers=loader.num_workers,
        pin_memory=loader.pin_memory, timeout=loader.timeout, worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context, generator=loader.generator,
        prefetch_factor=loader.prefetch_factor, persistent_workers=loader.persistent_workers,
    )  # fmt: skip
