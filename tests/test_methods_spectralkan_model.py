"""The SpectralKAN network: public checkpoints, parameter counts, patches against whole images."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pyml.methods.spectralkan.data import pad_border, patch_view
from pyml.methods.spectralkan.model import SpectralKAN
from tests.test_bspline_layers import public_state, spread


def test_spectralkan_loads_the_public_checkpoint_layout():
    state = {f"layer1.{k}": v for k, v in public_state([25, 16, 1], True).items()}
    state |= {f"layer2.{k}": v for k, v in public_state([224, 2], True).items()}
    model = SpectralKAN(2, 224, 5)
    assert set(model.state_dict()) == set(state)
    model.load_state_dict(state, strict=True)
    assert sum(v.numel() for k, v in state.items() if not k.endswith("grid")) == 3848
    assert model(torch.rand(3, 224, 25)).shape == (3, 2)


@pytest.mark.parametrize(
    ("bands", "hidden", "count"), [(224, (), 3848), (155, (16,), 7552), (198, (16,), 9272), (224, (16,), 10312)]
)
def test_spectralkan_parameter_counts(bands, hidden, count):
    assert sum(p.numel() for p in SpectralKAN(2, bands, 5, hidden).parameters()) == count


@pytest.mark.parametrize("hidden", [(), (4,)])
def test_spectralkan_maps_an_image_as_it_maps_patches(hidden, device, monkeypatch):
    model = SpectralKAN(3, 6, 5, hidden).to(device)
    spread(model)
    image = torch.rand(6, 9, 7, device=device) * 2 - 1
    for border in ("symmetric", "reflect", "replicate", "zeros"):
        padded = pad_border(image, 2, border)
        patches = patch_view(padded, 5).reshape(-1, 6, 5, 5)
        expected = model(patches).T.reshape(3, 9, 7)
        assert torch.equal(model(patches.flatten(2)), model(patches))
        torch.testing.assert_close(model.map(image, border), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.map(padded), expected, rtol=1e-4, atol=1e-5)
    whole = model.map(image)
    monkeypatch.setattr("pyml.methods.spectralkan.model.HIDDEN_BYTES", 1)  # band by band
    torch.testing.assert_close(model.map(image), whole, rtol=1e-5, atol=1e-6)
    model.map(image).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_spectralkan_learns():
    torch.manual_seed(0)
    model = SpectralKAN(2, 5, 3)
    x = torch.rand(128, 5, 9) - 0.5
    labels = (x.mean((1, 2)) > 0).long()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: SpectralKAN(2, 8, 4), "SpectralKAN: patch_size: expected an odd integer >= 1, got 4"),
        (lambda m: m(torch.ones(2, 5, 9)), "SpectralKAN: x: expected [B, 4, 3, 3] or [B, 4, 9], got [2, 5, 9]"),
        (lambda: SpectralKAN(2, 8, 3.0), "SpectralKAN: patch_size: expected an odd integer >= 1, got 3.0"),
        (lambda: SpectralKAN(2, 0, 3), "SpectralKAN: bands: expected an integer >= 1, got 0"),
        (lambda: SpectralKAN(2, 8, 3, (4, "5")), "SpectralKAN: spectral_hidden: expected an integer >= 1, got 5"),
        (lambda m: m(None), "SpectralKAN: x: expected a tensor, got NoneType"),
        (lambda m: m.map(np.ones((4, 6, 6))), "SpectralKAN.map: image: expected a tensor, got ndarray"),
        (lambda m: m(torch.ones(9)), "SpectralKAN: x: expected [B, 4, 3, 3] or [B, 4, 9], got [9]"),
        (lambda m: m.map(torch.ones(5, 6, 6)), "SpectralKAN.map: image: expected [4, H, W], got [5, 6, 6]"),
        (lambda m: m.map(torch.ones(4, 2, 6)), "SpectralKAN.map: image: expected at least 3 x 3 pixels"),
        (lambda m: m.map(torch.ones(4, 6, 6), "mirror"), "SpectralKAN.map: border: expected one of symmetric"),
    ],
)
def test_wrong_input_gets_one_sentence(call, sentence):
    with pytest.raises((ValueError, TypeError), match=re.escape(sentence)) as caught:
        call(*[SpectralKAN(2, 4, 3)][: call.__code__.co_argcount])
    assert "\n" not in str(caught.value)
