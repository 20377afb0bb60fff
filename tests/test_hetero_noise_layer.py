"""The layer of heterogeneous noise: what it adds, and what its state keeps."""

import pytest
import torch

from pyml.nn import HeteroNoise
from pyml.ops import hetero_noise

KEY = torch.tensor([5])


def test_training_adds_the_noise_of_the_op_and_eval_nothing():
    scale = torch.rand(3, 4) + 0.1
    layer, x = HeteroNoise(0.5, scale, seed=5), torch.randn(6, 3, 4)
    for step in range(2):
        expected = hetero_noise(x, scale.expand(6, 3, 4).contiguous(), 0.5, key=KEY, step=step)
        assert torch.allclose(layer(x), expected, atol=1e-6)
    layer.eval()
    assert layer(x) is x and layer.step == 2
    plain = HeteroNoise(0.5, seed=5)
    assert torch.equal(plain(x), hetero_noise(x, 1.0, 0.5, key=KEY, step=0))


def test_without_a_seed_each_layer_has_its_own_noise():
    x = torch.zeros(1000)
    first, second = HeteroNoise(1.0)(x), HeteroNoise(1.0)(x)
    assert abs((first * second).mean()) < 0.2 and abs(first.std() - 1) < 0.2


def test_a_trained_scale_gets_a_gradient():
    layer = HeteroNoise(2.0, torch.nn.Parameter(torch.ones(4)), seed=1)
    x = torch.zeros(5, 4, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert torch.allclose(layer.scale.grad, y.detach().sum(0), atol=1e-5), "y = 2 scale z with scale 1"
    assert torch.equal(x.grad, torch.ones(5, 4))


def test_a_resumed_layer_goes_on_with_new_noise(tmp_path):
    x, layer = torch.zeros(9), HeteroNoise(1.0)
    seen = [layer(x) for _ in range(3)]
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    following = layer(x)
    other = HeteroNoise(1.0)
    other.load_state_dict(torch.load(tmp_path / "layer.pt", weights_only=True))
    again = other(x)
    assert torch.equal(again, following) and not any(torch.equal(again, s) for s in seen)


def test_refusals():
    for build, sentence in (
        (lambda: HeteroNoise(-1.0), "std: expected a finite number of at least 0"),
        (lambda: HeteroNoise(1.0, -2.0), "scale: expected a finite number of at least 0"),
        (lambda: HeteroNoise(1.0, torch.ones(3, dtype=torch.int64)), "scale: expected float32"),
        (lambda: HeteroNoise(1.0, seed=1 << 64), "seed: expected None, or an integer of 64 bits"),
        (lambda: HeteroNoise(1.0, torch.ones(3))(torch.zeros(2, 4)), r"x: expected \[B, \*\[3\]\], got \[2, 4\]"),
    ):
        with pytest.raises((ValueError, TypeError), match=sentence):
            build()
