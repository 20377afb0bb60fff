"""LSNet: restoring pictures with a trained network, and the two commands."""

import itertools
import json

import pytest
import torch
import torch.nn.functional as F

from pyml.methods import UserError
from pyml.methods._pictures import read_picture, save_png, to_bytes, to_float
from pyml.methods.lsnet import predict
from pyml.methods.lsnet.archs import ARCHS
from pyml.methods.lsnet.figures import draw_sheet
from pyml.methods.lsnet.train import Options, train
from pyml.nn import LSNet
from tests.lsnet_pairs import tinted, write_folders
from tests.method_runs import TRAINING, needs

needs(*TRAINING)


@pytest.fixture
def folders(tmp_path):
    return write_folders(tmp_path)


# --- prediction -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("lsnet") / "run"
    train(tinted(), Options(epochs=1, crop_size=16, batch_size=2), out, quiet=True, device="cpu")
    return out / "lsnet" / "seed0" / "checkpoint.safetensors"


@pytest.mark.parametrize("size", [(1, 1), (2, 7), (33, 20), (31, 35)])
def test_any_size(size):
    torch.manual_seed(0)
    model = LSNet().eval()
    image = torch.rand(3, *size)
    after = predict.enhance(model, image)
    assert after.shape == image.shape
    compensate, exposed = predict.terms(model, image)
    torch.testing.assert_close(image + compensate - exposed, after)
    height, width = (side + side % 2 for side in size)
    grown = F.pad(image.unsqueeze(0), (0, width - size[1], 0, height - size[0]), mode="replicate")
    torch.testing.assert_close(after, model(grown)[0, :, : size[0], : size[1]])


def test_a_batch_is_no_image():
    with pytest.raises(ValueError, match=r"^enhance: image: expected \[3, H, W\], got \[1, 3, 8, 8\]$"):
        predict.enhance(LSNet(attention="identity"), torch.rand(1, 3, 8, 8))


def test_predict_command(run, trained, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name, side in (("a", 24), ("b", 25)):
        save_png(to_bytes(tinted(1, side).inputs[0] / 255).permute(1, 2, 0), pictures / f"{name}.png")
    (pictures / "broken.jpg").write_text("x")
    (pictures / "notes.txt").write_text("x")
    out = tmp_path / "out"
    code, text, err = run("predict", "lsnet", "--checkpoint", trained, "--input", pictures, "--out", out, "--maps")
    assert code == 0 and "2 pictures, 2 left out" in text
    assert f"warning: {pictures / 'broken.jpg'}: is no picture that can be read\n" in err
    assert f"warning: {pictures / 'notes.txt'} is no picture file and is left out\n" in err and err.count("\n") == 2
    names = {f"{stem}{end}.png" for stem in "ab" for end in ("", "_compensate", "_exposed")}
    assert {path.name for path in out.iterdir()} == names
    model = predict.load_model(trained)
    image = to_float(read_picture(pictures / "b.png"))
    expected = to_bytes(predict.enhance(model, image)).float()
    assert (read_picture(out / "b.png").float() - expected).abs().max() <= 1  # the sum of the terms may round elsewhere
    terms = torch.stack(predict.terms(model, image))
    scaled = to_bytes((terms - terms.min()) / (terms.max() - terms.min()))
    for name, term in zip(("compensate", "exposed"), scaled):
        assert torch.equal(read_picture(out / f"b_{name}.png"), term)
    low, high = (f"{float(bound):.3f}" for bound in (terms.min(), terms.max()))
    assert f"b.png (maps: black {low}, white {high})" in text

    code, text, err = run(
        "predict", "lsnet", "--checkpoint", trained, "--input", pictures / "a.png", "--out", out, "--size", 32
    )
    assert code == 0 and read_picture(out / "a.png").shape == (3, 32, 32), err
    assert "1 picture, 0 left out" in text


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"--checkpoint": "absent.safetensors"}, "checkpoint: no file"),
        ({"--checkpoint": "weights.pth"}, "is not a weight file of torch"),
        ({"--input": "absent"}, "input: no file or folder"),
        ({"--input": "none"}, "input: no picture (.jpg"),
        ({"--out": "file"}, "out: expected a folder that can be written"),
        ({"--device": "tpu"}, "device: expected auto, cpu or cuda"),
    ],
)
def test_wrong_prediction_is_one_sentence(run, trained, tmp_path, change, sentence):
    (tmp_path / "none").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "weights.pth").write_text("x")
    save_png(tinted(1).inputs[0].permute(1, 2, 0), tmp_path / "a.png")
    options = {"--checkpoint": trained, "--input": tmp_path / "a.png", "--out": tmp_path / "out"}
    options |= {key: value if key == "--device" else tmp_path / value for key, value in change.items()}
    code, _, err = run("predict", "lsnet", *(part for item in options.items() for part in item))
    assert code == 1 and not (tmp_path / "out").exists()
    lines = err.strip().splitlines()
    assert lines[-1].startswith("error: ") and sentence in lines[-1]
    assert all(line.startswith("warning: ") for line in lines[:-1])


