"""LSNet's data: folders of pairs and what can be wrong with them, the split, crops, generated water."""

import re
import struct

import numpy as np
import pytest
import torch

from pyml.methods import UserError
from pyml.methods._engine import make_accelerator
from pyml.methods._pictures import read_picture, save_png, to_bytes, to_float
from pyml.methods.lsnet import formation
from pyml.methods.lsnet.data import Batches, Pairs, check_crop, load_pairs, split_pairs
from tests.method_runs import needs

needs("accelerate", "PIL")


def picture(height=20, width=24, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture
def folders(tmp_path):
    """Four pairs: a to d; the targets of c has another suffix."""
    for side in ("input", "target"):
        for number, name in enumerate("abcd"):
            suffix = "bmp" if (side, name) == ("target", "c") else "png"
            from PIL import Image

            (tmp_path / side).mkdir(exist_ok=True)
            Image.fromarray(picture(seed=number + 10 * (side == "target"))).save(tmp_path / side / f"{name}.{suffix}")
    return tmp_path / "input", tmp_path / "target"


# --- files ------------------------------------------------------------------------------------------------------------


def test_pairs_go_together_by_name(folders):
    pairs, notes = load_pairs(*folders, size=None)
    assert pairs.names == ["a", "b", "c", "d"] and not notes
    for number in range(4):
        np.testing.assert_array_equal(pairs.inputs[number].permute(1, 2, 0), picture(seed=number))
        np.testing.assert_array_equal(pairs.targets[number].permute(1, 2, 0), picture(seed=number + 10))


def test_pairs_are_resized_as_pillow_does(folders):
    from PIL import Image

    pairs, _ = load_pairs(*folders, size=16)
    expected = np.array(Image.fromarray(picture(seed=1)).resize((16, 16), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(pairs.inputs[1].permute(1, 2, 0), expected)


def test_odd_sides_lose_a_pixel(folders):
    for folder in folders:
        save_png(picture(21, 25), folder / "a.png")
    pairs, _ = load_pairs(*folders, size=None)
    assert pairs.inputs[0].shape == pairs.targets[0].shape == (3, 20, 24)
    np.testing.assert_array_equal(pairs.inputs[0].permute(1, 2, 0), picture(21, 25)[:20, :24])


def test_other_files_are_left_out_and_named(folders):
    (folders[0] / "notes.txt").write_text("x")
    (folders[0] / ".hidden").write_text("x")
    pairs, notes = load_pairs(*folders)
    assert len(pairs) == 4 and notes == [f"{folders[0] / 'notes.txt'} is no picture file and is left out"]


def spoil(folders, how):
    inputs, targets = folders
    file = inputs / "b.png"
    if how == "cut":
        file.write_bytes(file.read_bytes()[:200])
    elif how == "text":
        file.write_text("no picture")
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "grey":
        save_png(picture()[..., 0], file)
    elif how == "alpha":
        from PIL import Image

        Image.fromarray(picture()).convert("RGBA").save(file)
    elif how == "partner":
        (targets / "b.png").unlink()
    elif how == "orphan":
        (inputs / "b.png").unlink()
    elif how == "size":
        save_png(picture(20, 22), file)
    elif how == "twice":
        save_png(picture(), inputs / "b.bmp")


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        ("cut", r"input.b\.png: .*truncated"),
        ("text", r"input.b\.png: is no picture that can be read"),
        ("empty", r"input.b\.png: is no picture that can be read"),
        ("grey", r"input.b\.png: expected three 8-bit channels \(RGB\), got mode L"),
        ("alpha", r"input.b\.png: expected three 8-bit channels \(RGB\), got mode RGBA"),
        ("partner", r"input.b\.png: no picture of that name in .*target"),
        ("orphan", r"target.b\.png: no picture of that name in .*input"),
        ("size", r"target.b\.png: expected the size of its input, 20 x 22, got 20 x 24"),
        ("twice", r"input.b\.png: expected one picture of that name, got b\.bmp too"),
    ],
)
@pytest.mark.parametrize("size", [16, None])
def test_a_bad_pair_is_one_sentence(folders, how, sentence, size):
    spoil(folders, how)
    with pytest.raises(UserError, match=sentence) as caught:
        load_pairs(*folders, size=size)
    assert "\n" not in str(caught.value) and "more" not in str(caught.value)


def test_whatever_pillow_raises_is_one_sentence(folders, monkeypatch):
    from PIL import ImageOps

    def broken(picture):
        raise struct.error("unpack requires a buffer of 4 bytes\nsecond line")

    monkeypatch.setattr(ImageOps, "exif_transpose", broken)
    with pytest.raises(UserError, match=r"input.a\.png: unpack requires a buffer of 4 bytes$"):
        read_picture(folders[0] / "a.png")
    monkeypatch.setattr(ImageOps, "exif_transpose", lambda picture: picture.missing)
    with pytest.raises(UserError, match=r"input.a\.png: .*missing"):
        read_picture(folders[0] / "a.png")


def test_all_bad_files_are_counted(folders):
    for name in "ab":
        (folders[1] / f"{name}.png").write_text("x")
    with pytest.raises(UserError, match=r"target.a\.png: .*\(and 1 more\)"):
        load_pairs(*folders)


def test_folders_without_pictures(folders, tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"input: no picture .* in .*none"):
        load_pairs(tmp_path / "none", folders[1])
    with pytest.raises(UserError, match=r"target: expected a folder, got .*absent"):
        load_pairs(folders[0], tmp_path / "absent")


def test_a_turned_photograph_is_turned_back(tmp_path):
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.fromarray(picture()).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_picture(tmp_path / "a.png").permute(1, 2, 0), np.rot90(picture(), -1))


