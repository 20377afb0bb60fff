"""Whole training steps on chosen heads, and path patching, on a Llama of 33.7M parameters with random weights.

3 of 64 heads, q, k, v and o, 4 x 128 tokens. Useful work of a step: forward, the backward above the lowest trained
layer, the slices' own gradients. Memory is that of a first step over the built model, moments and all.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..registry import Case, Contender, Cost, Registry, Setup, Target

STEP, SCORES = "training step", "all scores"
FULL, HOOK, LORA, LORA_SAME = "full, AdamW fused", "masks by hooks", "LoRA, all layers", "LoRA, the same layers"
ROWS_ALONE, LOOP = "pyml, all labels", "a forward a head"
HEADS, LOWEST = [(3, 1), (5, 4), (6, 2)], 3
QKVO = ("q", "k", "v", "o")
LAYERS, HEAD_COUNT, WIDTH, INNER, VOCABULARY, BATCH, LENGTH = 8, 8, 512, 1376, 8192, 4, 128
BLOCK = 4 * WIDTH * WIDTH + 3 * WIDTH * INNER  # weights of a layer
LABELS = 16  # labelled tokens a row, where not all are
TRAINED = 393_216
RATE = 1e-5


def llama(setup: Setup) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(setup.seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=HEAD_COUNT, num_key_value_heads=HEAD_COUNT, tie_word_embeddings=False,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    return model.to(setup.device, getattr(torch, setup.dtype)).train()


def tokens(setup: Setup, seed: int = 0, labelled: int = LENGTH) -> dict[str, Tensor]:
    ids = torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, : LENGTH - labelled] = -100
    return {"input_ids": ids.to(setup.device), "labels": labels.to(setup.device)}


def trained(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> Callable[[], Tensor]:
    def call() -> Tensor:
        found = loss()
        found.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return found.detach()

    return call


def whole(model: Any, batch: Mapping[str, Tensor]) -> Callable[[], Tensor]:
    """The loss as transformers makes it: logits of every token."""
    return lambda: model(**batch, use_cache=False).loss


def step_setup(labelled: int, prefix: bool, setup: Setup) -> dict[str, Contender]:
    """One step of each way, from the same model on the same batch."""
    batch = tokens(setup, labelled=labelled)

    def ours(options: bool) -> Callable[[str], Any]:
        def build(mode: str) -> Any:
            from pyml.heads import HeadTuner

            tuner = HeadTuner(llama(setup), HEADS, QKVO, verbose=False)
            kept = tuner.prefix(batch) if options and prefix else None
            loss = (lambda: tuner.loss(batch, prefix=kept)) if options else whole(tuner.model, batch)
            return trained(loss, tuner.optimizer(RATE))

        return build

    def full(mode: str) -> Any:
        model = llama(setup)
        return trained(whole(model, batch), torch.optim.AdamW(model.parameters(), RATE, fused=True))

    def hooks(mode: str) -> Any:
        from pyml.heads.reference import mask_by_hook

        model = llama(setup)
        return trained(whole(model, batch), torch.optim.AdamW(mask_by_hook(model, HEADS, QKVO), RATE, fused=True))

    def lora(rank: int, layers: list[int] | None) -> Callable[[str], Any]:
        def build(mode: str) -> Any:
            from peft import LoraConfig, get_peft_model

            names = [f"{name}_proj" for name in QKVO]
            config = LoraConfig(r=rank, target_modules=names, layers_to_transform=layers, lora_dropout=0.0)
            model = get_peft_model(llama(setup), config)
            chosen = [p for p in model.parameters() if p.requires_grad]
            return trained(whole(model, batch), torch.optim.AdamW(chosen, RATE, fused=True))

        return build

    made = {
        "pyml": ours(labelled < LENGTH or prefix), ROWS_ALONE: ours(False), FULL: full, HOOK: hooks,
        LORA: lora(12, None), LORA_SAME: lora(32, sorted({layer for layer, _ in HEADS})),
    }  # fmt: skip
    return {name: Contender(name, build, same_result=False, stateful=True) for name, build in made.items()}


def patch_setup(setup: Setup) -> dict[str, Contender]:
    """Scores of all 64 heads; the loop runs 4 of its forwards a call, without its recordings, and counts 16 times."""
    clean, other = ({"input_ids": tokens(setup, seed)["input_ids"]} for seed in (0, 1))
    metric, sample = (5, 9), [(layer, 3) for layer in (0, 2, 4, 6)]

    def fast(mode: str) -> Any:
        from pyml.heads import path_patch

        model = llama(setup)
        return lambda: path_patch(model, clean, other, metric, difference="plain").heads

    def loop(mode: str) -> Any:
        from pyml.heads.patching import Source, prepared
        from pyml.heads.reference import patched_runs

        _, run = patched_runs(*prepared("path_patch_loop", llama(setup), clean, other, metric, "plain"))
        return lambda: [run(Source(*item)) for item in sample]

    scale = LAYERS * HEAD_COUNT / len(sample)
    return {"pyml": Contender("pyml", fast), LOOP: Contender(LOOP, loop, scale=scale, same_result=False)}


def register(registry: Registry) -> None:
    needs, peft = "transformers", "peft"
    ways: dict[str, str | None] = {"pyml": needs, FULL: needs, HOOK: needs, LORA: peft, LORA_SAME: peft}
    registry.add(Case(
        "head_update", "HeadTuner step", "3 of 64 heads, 4 x 128 tokens", partial(step_setup, LENGTH, False), ways,
        partial(_step_cost, LENGTH, 0), modes=(STEP,), quick=True, targets=(
            Target("speedup", 1.6, FULL, mode=STEP), Target("speedup", 1.15, LORA, mode=STEP),
            Target("slowdown", 1.05, HOOK, mode=STEP), Target("memory", 2, FULL, mode=STEP),
        ),
        note="forward, backward and AdamW of a Llama of 33.7M parameters; LoRA of as many trained numbers; "
        "in 16 bits pyml alone keeps float32 moments and copies",
    ))  # fmt: skip
    for labelled, prefix, shape, targets in (
        (LABELS, False, "16 of 128 labels", ()),
        (LENGTH, True, "a kept prefix", ()),
        (LABELS, True, "16 of 128 labels, a kept prefix", (Target("speedup", 2.4, FULL, mode=STEP),)),
    ):
        registry.add(Case(
            "head_update", "HeadTuner step", f"3 of 64 heads, 4 x 128 tokens, {shape}",
            partial(step_setup, labelled, prefix), {"pyml": needs, ROWS_ALONE: needs, FULL: needs},
            partial(_step_cost, labelled, LOWEST if prefix else 0), modes=(STEP,), targets=targets,
        ))  # fmt: skip
    registry.add(Case(
        "head_update", "path_patch", "64 heads, 4 x 128 tokens", patch_setup, {"pyml": needs, LOOP: needs},
        _patch_cost, modes=(SCORES,), quick=True, targets=(Target("speedup", 25, LOOP, mode=SCORES),),
        note="the loop: a forward a head; 4 of them are run and counted 16 times",
    ))  # fmt: skip


def _step_cost(labelled: int, start: int, mode: str, element: int) -> Cost:
    rows, logits = BATCH * LENGTH, BATCH * labelled * VOCABULARY * WIDTH
    unused = BATCH * (LENGTH - labelled) * (WIDTH * WIDTH + 3 * WIDTH * INNER)  # last block, behind its attention
    forward = rows * (LAYERS - start) * BLOCK - unused + logits
    backward = rows * (LAYERS - LOWEST) * BLOCK - unused + logits + rows * TRAINED
    flops = 2.0 * (forward + backward)
    return Cost(flops=flops, matrix=flops)


def _patch_cost(mode: str, element: int) -> Cost:
    """Two forwards without logits, and an MLP row for each source, sample and layer from its own on."""
    mlps = HEAD_COUNT * LAYERS * (LAYERS + 1) / 2 * BATCH * 3 * WIDTH * INNER
    flops = 2.0 * (2 * BATCH * LENGTH * LAYERS * BLOCK + mlps)
    return Cost(flops=flops, matrix=flops)
