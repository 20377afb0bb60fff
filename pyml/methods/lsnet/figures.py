"""The contact sheet of a run: some test images before and after, and their targets."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from pyml.methods._checkpoint import write_atomically
from pyml.methods._measure import image_scores
from pyml.methods._pictures import to_bytes

COLUMNS = 5


def save_sheet(
    rows: dict[str, Sequence[Tensor]], targets: Sequence[Tensor], names: Sequence[str], path: Path, title: str
) -> None:
    """Write a PNG: one row a name with its images and their PSNR, the targets below, as many columns as images.

    Args:
        rows: row name -> images ``[3, H, W]`` in 0..1, as many as targets.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = {**rows, "target": targets}
    height, width = targets[0].shape[1:]
    figure = Figure(
        figsize=(2 * len(targets), (2 * height / width + 0.3) * len(shown) + 0.4), dpi=110, layout="constrained"
    )
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(shown), len(targets), squeeze=False)
    for axes, (name, images) in zip(grid, shown.items()):
        for column, (axis, image) in enumerate(zip(axes, images)):
            axis.imshow(to_bytes(image).permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            if name != "target":
                psnr = image_scores(image.unsqueeze(0), targets[column].unsqueeze(0))["psnr"]
                axis.set_title(f"{psnr:.1f} dB", fontsize=8, pad=2)
            else:
                axis.set_title(names[column], fontsize=8, pad=2)
        axes[0].set_ylabel(name, fontsize=9)
    figure.suptitle(title, fontsize=10)
    write_atomically(path, lambda part: figure.savefig(part, format="png"))