def test_bytes_and_floats():
    values = torch.tensor([[[-0.2, 0.0, 0.5 / 255 + 1e-6, 1.0, 1.3]]])
    assert to_bytes(values).flatten().tolist() == [0, 0, 1, 255, 255]
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_bytes(to_float(every)), every)


# --- split and crops --------------------------------------------------------------------------------------------------


def some(count=8, side=16, groups=None):
    def ramp(offset):
        return torch.arange(3 * side * side).view(3, side, side).add(offset).remainder(251).to(torch.uint8)

    inputs = [ramp(i) for i in range(count)]
    return Pairs(inputs, [255 - x for x in inputs], [str(i) for i in range(count)], "ramps", groups)


def test_split_is_seeded_and_whole():
    pairs = some(20)
    split = split_pairs(pairs, 0.25, 3)
    assert len(split.test) == 5 and sorted(split.train + split.test) == list(range(20))
    assert split_pairs(pairs, 0.25, 3) == split != split_pairs(pairs, 0.25, 4)
    grouped = split_pairs(some(20, groups=[i % 4 for i in range(20)]), 0.25, 0)
    assert len({i % 4 for i in grouped.test}) == 1 and len(grouped.test) == 5
    for fraction in (0, 1, 0.01, float("nan")):
        with pytest.raises(UserError, match="test-fraction: "):
            split_pairs(pairs, fraction, 0)


def test_crops_of_input_and_target_agree():
    batches = Batches(some(), [1, 2, 5, 6, 7], 12, 2, 0, make_accelerator("cpu"))
    seen = []
    for inputs, targets, counted, pairs in batches(1):
        assert inputs.shape == targets.shape == (pairs, 3, 12, 12) and counted.tolist() == [1] * pairs
        torch.testing.assert_close(inputs + targets, torch.ones_like(inputs))
        seen.append(inputs)
    assert [len(x) for x in seen] == [2, 2, 1]
    again = [inputs for inputs, *_ in batches(1)]
    other = [inputs for inputs, *_ in batches(2)]
    assert all(torch.equal(a, b) for a, b in zip(seen, again)) and not torch.equal(seen[0], other[0])


