"""The learned curves of a spline layer as a matplotlib figure. Imported only when a plot is asked for."""

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from pyml.nn._knots import inner_range
from pyml.ops import _check

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pyml.nn._spline_layer import SplineLayer

POINTS = 201


def curves(layer: "SplineLayer", features: Sequence[int] | None, outputs: Sequence[int] | None) -> "Figure":
    """One panel an input feature, one line an output, over the inner grid; ticks at the bottom are the knots."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot: matplotlib is not installed (pip install 'pyml[train]')") from error
    name = type(layer).__name__
    shown_in = _chosen(name, "features", features, layer.in_features, 16)
    shown_out = _chosen(name, "outputs", outputs, layer.out_features, 8)

    with torch.no_grad():
        part = copy.deepcopy(layer)  # only the edges that are shown: a wide layer has millions
        part.select(torch.tensor(shown_out), torch.tensor(shown_in))
        low, high = inner_range(part.grid, part.spline_order)
        x = torch.lerp(low, high, torch.linspace(0, 1, POINTS, device=low.device, dtype=low.dtype).unsqueeze(1))
        y = part.edge_activations(x).double().cpu()  # [POINTS, shown out, shown in]
        x, knots = x.double().cpu(), part.grid.double().cpu()

    columns = min(4, len(shown_in))
    rows = math.ceil(len(shown_in) / columns)
    figure = Figure(figsize=(3.2 * columns, 2.4 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for panel, axis in enumerate(axes.flat):
        if panel >= len(shown_in):
            axis.set_visible(False)
            continue
        for line, output in enumerate(shown_out):
            axis.plot(x[:, panel], y[:, line, panel], label=f"output {output}", linewidth=1.3)
        inner = knots[panel, layer.spline_order : layer.spline_order + layer.grid_size + 1]
        axis.plot(inner, torch.zeros_like(inner), "|", color="0.4", transform=axis.get_xaxis_transform(), clip_on=False)
        axis.set_title(f"input {shown_in[panel]}", fontsize=9)
        axis.tick_params(labelsize=8)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(3 * columns, len(labels)), fontsize=8, frameon=False
    )
    whole = len(shown_in) == layer.in_features and len(shown_out) == layer.out_features
    note = "" if whole else f" ({len(shown_in)} inputs and {len(shown_out)} outputs shown)"
    figure.suptitle(f"{name} {layer.in_features} -> {layer.out_features}{note}", fontsize=10)
    return figure


def _chosen(name: str, argument: str, chosen: Sequence[int] | None, size: int, most: int) -> list[int]:
    if chosen is None:
        return list(range(min(size, most)))
    if len(chosen) == 0 or not all(isinstance(i, int) and 0 <= i < size for i in chosen):
        _check.fail(name, argument, f"indices from 0 to {size - 1}", list(chosen))
    return list(chosen)
