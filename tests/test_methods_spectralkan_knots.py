"""SpectralKAN training: knots fitted to the training pixels, splines that go on beyond their knots."""

import pytest
import torch

from pyml.methods._checkpoint import save_checkpoint
from pyml.methods._engine import make_accelerator
from pyml.methods.spectralkan import data, predict
from pyml.methods.spectralkan.archs import ARCHS, build, fit_knots
from pyml.methods.spectralkan.scene import generate_scene
from pyml.methods.spectralkan.train import Batches, Options, train
from tests.method_runs import TRAINING, needs

needs(*TRAINING)
QUICK = {"seeds": 1, "epochs": 4, "train_fraction": 0.2, "batch_size": 16}


@pytest.fixture
def small():
    return generate_scene(24, 20, 5, seed=3)


def test_knots_follow_the_training_pixels(small, tmp_path):
    """Those of the first layer only. A checkpoint brings them back, and the extrapolation; an old one has zero."""
    uniform = build("spectralkan", 5).state_dict()
    for name, changes in (("ours", {}), ("public", {"knots": "uniform", "extrapolation": "zero"})):
        train(small, Options(**QUICK, **changes), tmp_path / name, quiet=True, device="cpu")
        path = tmp_path / name / "spectralkan" / "seed0" / "checkpoint.safetensors"
        model, checkpoint = predict.load_model(path)
        assert {layer.extrapolation for layer in (*model.layer1.layers, *model.layer2.layers)} == {
            "linear" if name == "ours" else "zero"
        }
        moved = {k for k, t in model.state_dict().items() if k.endswith("grid") and not torch.equal(t, uniform[k])}
        assert moved == ({"layer1.layers.0.grid"} if name == "ours" else set())
        if name == "ours":
            pixels = data.split_pixels(small.labels, 0.2, 0, "random", 5).train
            image = data.pad_border(data.difference(small.before, small.after), 2, "symmetric")
            seen = data.patch_view(image, 5)[pixels // 20, pixels % 20].reshape(-1, 25)
            inner = model.layer1.layers[0].grid[:, 3:-3]
            torch.testing.assert_close(inner[:, 0], seen.amin(0), rtol=0, atol=1e-3)  # 2 % equal spacing, margin 0.01
            torch.testing.assert_close(inner[:, -1], seen.amax(0), rtol=0, atol=1e-3)
            assert (inner.diff() > 0).all()
        del checkpoint.info["extrapolation"]
        save_checkpoint(tmp_path / "old.safetensors", checkpoint)
        assert predict.load_model(tmp_path / "old.safetensors")[0].layer1.layers[0].extrapolation == "zero"


@pytest.mark.parametrize("arch", ARCHS)
def test_fit_knots_moves_one_layer_at_most(arch):
    torch.manual_seed(0)
    model = build(arch, 3, 5, (), "linear")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fit_knots(model, 0.2 * torch.rand(40, 3, 5, 5))
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    if arch in ("cnn", "transformer"):
        assert changed == []
    else:
        assert sorted(name.rpartition(".")[2] for name in changed) == ["grid", "spline_weight"]
        assert len({name.rpartition(".")[0] for name in changed}) == 1 and ".0." in changed[0]


def test_knots_are_fitted_to_a_sample_of_both_classes(small):
    pixels = data.split_pixels(small.labels, 0.2, 0, "random", 5).train
    image = data.difference(small.before, small.after)
    batches = Batches(image, small.labels, pixels, 0, Options(**QUICK), make_accelerator("cpu"))
    view = data.patch_view(data.pad_border(image, 2, "symmetric"), 5)
    assert torch.equal(batches.sample(10**6), view[pixels // 20, pixels % 20])
    some = batches.sample(10 * 5 * 25 + 7)
    assert torch.equal(some, batches.sample(10**6)[torch.arange(10) * len(pixels) // 10])
    assert torch.equal(batches.sample(1), batches.sample(10**6)[:1])
