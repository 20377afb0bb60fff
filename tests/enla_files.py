"""A tiny CLIP that is hardly trained, and drawn pictures as files, for the tests of EnLa's data and commands."""

import json

from pyml.methods.enla import shapes

STEPS = 2
COMMON = ("--tiny-steps", STEPS, "--device", "cpu", "--threads", 1, "--epochs", 1, "--quiet")


def write_pictures(folder, classes=4, each=3, seed=0):
    """Drawn pictures below ``folder``, one folder a class with underscores in its name; the names of the classes."""
    from PIL import Image

    made = shapes.drawn("shapes", each, 0.0, seed)
    for index in range(classes * each):
        name = made.classes[int(made.labels[index])].replace(" ", "_")
        (folder / name).mkdir(parents=True, exist_ok=True)
        pixels = made.images[index].permute(1, 2, 0).contiguous().numpy()
        Image.fromarray(pixels).save(folder / name / f"{index % each}.png")
    return sorted(made.classes[:classes])


def write_split(path, folder, train, test):
    """A split file: for each class folder in ``folder`` so many pictures to train on, and so many others to test on."""
    content = {"train": [], "val": [], "test": []}
    for label, inside in enumerate(sorted(item for item in folder.iterdir() if item.is_dir())):
        files = [f"{inside.name}/{file.name}" for file in sorted(inside.iterdir())]
        for key, some in (("train", files[:train]), ("test", files[train : train + test])):
            content[key] += [[file, label, inside.name] for file in some]
    path.write_text(json.dumps(content))
    return content
