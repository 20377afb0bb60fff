"""Where the heads of a Hugging Face causal LM are: one small class a layout, so that nothing else knows names.

An adapter says which block of which weight belongs to a head (fused and transposed weights too), and how residual,
attention and MLP of a block compose at one position. Layouts that are not listed here are refused.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyml.heads.hooks import evaluating, hooked, only_at, reaching, starting_from
from pyml.nn.head_update import Projection
from pyml.ops import _check

OP = "adapter"
PROJECTIONS = ("q", "k", "v", "o")
KEYS = ["input_ids", "attention_mask", "labels", "token_type_ids", "special_tokens_mask", "length", "offset_mapping"]


@dataclass(frozen=True)
class Place:
    """A projection in its weight: head h has block ``first + step * h`` along `dim` of ``[out, in]``."""

    attribute: str
    dim: int
    first: int = 0
    step: int = 1

    def block(self, head: int) -> int:
        return self.first + self.step * head


def is_transposed(module: nn.Module) -> bool:
    """Whether a projection holds its weight as ``[in, out]``, as GPT-2's Conv1D does."""
    return bool(getattr(module, "transposed", False) or (hasattr(module, "nf") and hasattr(module, "nx")))


def linear_weight(module: nn.Module) -> Tensor:
    """The weight of a projection as ``[out, in]``: a view, or where LoRA is in it a copy with its products."""
    if getattr(module, "enabled", False):
        return module.merged_weight()  # type: ignore[operator]
    weight: Any = module.weight
    return weight.t() if is_transposed(module) else weight


