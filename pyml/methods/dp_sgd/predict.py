"""Digits of images by a trained network, as a CSV file."""

import csv
import io
from pathlib import Path

import torch
from torch import Tensor

from pyml.methods import UserError
from pyml.methods._checkpoint import write_atomically
from pyml.methods.dp_sgd.data import read_images
from pyml.methods.dp_sgd.model import load_model

BATCH = 4096


@torch.no_grad()
def predict_file(checkpoint: Path, source: Path, device: str) -> Tensor:
    """Probabilities ``[N, classes]`` of the images of an idx file."""
    net, info = load_model(checkpoint)
    images = read_images(source, "input")
    if images.shape[-1] != info["side"]:
        raise UserError(f"input: expected images of side {info['side']}, got {images.shape[-1]} in {source}")
    net = net.to(device)
    return torch.cat([net(part.to(device)).softmax(1).cpu() for part in images.split(BATCH)])


def write_csv(probabilities: Tensor, path: Path) -> None:
    """Columns ``index``, ``class``, ``probability``."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["index", "class", "probability"])
    values, classes = probabilities.max(1)
    writer.writerows([i, c, f"{p:.6f}"] for i, (c, p) in enumerate(zip(classes.tolist(), values.tolist())))
    write_atomically(path, lambda part: part.write_text(text.getvalue()))
