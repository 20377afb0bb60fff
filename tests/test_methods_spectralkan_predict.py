"""SpectralKAN: what mapping a pair of images must not do: write over its input, or fail on a constant band in vain."""

import numpy as np
import pytest

from pyml.methods.spectralkan.readers import files_of
from pyml.methods.spectralkan.scene import generate_scene
from pyml.methods.spectralkan.train import Options, train
from tests.method_runs import TRAINING, needs
from tests.test_methods_spectralkan_data import write_envi

needs(*TRAINING)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    out = tmp_path_factory.mktemp("spectralkan") / "run"
    options = Options(seeds=1, epochs=1, train_fraction=0.2, batch_size=16)
    train(generate_scene(24, 20, 4), options, out, quiet=True, device="cpu")
    return out / "spectralkan" / "seed0" / "checkpoint.safetensors"


@pytest.fixture
def predict(run, checkpoint, tmp_path):
    """The command on before and after in ``tmp_path``; (exit code, what it printed as an error)."""

    def call(before, after, out, *more):
        names = "--before", tmp_path / before, "--after", tmp_path / after, "--out", tmp_path / out
        code, _, err = run("predict", "spectralkan", "--checkpoint", checkpoint, *names, "--device", "cpu", *more)
        return code, err

    return call


@pytest.mark.parametrize(
    ("names", "out", "option"),
    [
        (("b.npy", "a.npy"), "b.npy", "before"),
        (("b.npy", "a.npy"), "a.npy", "after"),
        (("b.npy", "a.npy"), "hard.npy", "after"),
        (("b.npy", "a.npy"), "folder/../a.npy", "after"),
        (("b.npy", "a.npz:x"), "b.npy", "before"),
        (("b.npy", "a.tif"), "a.tif", "after"),
        (("b.npy", "e.npy.hdr"), "e.npy", "after"),  # the data of an ENVI image may have any name
    ],
)
def test_an_input_is_never_overwritten(predict, tmp_path, names, out, option):
    needs("tifffile", "spectral")
    import tifffile

    scene = generate_scene(24, 20, 4, seed=1)
    for name, image in (("b", scene.before), ("a", scene.after)):
        np.save(tmp_path / f"{name}.npy", np.moveaxis(image, 0, -1))
    np.savez(tmp_path / "a.npz", x=np.moveaxis(scene.after, 0, -1))
    tifffile.imwrite(tmp_path / "a.tif", scene.after, photometric="minisblack")
    write_envi(tmp_path / "e", 1000 * scene.after, "bsq")
    (tmp_path / "e").rename(tmp_path / "e.npy")
    (tmp_path / "e.hdr").rename(tmp_path / "e.npy.hdr")
    (tmp_path / "hard.npy").hardlink_to(tmp_path / "a.npy")
    (tmp_path / "folder").mkdir()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    code, err = predict(*names, out)
    assert code == 1 and err.startswith("error: out: expected a new file, got ") and err.count("\n") == 1
    assert err.endswith(f"the file of --{option}\n")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    code, err = predict(*names, "map.npy")
    assert code == 0 and np.load(tmp_path / "map.npy").shape == (24, 20), err


def test_an_envi_image_has_two_files(tmp_path):
    write_envi(tmp_path / "image", np.zeros((2, 3, 4), np.uint16), "bsq")
    for source in ("image", "image.hdr"):
        assert set(files_of(str(tmp_path / source), "before")) == {tmp_path / "image", tmp_path / "image.hdr"}


def test_a_constant_band_is_scaled_as_in_training(predict, tmp_path):
    """It has no range of its own, and prediction has no --drop-bands."""
    scene = generate_scene(24, 20, 4, seed=1)
    scene.before[1] = scene.after[1] = 0.5
    for name, image in (("b", scene.before), ("a", scene.after)):
        np.save(tmp_path / f"{name}.npy", np.moveaxis(image, 0, -1))
    code, err = predict("b.npy", "a.npy", "map.npy")
    assert code == 1 and "1 of 4 bands are constant over both dates" in err and err.count("\n") == 1
    assert "use --scale training" in err and "drop-bands" not in err
    code, err = predict("b.npy", "a.npy", "map.npy", "--scale", "training")
    assert code == 0, err
    assert set(np.unique(np.load(tmp_path / "map.npy"))) <= {0, 1}


@pytest.mark.parametrize("text", ["²", "16,²", "-1", "1" * 10])
def test_widths_are_whole_numbers(run, tmp_path, text):
    code, _, err = run("train", "spectralkan", "--spectral-hidden", text, "--out", tmp_path / "run")
    assert code == 1 and err == f"error: spectral-hidden: expected widths such as 16 or 32,16, got {text!r}\n"
