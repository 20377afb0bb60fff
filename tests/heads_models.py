"""Tiny causal LMs of every layout that `pyml.heads` knows, with weights that make each part of a block matter."""

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install 'pyml[train]')")

SIZES = {
    "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GATED = {**SIZES, "intermediate_size": 40, "head_dim": 6}
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}

# name: (class of the config, class of the model, what differs)
MODELS = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {**GATED, "num_key_value_heads": 4}),
    "llama-gqa": ("LlamaConfig", "LlamaForCausalLM", {**GATED, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**GATED, "num_key_value_heads": 2, "sliding_window": 4}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {**SIZES, "intermediate_size": 40, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**GATED, "head_dim": 8, "num_key_value_heads": 2}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**GATED, "head_dim": 8, "num_key_value_heads": 1}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**GATED, **SLIDING, "head_dim": 8, "num_key_value_heads": 2,
               "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**GATED, **SLIDING, "num_key_value_heads": 2,
               "query_pre_attn_scalar": 8}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {**SIZES, "n_inner": 40, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
             "attn_pdrop": 0.0}),
    "neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**SIZES, "intermediate_size": 40, "use_parallel_residual": True}),
    "neox-sequential": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**SIZES, "intermediate_size": 40,
                        "use_parallel_residual": False}),
}  # fmt: skip
ALL = list(MODELS)
SHARED = [name for name, (_, _, sizes) in MODELS.items() if sizes.get("num_key_value_heads", 4) != 4]


class ExactNorm(nn.Module):
    """An RMSNorm in the dtype of its input: those of transformers go through float32, which hides what is exact."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight = norm.weight
        self.eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        self.shift = float(type(norm).__name__.startswith("Gemma"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (self.weight + self.shift)


def exact(model: nn.Module) -> nn.Module:
    """In float64, in the norms too."""
    for path, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            owner, _, attribute = path.rpartition(".")
            setattr(model.get_submodule(owner), attribute, ExactNorm(module))
    return model.double().eval()


def tiny(name: str, dtype: torch.dtype = torch.float64, seed: int = 0, **changes) -> nn.Module:
    """A model in eval mode; every parameter is random, also norms and biases."""
    config, model, sizes = MODELS[name]
    torch.manual_seed(seed)
    found = getattr(transformers, model)(getattr(transformers, config)(**{**sizes, **changes}))
    with torch.no_grad():
        for p in found.parameters():
            if p.dim() == 1:
                p.add_(0.2 * torch.randn_like(p))
            else:
                p.copy_(0.25 * torch.randn_like(p))
    return exact(found) if dtype == torch.float64 else found.to(dtype).eval()


def rows(lengths=(7, 7, 7), side="right", seed=1, vocabulary=61):
    """Random rows of these lengths as a padded batch, with a mask where lengths differ."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.zeros((len(lengths), width), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, length in enumerate(lengths):
        part = slice(width - length, width) if side == "left" else slice(0, length)
        ids[i, part] = torch.randint(3, vocabulary, (length,), generator=generator)
        mask[i, part] = 1
    return {"input_ids": ids} if min(lengths) == width else {"input_ids": ids, "attention_mask": mask}


def checkpointed(model):
    """In train mode, with blocks that run again in the backward; newer versions of transformers let inputs require
    gradients then."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if hasattr(model, "_require_grads_hook"):
        model.disable_input_require_grads()
    model.train()


def labelled(batch, ignored=2):
    """The same batch with labels: not on padding, not on the first tokens."""
    labels = batch["input_ids"].clone()
    labels[:, :ignored] = -100
    if "attention_mask" in batch:
        labels[batch["attention_mask"] == 0] = -100
    return {**batch, "labels": labels}
