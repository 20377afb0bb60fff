"""A tiny CLIP with random weights, a task of coloured noise, and one run of an arm on them as a program."""

import json
import sys
from pathlib import Path

import pytest
import torch

from pyml.methods._engine import make_accelerator
from pyml.methods.enla.clip import Clip
from pyml.methods.enla.task import Split, Task
from pyml.methods.enla.train import Options, train_run

SIDE, JOINT = 16, 12
CLASSES = ["red", "green", "blue", "cyan", "rose", "gold"]
WORDS = ["<pad>", "<start>", "<end>", "a", "photo", "drawing", "of", "the", "colour", *CLASSES]
TEMPLATES = ["a photo of {}", "a drawing of the colour {}"]


def tokenize(texts: list[str]) -> dict[str, torch.Tensor]:
    """One token a word between a start and an end."""
    rows = [[1, *(WORDS.index(word) for word in text.split()), 2] for text in texts]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": (torch.arange(longest) < torch.tensor([[len(r)] for r in rows])).long()}


def make_model(seed: int = 0, layers: int = 2):
    """A CLIPModel of width 32 in evaluation mode."""
    transformers = pytest.importorskip("transformers")
    common = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 4}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.CLIPConfig(
        text_config={**common, **ends, "vocab_size": len(WORDS), "max_position_embeddings": 10},
        vision_config={**common, "image_size": SIDE, "patch_size": 4},
        projection_dim=JOINT,
    )
    torch.manual_seed(seed)
    model = transformers.CLIPModel(config).eval()
    for name, parameter in model.named_parameters():  # biases and norms that are not 0 and 1
        if parameter.dim() == 1 and "class_embedding" not in name:
            torch.nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.2)
        elif "token_embedding" in name:  # words that matter
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def make_clip(pool: str = "mean", seed: int = 2) -> Clip:
    return Clip(make_model(seed), tokenize, pool, lambda _: torch.zeros(3, SIDE, SIDE), {"fingerprint": f"tiny {seed}"})


def make_split(classes: list[str], each: int, seed: int) -> Split:
    """Noise around a colour that the class has everywhere."""
    colours = torch.randn(len(CLASSES), 3, 1, 1, generator=torch.Generator().manual_seed(7))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(classes)).repeat_interleave(each)
    chosen = torch.tensor([CLASSES.index(name) for name in classes])[labels]
    noise = 0.3 * torch.randn(len(labels), 3, SIDE, SIDE, generator=generator)
    return Split(1.5 * colours[chosen] + noise, labels, classes)


def make_task(count: int = 20) -> Task:
    """Four base classes with ``count`` training images, two novel ones."""
    base, novel = CLASSES[:4], CLASSES[4:]
    train = make_split(base, 5, 1)
    train = Split(train.images[:count], train.labels[:count], base)
    evals = {"base": make_split(base, 6, 2), "novel": make_split(novel, 6, 3)}
    return Task("base2novel", train, evals, TEMPLATES)


def run(arm: str, folder: Path, report=None, task: Task | None = None, **options):
    """`train_run` on the tiny CLIP with seed 1 on one thread."""
    torch.set_num_threads(1)
    chosen = Options(archs=(arm,), **{"epochs": 3, "batch_size": 8, **options})
    chosen.check()
    return train_run(
        make_clip(), task or make_task(), arm, 1, chosen, folder=folder, accelerator=make_accelerator("cpu"),
        report=report,
    )  # fmt: skip


if __name__ == "__main__":
    for each in sys.argv[3:]:
        row = run(each, Path(sys.argv[1], each), task=make_task(int(sys.argv[2])))
        if row:
            Path(sys.argv[1], each, "row.json").write_text(json.dumps(row))
