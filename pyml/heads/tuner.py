"""Training of chosen heads alone: their slices of q, k, v and o, with gradients and optimizer state of that size."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyml.heads import delta
from pyml.heads.adapters import adapter, is_transposed
from pyml.heads.hooks import evaluating
from pyml.heads.optimizer import SliceAdamW, refuse_alone, refuse_shards
from pyml.heads.selection import by_projection, positive, split, whole
from pyml.heads.tuned import TunerReport, detach, freeze, put_back_on_failure, refuse_tuned
from pyml.nn.head_update import HeadLinear, HeadLora
from pyml.ops import _check

OP = "HeadTuner"


class _Part(NamedTuple):
    """One trained block: which head of which projection, and where its block is."""

    projection: str
    head: int  # for k and v, the key-value head
    block: int
    scale: float


class HeadTuner:
    """Freezes a causal LM but for the slices of chosen heads, in place.

    The Linears that hold such slices become `pyml.nn.head_update.HeadLinear`: the backward computes the gradients of
    these slices alone and ends below the lowest one, and an optimizer holds state for them alone. Everything else
    stays bit for bit what it was, whatever the weight decay. Train with a plain loop, or with

        Trainer(model=model, args=arguments, train_dataset=data, optimizers=(tuner.optimizer(lr), None))

    since the default of `transformers.Trainer`, torch's fused AdamW, writes beside strided slices (its first step
    raises). Checkpoint with ``use_reentrant=False`` and without ``enable_input_require_grads``: both alternatives run
    the backward down to the embeddings. (Newer versions of transformers call the latter with checkpointing: call
    ``model.disable_input_require_grads()`` behind that.) Gradients that the model has from before are dropped.

    Args:
        model: a causal LM of a layout that `pyml.heads.adapter` knows, with floating weights.
        heads: pairs (layer, head), a bool mask ``[L, H]``, a `Selection`, whose MLPs are trained too, or a dict of
            these for each projection.
        projections: of "q", "k", "v", "o". SPT trains q and o, the arithmetic paper all four. Where several query
            heads share a key-value head, its k and v rows are trained once, and `siblings` names who else reads them.
        mlps: layers whose MLP is trained whole (its weights; no biases and no norms are trained anywhere).
        lora_rank: train a product of this rank within each slice instead of the slice.
        lora_alpha: its factor times the rank; by default the rank.
        grad_scale: factor of the slices' gradients: a number, or "heads" for H / h, heads of a layer over trained ones
            (the arithmetic paper's; under Adam it acts through eps and clipping alone).
        verbose: print `report`.

    Attributes:
        model, adapter: the model, now with other Linears.
        lowest_layer: the lowest layer with anything trained.
        siblings: by layer, the query heads that change without being chosen.

    Raises:
        ValueError, TypeError: one sentence.
    """

    def __init__(
        self, model: Any, heads: Any, projections: Sequence[str] = ("q", "o"), mlps: Sequence[int] = (), *,
        lora_rank: int | None = None, lora_alpha: float | None = None, grad_scale: float | str | None = None,
        verbose: bool = True,
    ) -> None:  # fmt: skip
        a = self.adapter = adapter(model, OP)
        self.model = a.model
        heads, selected = split(heads)
        self.heads = by_projection(OP, heads, projections, a.num_layers, a.num_heads)
        given = list(mlps) if isinstance(mlps, (Sequence, set, frozenset)) else [mlps]
        if not all(whole(n) and 0 <= n < a.num_layers for n in given + selected):
            _check.fail(OP, "mlps", f"layers in 0..{a.num_layers - 1}", repr(mlps if given else selected))
        if given and selected and set(given) != set(selected):
            _check.fail(OP, "mlps", f"those of the selection, {selected}, or none beside it", repr(mlps))
        self.mlps = sorted({*given, *selected})
        if lora_rank is not None and not (whole(lora_rank) and 0 < lora_rank <= a.head_dim):
            _check.fail(OP, "lora_rank", f"None or an integer in 1..{a.head_dim}, the width of a head", lora_rank)
        if lora_rank is not None and grad_scale is not None:
            _check.fail(OP, "grad_scale", "None with lora_rank", grad_scale)
        if grad_scale is not None and grad_scale != "heads" and not positive(grad_scale):
            _check.fail(OP, "grad_scale", 'None, a number above 0 or "heads"', repr(grad_scale))
        if lora_alpha is not None and not (lora_rank and positive(lora_alpha)):
            expected = "a number above 0" if lora_rank else "None without lora_rank"
            _check.fail(OP, "lora_alpha", expected, repr(lora_alpha))
        self.lora_rank, self.lora_alpha = lora_rank, float(lora_alpha or lora_rank or 1)
        parts = self._parts(grad_scale)
        if not parts and not self.mlps:
            _check.fail(OP, "heads", "at least one head or MLP", "none")
        self._refuse_others(parts)
        self._total = sum(p.numel() for p in self.model.parameters())
        self._detached = self._warned = False
        self._tuned: dict[str, Tensor] | None = None
        self._warn()
        with put_back_on_failure(self.model):
            freeze(self.model)
            self._swap(parts)
            for layer in self.mlps:
                for p in a.mlp(layer).parameters():
                    p.requires_grad_(p.dim() > 1)
            self.siblings = self._siblings()
            self.lowest_layer = min([layer for layer, _ in parts] + self.mlps)
            named = self.named_parameters()
            self._before = {name: p.detach().cpu().clone() for name, p in named if self._direct(name)}
            if verbose:
                print(self.report())

    def _warn(self) -> None:
        """Once, of a backward that would be longer than it need be."""
        asks = any(getattr(self.model, name, None) for name in ("_require_grads_hooks", "_require_grads_hook"))
        if asks and not self._warned:
            self._warned = True
            warnings.warn(
                "HeadTuner: enable_input_require_grads was called on this model, so the backward runs down to the "
                "embeddings and not to the lowest trained layer: call disable_input_require_grads",
                stacklevel=3,
            )

    # --- what is trained ---

    def _parts(self, grad_scale: float | str | None) -> dict[tuple[int, str], list[_Part]]:
        """By layer and Linear, the blocks in it, ascending: a fused Linear has those of several projections."""
        a = self.adapter
        found: dict[tuple[int, str], list[_Part]] = {}
        for name, chosen in self.heads.items():
            place = a.places[name]
            members: dict[int, set[int]] = {}
            for layer, head in chosen:
                members.setdefault(layer, set()).add(a.group(head) if name in "kv" else head)
            for layer, heads in members.items():
                scale = a.heads_of(name) / len(heads) if grad_scale == "heads" else float(grad_scale or 1)
                parts = [_Part(name, head, place.block(head), scale) for head in heads]
                found.setdefault((layer, place.attribute), []).extend(parts)
        return {key: sorted(parts, key=lambda part: part.block) for key, parts in sorted(found.items())}

    def _refuse_others(self, parts: Mapping[tuple[int, str], Any]) -> None:
        refuse_tuned(OP, self.model)
        seen: dict[int, int] = {}
        for _, p in self.model.named_parameters(remove_duplicate=False):
            seen[id(p)] = seen.get(id(p), 0) + 1
        for layer, attribute in parts:
            module = getattr(self.adapter.attention(layer), attribute)
            if "forward" in module.__dict__ and not hasattr(module, "_hf_hook"):  # accelerate's: the block has one too
                expected = "projections that run the forward of their class (a wrapper would be lost)"
                _check.fail(OP, "model", expected, f"one with a forward of its own at layer {layer}")
            if seen.get(id(module.weight)) != 1:
                _check.fail(OP, "model", "projections with weights of their own", f"a shared one at layer {layer}")

    def _swap(self, parts: Mapping[tuple[int, str], list[_Part]]) -> None:
        self._modules: dict[tuple[int, str], Any] = {}
        self._owners = dict(parts)
        for (layer, attribute), members in parts.items():
            owner = self.adapter.attention(layer)
            linear = getattr(owner, attribute)
            dim = self.adapter.places[members[0].projection].dim
            given: tuple[Any, ...] = (linear, [m.block for m in members], self.adapter.head_dim, dim)
            turned = is_transposed(linear)
            if self.lora_rank:
                module: Any = HeadLora(*given, rank=self.lora_rank, alpha=self.lora_alpha, transposed=turned)
            else:
                module = HeadLinear(*given, scales=[m.scale for m in members], transposed=turned)
            setattr(owner, attribute, module)
            self._modules[layer, attribute] = module

    def _siblings(self) -> dict[int, list[int]]:
        a = self.adapter
        found: dict[int, list[int]] = {}
        shared = {(layer, a.group(h)) for name in "kv" for layer, h in self.heads.get(name, [])}
        chosen = {head for heads in self.heads.values() for head in heads}
        for layer, group in sorted(shared):
            others = [h for h in range(a.num_heads) if a.group(h) == group and (layer, h) not in chosen]
            if others:
                found.setdefault(layer, []).extend(others)
        return found

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """``layer.projection.head`` (the key-value head for k and v) and its slice; ``layer.mlp.name``; for LoRA
        ``layer.module.a`` and ``.b``."""
        if self._detached:
            _check.fail(OP, "tuner", "one that is not detached", "one that was")
        for (layer, attribute), parts in self._owners.items():
            module = self._modules[layer, attribute]
            if isinstance(module, HeadLora):
                yield f"{layer}.{attribute}.a", module.a
                yield f"{layer}.{attribute}.b", module.b
            else:
                for part, p in zip(parts, module.slices.all()):
                    yield f"{layer}.{part.projection}.{part.head}", p
        for layer in self.mlps:
            for name, p in self.adapter.mlp(layer).named_parameters():
                if p.dim() > 1:
                    yield f"{layer}.mlp.{name}", p

    def parameters(self) -> list[nn.Parameter]:
        return [p for _, p in self.named_parameters()]

    def optimizer(self, lr: float, **options: Any) -> SliceAdamW:
        """AdamW over the slices; options of `pyml.heads.SliceAdamW`."""
        self._warn()
        return SliceAdamW(self.parameters(), lr, **options)

    def report(self) -> TunerReport:
        params = self.parameters()
        heads = {head for chosen in self.heads.values() for head in chosen}
        return TunerReport(
            trained=sum(p.numel() for p in params),
            total=self._total,
            state_bytes=sum(p.numel() * (16 if p.dtype == torch.float64 else 8) for p in params),
            master_bytes=sum(4 * p.numel() for p in params if p.element_size() == 2),
            heads=len(heads),
            mlps=len(self.mlps),
            modules=self.adapter.num_layers * self.adapter.num_heads,
            siblings=self.siblings,
        )

    # --- values: saving, merging ---

    def delta(self) -> dict[str, Tensor]:
        """The values of what is trained, by name: contiguous copies; the tuned ones after `unmerge` too."""
        values = dict(self.named_parameters()) if self._tuned is None else self._tuned
        return {name: p.detach().clone(memory_format=torch.contiguous_format) for name, p in values.items()}

    snapshot = delta

    def restore(self, values: Mapping[str, Tensor]) -> None:
        """Write the values of a `snapshot` back; the model has them then, also where it was unmerged."""
        self._restore(OP, "values", values)

    def _restore(self, op: str, argument: str, values: Mapping[str, Tensor]) -> None:
        """Nothing is written where not everything fits."""
        own = dict(self.named_parameters())
        if set(values) != set(own):
            name = min(set(values) ^ set(own))
            got = f"{name} too" if name in values else f"none of {name}"
            _check.fail(op, argument, f"the {len(own)} tensors that this tuner trains", got)
        for name, p in own.items():
            if values[name].shape != p.shape or not values[name].is_floating_point():
                got = f"{list(values[name].shape)} of {values[name].dtype}"
                _check.fail(op, argument, f"floats of shape {list(p.shape)} for {name}", got)
        self._write(values)
        self._tuned = None
        self._enable(True)

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, p in self.named_parameters():
            if name in values:
                p.copy_(values[name])

    def _direct(self, name: str) -> bool:
        """Whether a parameter is one of the model's weights, and no factor of LoRA, which a switch takes out."""
        return not self.lora_rank or name.split(".")[1] == "mlp"

    def metadata(self) -> dict[str, Any]:
        """What a saved delta fits: the layout, its sizes and the heads."""
        lora = [self.lora_rank, self.lora_alpha] if self.lora_rank else None
        return {**delta.sizes(self.adapter), "heads": self.heads, "mlps": self.mlps, "lora": lora}

    def save(self, path: str | Path) -> None:
        """The delta alone, as safetensors."""
        delta.write(path, self.delta(), self.metadata())

    def load(self, path: str | Path) -> None:
        """A delta of the same heads of the same layout."""
        values, metadata = delta.read(OP, path)
        delta.check(OP, "a delta", metadata, self.metadata())
        self._restore(OP, "path", values)

    def unmerge(self) -> None:
        """The model as it was before tuning; `merge` brings the tuned values back. What `save` and `snapshot` see are
        the tuned values all the time."""
        if self._tuned is None:
            self._tuned = self.delta()
            self._write(self._before)
        self._enable(False)

    def merge(self) -> None:
        """After `unmerge`: the tuned values again. (Slices are views of the weights: they are merged as they train.)"""
        if self._tuned is not None:
            left = {**self._tuned, **self._before}  # factors of LoRA stay, as they are switched off
            for name, p in self.named_parameters():
                if not torch.equal(p, left[name].to(p)):
                    expected = "slices as unmerge left them (restore(snapshot()) brings the tuned values back)"
                    _check.fail("HeadTuner.merge", "model", expected, f"others in {name}, which merge would overwrite")
            self._write(self._tuned)
            self._tuned = None
        self._enable(True)

    @property
    def _unmerged(self) -> bool:
        return self._tuned is not None

    def _enable(self, on: bool) -> None:
        for module in self._modules.values():
            if isinstance(module, HeadLora):
                module.enabled = on

    def detach(self) -> Any:
        """The model with its plain Linears again and the tuned values in them (after `unmerge` the old ones); the tuner
        is of no further use."""
        if not self._detached:
            detach(self.model)
        self._detached, self._modules, self._owners = True, {}, {}
        return self.model

    # --- a step with less work ---

    def loss(self, batch: Mapping[str, Tensor], *, prefix: Tensor | None = None) -> Tensor:
        """Cross entropy of the next token, the mean over labels that are not -100 (shifted by one, as in
        transformers); logits, and the last block behind its attention, are made at labelled tokens alone.

        In several processes it runs inside the forward of `DistributedDataParallel` alone, which averages gradients:
        train on ``wrapped(**batch).loss`` there.

        Args:
            batch: ``input_ids``, ``labels`` and, where padded, ``attention_mask``, all ``[B, T]``.
            prefix: from `prefix`, for the same rows: the layers below the lowest trained one do not run.
        """
        refuse_shards("HeadTuner.loss", self.parameters())  # a detached tuner is refused too
        self._warn()
        if torch.is_grad_enabled():
            if self._unmerged:
                _check.fail(OP, "model", "the tuned values to train on (call merge first)", "an unmerged model")
            refuse_alone("HeadTuner.loss")
        batch = self.adapter.batch(OP, batch)
        if "labels" not in batch:
            _check.fail(OP, "batch", "labels [B, T]", "none")
        target = batch["labels"][:, 1:]
        kept, vocabulary = target != -100, int(self.adapter.config.vocab_size)
        wrong = kept & ((target < 0) | (target >= vocabulary))
        some, bad = torch.stack([kept.any(), wrong.any()]).tolist()
        if not some:
            _check.fail(OP, "batch", "a label that is not -100 behind the first token", "none")
        if bad:
            _check.fail(OP, "batch", f"labels in 0..{vocabulary - 1}, or -100", int(target[wrong][0]))
        if prefix is not None:
            _check.tensors(OP, prefix, first_name="prefix")
            shape = (*batch["input_ids"].shape, self.adapter.hidden_size)
            _check.shape(OP, "prefix", prefix, shape, "[B, T, D] of these rows")
        logits = self.adapter.logits_at(batch, F.pad(kept, (0, 1)), prefix, self.lowest_layer)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), target[kept])

    def prefix(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Hidden states ``[B, T, D]`` that enter the lowest trained layer: training does not change them, so they can
        be kept over epochs. Dropout is off for them."""
        with torch.no_grad(), evaluating(self.model):
            return self.adapter.entering(self.adapter.batch(OP, batch), self.lowest_layer)


def merge(model: Any, path: str | Path) -> Any:
    """Put a saved delta into a plain model of the same layout; returns the model. It changes as a whole or not at all;
    gradients that it has are dropped."""
    op = "merge"
    a = adapter(model, op)
    refuse_tuned(op, a.model)
    values, metadata = delta.read(op, path)
    delta.check(op, "a delta", metadata, delta.sizes(a))
    if "heads" not in metadata:
        _check.fail(op, "path", "a delta that HeadTuner.save wrote", f"{path} of HeadSteering")
    heads, mlps, lora = (metadata.get(key) for key in ("heads", "mlps", "lora"))
    if not (isinstance(heads, dict) and isinstance(mlps, list) and (lora is None or delta.is_pair(lora))):
        _check.fail(op, "path", "a delta that HeadTuner.save wrote", f"{path} with another header")
    rank, alpha = lora or (None, None)
    with put_back_on_failure(a.model):
        tuner = HeadTuner(a, heads, mlps=mlps, lora_rank=rank, lora_alpha=alpha, verbose=False)
        tuner._restore(op, "path", values)
        return tuner.detach()
