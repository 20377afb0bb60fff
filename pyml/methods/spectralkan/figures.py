"""PNG pictures of a result: the change map, the confusion overlay and one overview with both images."""

from pathlib import Path

import numpy as np

from pyml.methods._checkpoint import write_atomically
from pyml.methods._pictures import save_png
from pyml.methods.spectralkan.data import CHANGED, UNCHANGED, Scene
from pyml.methods.spectralkan.readers import Array

# colours that differ for colour-blind readers too, and from the grey image below them
OUTCOMES = {
    "hit": (0, 190, 140),
    "correct, unchanged": (60, 90, 125),
    "false alarm": (225, 85, 0),
    "missed": (250, 225, 50),
}


def stretch(image: Array) -> Array:
    """Scale to 0..1 between the 2nd and 98th percentile of each channel (last axis)."""
    low, high = (np.percentile(image, q, axis=(0, 1), keepdims=True) for q in (2, 98))
    return ((image - low) / np.maximum(high - low, 1e-9)).clip(0, 1)


def composite(image: Array) -> Array:
    """A colour view ``[H, W, 3]`` of ``[bands, H, W]``: three bands over the spectrum, long wavelengths in red."""
    chosen = [round(share * (len(image) - 1)) for share in (0.8, 0.5, 0.2)]
    return stretch(np.moveaxis(image[chosen], 0, -1).astype(np.float64))


def outcomes(predicted: Array, labels: Array) -> dict[str, Array]:
    """Masks ``[H, W]`` of the four outcomes on labelled pixels."""
    said = predicted == CHANGED
    return {
        "hit": said & (labels == CHANGED),
        "correct, unchanged": ~said & (labels == UNCHANGED),
        "false alarm": said & (labels == UNCHANGED),
        "missed": ~said & (labels == CHANGED),
    }


def overlay(predicted: Array, scene: Scene) -> Array:
    """The confusion overlay ``[H, W, 3]`` uint8: outcomes in colour on labelled pixels, the after image elsewhere."""
    grey = stretch(scene.after.mean(axis=0, dtype=np.float64)[..., None])
    picture = np.repeat(60 + 110 * grey, 3, axis=2)
    for name, mask in outcomes(predicted, scene.labels).items():
        picture[mask] = 0.85 * np.array(OUTCOMES[name]) + 0.15 * picture[mask]
    return picture.astype(np.uint8)


def save_figures(predicted: Array, scene: Scene, folder: Path, title: str = "") -> None:
    """Write ``change_map.png``, ``confusion.png`` and ``overview.png``."""
    save_png((predicted == CHANGED).astype(np.uint8) * np.uint8(255), folder / "change_map.png")
    confusion = overlay(predicted, scene)
    save_png(confusion, folder / "confusion.png")
    save_overview(predicted, scene, confusion, folder / "overview.png", title)


def save_overview(predicted: Array, scene: Scene, confusion: Array, path: Path, title: str = "") -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    truth = np.select([scene.labels == CHANGED, scene.labels == UNCHANGED], [255, 60], 150)
    grey = {"cmap": "gray", "vmin": 0, "vmax": 255}
    panels = [
        ("before", composite(scene.before), {}),
        ("after", composite(scene.after), {}),
        ("labels (white: changed, black: unchanged)", truth, grey),
        ("change map", (predicted == CHANGED) * 255, grey),
        ("outcome on labelled pixels", confusion, {}),
    ]
    height, width = predicted.shape
    figure = Figure(figsize=(3 * len(panels), 3 * height / width + 0.9), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (name, picture, options) in zip(figure.subplots(1, len(panels)), panels):
        axis.imshow(picture, interpolation="nearest", **options)
        axis.set_title(name, fontsize=9)
        axis.set_axis_off()
    counts = {name: int(mask.sum()) for name, mask in outcomes(predicted, scene.labels).items()}
    handles = [
        Patch(facecolor="#{:02x}{:02x}{:02x}".format(*colour), edgecolor="black", label=f"{name}: {counts[name]}")
        for name, colour in OUTCOMES.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    if title:
        figure.suptitle(title, fontsize=11)
    write_atomically(path, lambda part: figure.savefig(part, format="png"))
