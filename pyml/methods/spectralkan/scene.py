"""A generated pair of hyperspectral images, for when no data is at hand: nothing is downloaded.

Linear mixing of smooth spectra on a map of fields, another light and a small registration shift at the second date,
noise in every band, and fields and patches whose material changed. The same seed gives the same scene.
"""

from typing import Any

import numpy as np

from pyml.methods import UserError
from pyml.methods.spectralkan.data import CHANGED, UNCHANGED, UNLABELLED, Scene
from pyml.methods.spectralkan.readers import Array


def generate_scene(height: int = 128, width: int = 128, bands: int = 64, seed: int = 0) -> Scene:
    """Generate a scene; values are reflectances around 0 to 1, about a tenth of the pixels changed.

    Pixels on the edge of a changed region are mixed and stay unlabelled, as in hand-drawn ground truth.
    """
    if min(height, width) < 16 or bands < 2:
        raise UserError(f"scene: expected at least 16 x 16 pixels and 2 bands, got {height} x {width} and {bands}")
    rng = np.random.default_rng(seed)
    materials = 7
    spectra = _spectra(rng, materials, bands)
    fields = _fields(rng, height, width, count=max(12, height * width // 500))
    material = rng.integers(0, materials, fields.max() + 1)
    before = material[fields]
    changed = np.isin(fields, rng.permutation(fields.max() + 1)[: max(1, (fields.max() + 1) // 14)])
    blobs = _smooth(rng.standard_normal((height, width)), min(height, width) / 24)
    changed |= blobs > np.quantile(blobs, 0.96)
    step = 1 + rng.integers(0, materials - 1, fields.max() + 1)[fields]  # never back to the same material
    after = np.where(changed, (before + step) % materials, before)
    shared = np.stack([_smooth(rng.standard_normal((height, width)), 2.5) for _ in range(materials)])
    first = _image(rng, before, spectra, shared, gain=1.0)
    second = _image(rng, after, spectra, shared, gain=0.88)
    second = _shift(second, 0.35, -0.25)
    labels = np.where(changed, CHANGED, UNCHANGED).astype(np.int64)
    labels[_edge(changed)] = UNLABELLED
    return Scene(first, second, labels, name=f"generated-{height}x{width}x{bands}-{seed}")


def _spectra(rng: np.random.Generator, materials: int, bands: int) -> Array:
    """Smooth reflectance curves ``[materials, bands]``: a slope and a few broad absorption features."""
    at = np.linspace(0, 1, bands)
    out = np.empty((materials, bands))
    for m in range(materials):
        curve = 0.25 + 0.35 * rng.random() + 0.3 * (rng.random() - 0.5) * at
        for _ in range(5):
            curve = curve + rng.uniform(-0.14, 0.14) * np.exp(-(((at - rng.random()) / rng.uniform(0.05, 0.25)) ** 2))
        out[m] = curve
    return out.clip(0.03, 0.97)


def _fields(rng: np.random.Generator, height: int, width: int, count: int) -> Array:
    """A map of ``count`` fields: every pixel belongs to the nearest of random seeds, in city-block distance."""
    rows, columns = rng.integers(0, height, count), rng.integers(0, width, count)
    y, x = np.mgrid[:height, :width]
    best, nearest = np.full((height, width), np.inf), np.zeros((height, width), np.int64)
    for field, (row, column) in enumerate(zip(rows, columns)):
        far = np.abs(y - row) + np.abs(x - column)
        nearest[far < best] = field
        best = np.minimum(best, far)
    return nearest


def _smooth(image: Any, sigma: float) -> Array:
    """Gaussian blur (circular, by FFT) scaled back to unit variance."""
    fy, fx = np.fft.fftfreq(image.shape[0])[:, None], np.fft.rfftfreq(image.shape[1])[None]
    low_pass = np.exp(-2 * (np.pi * sigma) ** 2 * (fy**2 + fx**2))
    out = np.fft.irfft2(np.fft.rfft2(image) * low_pass, s=image.shape)
    return (out - out.mean()) / out.std()


def _image(rng: np.random.Generator, material: Array, spectra: Array, shared: Array, gain: float) -> Array:
    """Mix the spectra by abundances ``[materials, H, W]`` and add light and noise -> ``[bands, H, W]`` float32."""
    materials, bands = spectra.shape
    own = np.stack([_smooth(rng.standard_normal(material.shape), 1.5) for _ in range(materials)])
    logits = 4.0 * (np.arange(materials)[:, None, None] == material) + 0.7 * shared + 0.35 * own
    abundance = np.exp(logits)
    abundance /= abundance.sum(axis=0)
    light = gain * (1 + 0.05 * _smooth(rng.standard_normal(material.shape), 12))
    image = np.einsum("mb,mhw->bhw", spectra, abundance) * light
    noise = 0.012 + 0.03 * rng.random(bands) ** 3  # a few bands are bad, as in real sensors
    image += noise[:, None, None] * rng.standard_normal(image.shape)
    return image.astype(np.float32)


def _shift(image: Array, rows: float, columns: float) -> Array:
    """Move by a part of a pixel (linear interpolation, edges repeated): imperfect co-registration."""
    for axis, by in ((1, rows), (2, columns)):
        step = 1 if by > 0 else -1
        index = np.clip(np.arange(image.shape[axis]) - step, 0, image.shape[axis] - 1)
        image = (1 - abs(by)) * image + abs(by) * np.take(image, index, axis)
    return image.astype(np.float32)


def _edge(mask: Array) -> Array:
    """Pixels with a neighbour (up, down, left, right) of the other value."""
    edge = np.zeros_like(mask)
    for axis in (0, 1):
        differs = np.diff(mask, axis=axis)
        low = [slice(None)] * 2
        low[axis] = slice(0, -1)
        high = [slice(None)] * 2
        high[axis] = slice(1, None)
        edge[tuple(low)] |= differs
        edge[tuple(high)] |= differs
    return edge