def test_crops_reach_every_corner_and_flip():
    batches = Batches(some(1, 14), [0], 12, 1, 0, make_accelerator("cpu"))
    whole = some(1, 14).inputs[0]
    places = set()
    for epoch in range(200):
        found = to_bytes(next(iter(batches(epoch)))[0][0])
        for row in range(3):
            for column in range(3):
                cut = whole[:, row : row + 12, column : column + 12]
                for flips in ([], [1], [2], [1, 2]):
                    if torch.equal(cut.flip(flips), found):
                        places.add((row, column, *flips))
    assert len(places) == 9 * 4


class Worker:
    """As much of an accelerator as the batches ask for."""

    def __init__(self, rank, world):
        self.process_index, self.num_processes, self.device = rank, world, torch.device("cpu")


def test_processes_share_a_batch():
    alone = list(Batches(some(), [0, 1, 2, 3, 4], 12, 4, 0, make_accelerator("cpu"))(1))
    first, second = (list(Batches(some(), [0, 1, 2, 3, 4], 12, 4, 0, Worker(rank, 2))(1)) for rank in (0, 1))
    assert torch.equal(torch.stack([first[0][0], second[0][0]], 1).flatten(0, 1), alone[0][0])
    assert first[1][2].tolist() == [1] and second[1][2].tolist() == [0]  # one pair for two processes
    assert first[1][3] == second[1][3] == 1 and len(second[1][0]) == 1


def test_wrong_crops_are_one_sentence():
    for crop in (10, 13):
        with pytest.raises(UserError, match=f"crop-size: expected an even number >= 12, got {crop}"):
            check_crop(some(), crop)
    with pytest.raises(UserError, match="at most the sides of every image, got 18 and 0 with 16 x 16"):
        check_crop(some(), 18)


# --- water ------------------------------------------------------------------------------------------------------------


def test_formation_model():
    scene = torch.rand(3, 4, 5)
    distance = torch.rand(4, 5) * 5
    beta, veil = torch.tensor([0.5, 0.1, 0.2]), torch.tensor([0.1, 0.5, 0.7])
    water = formation.under_water(scene, distance, beta, veil)
    for c in range(3):
        t = np.exp(-beta[c].item() * distance.numpy())
        np.testing.assert_allclose(water[c], scene[c].numpy() * t + veil[c].item() * (1 - t), rtol=1e-5)
    torch.testing.assert_close(formation.under_water(scene, torch.zeros(4, 5), beta, veil), scene)
    far = formation.under_water(scene, torch.full((4, 5), 1e4), beta, veil)
    torch.testing.assert_close(far, veil.view(3, 1, 1).expand_as(far))


def test_generated_pairs_are_seeded_and_wet():
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    pairs = formation.generate_pairs(12, 48, seed=2)
    again, other = formation.generate_pairs(12, 48, seed=2), formation.generate_pairs(12, 48, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(pairs.inputs + pairs.targets, again.inputs + again.targets))
    assert not torch.equal(pairs.inputs[0], other.inputs[0])
    assert len(formation.photographs()) == 6 and pairs.groups == [0, 1, 2, 3, 4, 5] * 2
    before = torch.stack(pairs.targets).float().mean((0, 2, 3))
    after = torch.stack(pairs.inputs).float().mean((0, 2, 3))
    assert before[0] - after[0] > 30  # red fades
    assert (pairs.inputs[0].float() - pairs.targets[0]).abs().mean() > 10
    with pytest.raises(UserError, match="made: expected at least 2 pairs"):
        formation.generate_pairs(12, 33)


def test_photographs_are_found_or_asked_for(monkeypatch, tmp_path):
    sklearn = pytest.importorskip("sklearn")
    skimage = pytest.importorskip("skimage")
    monkeypatch.setattr(sklearn, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(skimage, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(UserError, match=re.escape("input: expected --input and --target")):
        formation.photographs()
