"""Small pairs of images for the tests of LSNet."""

import torch
import torch.nn.functional as F

from pyml.methods._pictures import save_png, to_bytes
from pyml.methods.lsnet.data import Pairs


def tinted(count=6, side=24, seed=0):
    """Pairs whose inputs lost red; smooth pictures."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    targets = F.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)
    inputs = targets * torch.tensor([0.3, 0.8, 0.9]).view(3, 1, 1) + torch.tensor([0.0, 0.15, 0.1]).view(3, 1, 1)
    names = [str(i) for i in range(count)]
    return Pairs([to_bytes(x) for x in inputs], [to_bytes(y) for y in targets], names, "tinted")


def write_folders(folder):
    """The tinted pairs as files, in ``input`` and ``target`` below a folder."""
    pairs = tinted()
    for side, images in (("input", pairs.inputs), ("target", pairs.targets)):
        (folder / side).mkdir()
        for name, image in zip(pairs.names, images):
            save_png(image.permute(1, 2, 0), folder / side / f"{name}.png")
    return folder