class Adapter:
    """Llama, Mistral, Qwen2, Qwen3 and the first Gemma: sequential blocks, one norm before each half.

    Attributes:
        model, layers: the causal LM, and its blocks.
        num_layers, num_heads, num_kv_heads, head_dim: of the attention; head h reads key-value head ``group(h)``.
    """

    attention_name, output_name = "self_attn", "o_proj"
    norm_name = "post_attention_layernorm"  # before the MLP
    after_attention: str | None = None  # norms of an output, before it is added
    after_mlp: str | None = None

    def __init__(self, model: Any) -> None:
        self.model = model
        self.config: Any = model.config
        self.backbone = self._backbone()
        self.layers = self._layers()
        self.num_layers = len(self.layers)
        self.num_heads = int(self.config.num_attention_heads)
        self.num_kv_heads = int(getattr(self.config, "num_key_value_heads", None) or self.num_heads)
        self.head_dim = self.output(0).weight.numel() // self.hidden_size // self.num_heads
        self.places = self._places()
        self._tuples: bool | None = None

    # --- the names of the layout ---

    def _backbone(self) -> Any:
        return self.model.model

    def _layers(self) -> list[Any]:
        return list(self.backbone.layers)

    def _places(self) -> dict[str, Place]:
        return {name: Place(f"{name}_proj", int(name == "o")) for name in PROJECTIONS}

    @property
    def final_norm(self) -> Any:
        return self.backbone.norm

    @property
    def head(self) -> Any:
        """The Linear that makes logits."""
        return output_head(self.model)

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def parallel(self) -> bool:
        """Whether the MLP reads what the attention reads, not its sum with the attention's output."""
        return False

    def attention(self, layer: int) -> Any:
        return getattr(self.layers[layer], self.attention_name)

    def output(self, layer: int) -> Any:
        """The output projection of the attention (o_proj): its input is ``[B, T, heads * head_dim]``."""
        return getattr(self.attention(layer), self.output_name)

    o_proj = output

    def mlp(self, layer: int) -> Any:
        return self.layers[layer].mlp

    def group(self, head: int) -> int:
        """The key-value head that a query head reads."""
        return head // (self.num_heads // self.num_kv_heads)

    def heads_of(self, projection: str) -> int:
        """How many blocks the projection has: query heads for q and o, key-value heads for k and v."""
        return self.num_kv_heads if projection in "kv" else self.num_heads

    # --- one position of a block ---

    def step(self, layer: int, residual: Tensor, attention: Tensor, mlp: Tensor | None = None) -> Tensor:
        """The residual after a block, from the residual before it and the output of its o_proj; ``mlp`` replaces the
        output of its MLP. All ``[..., D]``."""
        block = self.layers[layer]
        middle = residual + self._normed(block, self.after_attention, attention)
        if mlp is None:
            mlp = block.mlp(getattr(block, self.norm_name)(residual if self.parallel else middle))
        return middle + self._normed(block, self.after_mlp, mlp)

    @staticmethod
    def _normed(block: Any, name: str | None, x: Tensor) -> Tensor:
        return x if name is None else getattr(block, name)(x)

    # --- logits ---

    def logits(self, hidden: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Logits ``[..., V]`` of final hidden states ``[..., D]`` (behind the last norm).

        ``tokens`` ``[n]`` gives those of these tokens alone, ``[..., n]``; ``[B, n]`` those of other ones for each
        sample of ``[..., B, D]``. They are float32 where the model has 16 bits or runs under autocast, and tell close
        logits apart.
        """
        head = self.head
        if tokens is None:
            found = head(hidden)
        else:
            wide = torch.promote_types(hidden.dtype, torch.float32)
            hidden, weight = hidden.to(wide), head.weight[tokens].to(wide)
            form = "...bd,bnd->...bn" if tokens.dim() == 2 else "...d,nd->...n"
            with torch.autocast(hidden.device.type, enabled=False):
                found = torch.einsum(form, hidden, weight)
            if head.bias is not None:
                found = found + head.bias[tokens].to(wide)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return found if cap is None else torch.tanh(found / cap) * cap

    # --- whole runs ---

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def batch(self, op: str, batch: Any, name: str = "batch") -> dict[str, Tensor]:
        """``input_ids``, and ``attention_mask`` and ``labels`` where given, on the device of the model, checked."""
        if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
            _check.fail(op, name, "a mapping with a tensor input_ids", type(batch).__name__, TypeError)
        ids = batch["input_ids"]
        if ids.dim() != 2 or ids.numel() == 0 or ids.dtype not in (torch.int64, torch.int32):
            _check.fail(op, name, "input_ids [B, T] of integers, not empty", f"{list(ids.shape)} of {ids.dtype}")
        if strange := [key for key in batch if key not in KEYS and batch[key] is not None]:
            _check.fail(op, name, "input_ids, attention_mask and labels", f"{strange[0]} too")
        vocabulary = int(self.config.vocab_size)
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocabulary:
            _check.fail(op, name, f"input_ids in 0..{vocabulary - 1}", f"{low}..{high}")
        found = {"input_ids": ids.to(self.device)}
        for key in ("attention_mask", "labels"):
            if batch.get(key) is not None:
                if batch[key].shape != ids.shape:
                    _check.fail(op, name, f"{key} of the shape of input_ids, {list(ids.shape)}", list(batch[key].shape))
                found[key] = batch[key].to(self.device)
        mask = found.get("attention_mask")
        if mask is not None and not bool((mask != 0).any(1).all()):
            _check.fail(op, name, "a real token in each row of attention_mask", "a row of zeros")
        return found

    def last(self, batch: Mapping[str, Tensor]) -> Tensor:
        """``[B]``: where the last real token of each row is, for padding on either side."""
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        if mask is None:
            return torch.full((len(ids),), ids.shape[1] - 1, device=ids.device)
        return ids.shape[1] - 1 - (mask != 0).long().flip(1).argmax(1)

    def positions(self, batch: Mapping[str, Tensor]) -> Tensor | None:
        """``[B, T]``: the first real token has position 0, as in generation; None without a mask."""
        mask = batch.get("attention_mask")
        return None if mask is None else ((mask != 0).long().cumsum(1) - 1).clamp_(min=0)

    def hidden(
        self, batch: Mapping[str, Tensor], prefix: Tensor | None = None, below: int = 0, only: Tensor | None = None
    ) -> Tensor:
        """Final hidden states ``[B, T, D]`` (behind the last norm), without logits.

        With ``prefix`` ``[B, T, D]``, the hidden states that enter block ``below``, the blocks under it do not run.
        With ``only`` ``[n]``, numbers of tokens in ``[B * T]``, the last block makes its output projection and its MLP,
        which see one token at a time, at these alone, and the states of the other tokens mean nothing.
        """
        last = self.layers[-1]
        with ExitStack() as stack:
            if prefix is not None:
                if below and self._tuples is None:
                    self._tuples = self._blocks_return_tuples()
                stack.enter_context(starting_from(self.layers, below, prefix, bool(self._tuples)))
            # A checkpointed block runs again in the backward, where the hooks are gone.
            again = last.training and getattr(last, "gradient_checkpointing", False)
            if only is not None and not again and not hasattr(last, "_checkpoint_wrapped_module"):
                modules = (self.output(self.num_layers - 1), self.mlp(self.num_layers - 1))
                rows, width = batch["input_ids"].shape
                stack.enter_context(only_at(modules, only, (rows, width)))
            return self.backbone(
                input_ids=batch["input_ids"], attention_mask=batch.get("attention_mask"),
                position_ids=self.positions(batch), use_cache=False,
            ).last_hidden_state  # fmt: skip

    def logits_at(
        self, batch: Mapping[str, Tensor], wanted: Tensor, prefix: Tensor | None = None, below: int = 0
    ) -> Tensor:
        """Logits ``[n, V]`` of the tokens that are True in ``wanted`` ``[B, T]``, row after row; no others are made."""
        tokens = wanted.flatten().nonzero()[:, 0]
        return self.logits(self.hidden(batch, prefix, below, tokens).flatten(0, 1).index_select(0, tokens))

    def last_logits(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Logits ``[B, V]`` at the last real token; those of other positions are never made."""
        batch = self.batch(OP, batch)
        return self.logits(at(self.hidden(batch), self.last(batch)))

    def entering(self, batch: Mapping[str, Tensor], layer: int) -> Tensor:
        """The hidden states ``[B, T, D]`` that enter a block; it and those above do not run."""
        return reaching(self.layers[layer], lambda: self.hidden(batch))

    def _blocks_return_tuples(self) -> bool:
        """It differs between versions of transformers."""
        found: list[bool] = []
        with torch.no_grad(), evaluating(self.model), hooked() as handles:  # no dropout: it would draw random numbers
            keep = lambda m, a, out: found.append(isinstance(out, tuple))  # noqa: E731
            handles.append(self.layers[0].register_forward_hook(keep))
            self.hidden({"input_ids": torch.zeros((1, 1), dtype=torch.int64, device=self.device)})
        return found[0]


class Gemma2(Adapter):
    """Gemma 2 and 3: a norm behind attention and MLP too."""

    norm_name = "pre_feedforward_layernorm"
    after_attention, after_mlp = "post_attention_layernorm", "post_feedforward_layernorm"


class GPT2(Adapter):
    """GPT-2: transposed weights, q, k and v one after the other in c_attn."""

    attention_name, output_name, norm_name = "attn", "c_proj", "ln_2"

    def _backbone(self) -> Any:
        return self.model.transformer

    def _layers(self) -> list[Any]:
        return list(self.backbone.h)

    def _places(self) -> dict[str, Place]:
        fused = {name: Place("c_attn", 0, first=i * self.num_heads) for i, name in enumerate("qkv")}
        return {**fused, "o": Place("c_proj", 1)}

    @property
    def final_norm(self) -> Any:
        return self.backbone.ln_f


class GPTNeoX(Adapter):
    """GPT-NeoX and Pythia: q, k and v of a head side by side; the MLP beside the attention."""

    attention_name, output_name = "attention", "dense"

    def _backbone(self) -> Any:
        return self.model.gpt_neox

    def _places(self) -> dict[str, Place]:
        fused = {name: Place("query_key_value", 0, first=i, step=3) for i, name in enumerate("qkv")}
        return {**fused, "o": Place("dense", 1)}

    @property
    def final_norm(self) -> Any:
        return self.backbone.final_layer_norm

    @property
    def parallel(self) -> bool:
        return bool(self.config.use_parallel_residual)


LAYOUTS: dict[str, type[Adapter]] = {
    "llama": Adapter, "mistral": Adapter, "qwen2": Adapter, "qwen3": Adapter, "gemma": Adapter,
    "gemma2": Gemma2, "gemma3_text": Gemma2, "gpt2": GPT2, "gpt_neox": GPTNeoX,
}  # fmt: skip


def adapter(model: Any, op: str = OP) -> Adapter:
    """The adapter of a causal LM, by its ``config.model_type``.

    Raises:
        ValueError: for any other layout, or a model whose weights are not plain floating tensors (quantised ones).
    """
    if isinstance(model, Adapter):
        return model
    kind = getattr(getattr(model, "config", None), "model_type", None)
    layout = LAYOUTS.get(kind) if isinstance(kind, str) else None
    whole = isinstance(model, nn.Module) and output_head(model) is not None
    if layout is None or not whole or getattr(model.config, "add_cross_attention", False):
        expected = "a causal LM with lm_head of one of the layouts " + ", ".join(LAYOUTS)
        _check.fail(op, "model", expected, f"{type(model).__name__} ({kind})")
    found = layout(model)
    for layer in range(found.num_layers):
        for place in found.places.values():
            module = getattr(found.attention(layer), place.attribute)
            if not isinstance(module, (nn.Linear, Projection)) and not is_transposed(module):
                expected = "plain linear projections (merge adapters of other packages first)"
                _check.fail(op, "model", expected, f"{type(module).__name__} at layer {layer}")
            if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
                expected = "projections that run the forward of nn.Linear"
                _check.fail(op, "model", expected, f"{type(module).__name__}, with its own, at layer {layer}")
            if module.weight.dtype not in _check.FLOATS or module.weight.dim() != 2:
                _check.fail(op, "model", "floating weights, not quantised ones", module.weight.dtype)
    return found


def output_head(model: Any) -> nn.Linear | None:
    """The Linear behind the last norm; GPT-NeoX of older versions of transformers calls it embed_out."""
    heads = (getattr(model, name, None) for name in ("lm_head", "embed_out"))
    return next((head for head in heads if isinstance(head, nn.Linear)), None)


def at(x: Tensor, positions: Tensor) -> Tensor:
    """``[B, T, ...]`` at one position of each row: ``[B, ...]``."""
    return x[torch.arange(len(x), device=x.device), positions.to(x.device)]