def test_an_input_is_never_overwritten(run, trained, tmp_path):
    save_png(tinted(1).inputs[0].permute(1, 2, 0), tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    code, _, err = run("predict", "lsnet", "--checkpoint", trained, "--input", tmp_path / "a.png", "--out", tmp_path)
    assert code == 1 and "would overwrite it" in err and (tmp_path / "a.png").read_bytes() == before


def test_no_input_and_no_result_is_lost_to_another(run, trained, tmp_path):
    """a.jpg becomes a.png, and the maps of b become b_exposed.png: both names may be those of other pictures."""
    image = tinted(1).inputs[0].permute(1, 2, 0)
    for name in ("a.png", "b.png", "b_exposed.png"):
        save_png(image, tmp_path / name)
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.png").read_bytes())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    options = ("--checkpoint", trained, "--input", tmp_path, "--maps")
    code, _, err = run("predict", "lsnet", *options, "--out", tmp_path)
    assert code == 1 and {name: (tmp_path / name).read_bytes() for name in before} == before
    assert "would overwrite a.png" in err
    _, _, err = run("predict", "lsnet", *options, "--out", tmp_path / "out")
    assert "would overwrite a result of a." in err and "would overwrite a result of b.png" in err


def test_no_other_original_is_lost(run, trained, tmp_path):
    """d/a.png is not read, and no one can tell whether it is a result or another photograph."""
    image = tinted(2).inputs
    for name, one in zip(("a.png", "a.bmp"), image):
        save_png(one.permute(1, 2, 0), tmp_path / name)
    before = (tmp_path / "a.png").read_bytes()
    (tmp_path / "link").symlink_to(tmp_path)
    for folder in (tmp_path, tmp_path / "link"):
        code, _, err = run("predict", "lsnet", "--checkpoint", trained, "--input", tmp_path / "a.bmp", "--out", folder)
        assert code == 1 and "its result would overwrite a.png: choose another --out" in err
        assert (tmp_path / "a.png").read_bytes() == before
    for _ in range(2):  # elsewhere an older result is replaced
        code, _, err = run(
            "predict", "lsnet", "--checkpoint", trained, "--input", tmp_path / "a.bmp", "--out", tmp_path / "out"
        )
        assert code == 0, err


def test_a_broken_picture_stands_in_the_way_of_none(run, trained, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    (pictures / "a.jpg").write_text("x")
    save_png(tinted(1).inputs[0].permute(1, 2, 0), pictures / "a.png")
    code, out, err = run("predict", "lsnet", "--checkpoint", trained, "--input", pictures, "--out", tmp_path / "out")
    assert code == 0 and "1 picture, 1 left out" in out and "a.jpg: is no picture that can be read" in err
    assert (tmp_path / "out" / "a.png").is_file()


@pytest.mark.parametrize("wrapped", [None, "state_dict", "module."])
def test_public_weight_files_load(tmp_path, wrapped):
    model = LSNet().eval()
    state = model.state_dict()
    if wrapped == "module.":
        state = {f"module.{name}": t for name, t in state.items()}
    torch.save({"state_dict": state} if wrapped == "state_dict" else state, tmp_path / "weight.pth")
    image = torch.rand(3, 16, 16)
    torch.testing.assert_close(predict.load_model(tmp_path / "weight.pth")(image[None]), model(image[None]))
    state.popitem()
    torch.save(state, tmp_path / "weight.pth")
    with pytest.raises(UserError, match=r"weight\.pth: expected (module\.)?finallconv\.conv2\.bias of shape"):
        predict.load_model(tmp_path / "weight.pth")
    torch.save([1, 2], tmp_path / "weight.pth")
    with pytest.raises(UserError, match="holds a list, expected 60 named tensors"):
        predict.load_model(tmp_path / "weight.pth")


# --- the contact sheet ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "name"), [(1, "7"), (2, "a name far longer than its picture is wide"), (5, "7")])
def test_no_text_of_the_contact_sheet_is_cut_off(count, name):
    images = [torch.rand(3, 24, 32) for _ in range(count)]
    title = "lsnet-fixed, seed 12: 20.43 dB, SSIM 0.8433 over all test images"
    figure = draw_sheet({"before": images, "after": images}, images, [name] * count, title)
    figure.canvas.draw()
    page = figure.bbox
    texts = [figure._suptitle, *(axis.title for axis in figure.axes)]
    for box in (text.get_window_extent() for text in texts):
        assert box.x0 >= page.x0 and box.x1 <= page.x1 and box.y0 >= page.y0 and box.y1 <= page.y1
    above = [axis.title.get_window_extent() for axis in figure.axes]
    assert not [(a, b) for a, b in itertools.combinations(above, 2) if a.overlaps(b)]
    assert figure._suptitle.get_text().split() == title.split()


# --- commands ---------------------------------------------------------------------------------------------------------


def test_train_command_on_folders(run, folders):
    (folders / "input" / "notes.txt").write_text("x")
    code, out, err = run(
        "train", "lsnet", "--input", folders / "input", "--target", folders / "target", "--size", 16, "--crop-size", 16,
        "--epochs", 1, "--arch", "raw,identity", "--out", folders / "run", "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err
    assert "notes.txt is no picture file and is left out" in err
    for text in ("PSNR", "SSIM", "GFLOP", "identity", "metrics.json"):
        assert text in out
    config = json.loads((folders / "run" / "metrics.json").read_text())["config"]
    assert config["train_pairs"] == 4 and len(config["test_names"]) == 2


def test_train_command_without_data(run, tmp_path):
    needs("skimage", "sklearn")
    code, out, err = run(
        "train", "lsnet", "--made-pairs", 12, "--made-size", 32, "--crop-size", 16, "--epochs", 1, "--device", "cpu",
        "--out", tmp_path / "run",
    )  # fmt: skip
    assert code == 0, err
    assert "lsnet" in out and (tmp_path / "run" / "lsnet" / "seed0" / "contact_sheet.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--input", "here"], "--target: expected too, as some data is given"),
        (["--input", "absent", "--target", "absent"], "input: expected a folder, got absent"),
        (["--input", "a", "--target", "b", "--made-pairs", "9"], "made-pairs: expected no --input beside it, got 9"),
        (["--size", "128"], "size: expected --input and --target too, got 128"),
        (["--size", "25", "--input", "a", "--target", "b"], "size: expected an even number, got 25"),
        (["--arch", "lsnet,unet"], "arch: expected one of raw"),
        (["--crop-size", "13"], "crop-size: expected an even number"),
        (["--made-size", "33"], "made: expected at least 2 pairs and an even side"),
        (["--validate-every", "-1"], "validate-every: expected at least 0, got -1"),
        (["--learning-rate", "nan"], "learning-rate: expected a finite number > 0, got nan"),
        (["--ssim-weight", "inf"], "ssim-weight: expected a finite number >= 0, got inf"),
        (["--resume", "--made-size", "32", "--crop-size", "16"], "resume: expected the folder of a run"),
    ],
)
def test_wrong_training_is_one_sentence(run, tmp_path, more, sentence):
    code, _, err = run("train", "lsnet", "--out", tmp_path / "run", *more)
    assert code == 1
    assert err.startswith("error: ") and sentence in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_every_arch_has_a_name_in_the_help(run):
    _, out, _ = run("train", "lsnet", "--help")
    words = set(out.replace(",", " ").replace("│", " ").replace(";", " ").split())
    assert set(ARCHS) <= words
