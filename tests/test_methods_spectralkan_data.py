"""SpectralKAN's data: files of every format and their errors, label conventions, presets, borders, splits."""

import importlib.util
import sys

import numpy as np
import pytest
import torch

from pyml.methods import UserError
from pyml.methods.spectralkan import data, readers
from pyml.methods.spectralkan.scene import generate_scene
from tests.method_runs import needs


@pytest.fixture
def cube():
    """An image ``[bands, H, W]`` whose three sizes differ."""
    return np.random.default_rng(0).integers(0, 200, (4, 7, 5)).astype(np.uint16)


@pytest.fixture
def small():
    return generate_scene(24, 20, 5, seed=3)


# --- readers ----------------------------------------------------------------------------------------------------------


def write_envi(path, cube, interleave, data_type=12):
    bands, lines, samples = cube.shape
    order = {"bsq": (0, 1, 2), "bil": (1, 0, 2), "bip": (1, 2, 0)}[interleave]
    path.write_bytes(np.ascontiguousarray(cube.transpose(order)).astype("<u2").tobytes())
    path.with_name(path.name + ".hdr").write_text(
        f"ENVI\nsamples = {samples}\nlines = {lines}\nbands = {bands}\nheader offset = 0\nfile type = ENVI Standard\n"
        f"data type = {data_type}\ninterleave = {interleave}\nbyte order = 0\n"
    )


def write_v73(path, cube, key):
    import h5py

    with h5py.File(path, "w") as file:
        file[key] = cube.transpose(1, 2, 0).T  # as MATLAB writes [H, W, bands]


@pytest.mark.parametrize("interleave", ["bsq", "bil", "bip"])
def test_envi(tmp_path, cube, interleave):
    needs("spectral")
    write_envi(tmp_path / "scene", cube, interleave)
    np.testing.assert_array_equal(readers.read_image(str(tmp_path / "scene")), cube)
    np.testing.assert_array_equal(readers.read_image(str(tmp_path / "scene.hdr")), cube)


def test_a_missing_package_is_one_sentence(tmp_path, cube, monkeypatch):
    write_envi(tmp_path / "scene", cube, "bsq")
    monkeypatch.setitem(sys.modules, "spectral", None)
    monkeypatch.setitem(sys.modules, "spectral.io", None)
    with pytest.raises(UserError, match=r"^before: scene\.hdr needs a missing package .*: install pyml\[train\]$"):
        readers.read_image(str(tmp_path / "scene"), "before")


def test_tiff_in_both_layouts(tmp_path, cube):
    tifffile = pytest.importorskip("tifffile")
    for name, planar, array in (("a.tif", "separate", cube), ("b.tif", "contig", cube.transpose(1, 2, 0))):
        tifffile.imwrite(tmp_path / name, array, planarconfig=planar, photometric="minisblack")
        np.testing.assert_array_equal(readers.read_image(str(tmp_path / name)), cube)


def test_axes_are_for_files_that_do_not_say_them(tmp_path, cube):
    tifffile = pytest.importorskip("tifffile")
    np.save(tmp_path / "chw.npy", cube)
    np.save(tmp_path / "one.npy", cube[0])
    tifffile.imwrite(tmp_path / "pages.tif", cube, photometric="minisblack")
    tifffile.imwrite(tmp_path / "hwc.tif", cube.transpose(1, 2, 0), photometric="minisblack")
    tifffile.imwrite(tmp_path / "samples.tif", cube, photometric="minisblack", planarconfig="separate")
    write_envi(tmp_path / "scene", cube, "bil")
    for name, axes in (("chw.npy", "chw"), ("pages.tif", "auto"), ("pages.tif", "chw"), ("hwc.tif", "hwc")):
        np.testing.assert_array_equal(readers.read_image(str(tmp_path / name), axes=axes), cube)
    for axes in ("auto", "hwc", "chw"):
        np.testing.assert_array_equal(readers.read_image(str(tmp_path / "one.npy"), axes=axes), cube[:1])
    for name in ("samples.tif", "scene") if importlib.util.find_spec("spectral") else ("samples.tif",):
        for axes in ("hwc", "chw"):
            with pytest.raises(UserError, match=rf"^axes: expected auto for .*{name}, whose format .*, got '{axes}'$"):
                readers.read_image(str(tmp_path / name), axes=axes)
    with pytest.raises(UserError, match=r"^axes: expected auto, hwc or chw, got 'whc'$"):
        readers.read_image(str(tmp_path / "chw.npy"), axes="whc")


def test_matlab_and_numpy_files(tmp_path, cube):
    needs("h5py", "scipy")
    from scipy.io import savemat

    hwc = cube.transpose(1, 2, 0)
    savemat(tmp_path / "v5.mat", {"T1": hwc, "T2": hwc + 1, "Binary": hwc[..., 0]})
    write_v73(tmp_path / "v73.mat", cube, "T1")
    np.savez(tmp_path / "one.npz", image=hwc)
    np.save(tmp_path / "plain.npy", cube)
    for source in ("v5.mat:T1", "v73.mat", "v73.mat:T1", "one.npz"):
        np.testing.assert_array_equal(readers.read_image(str(tmp_path / source)), cube)
    np.testing.assert_array_equal(readers.read_image(str(tmp_path / "plain.npy"), axes="chw"), cube)
    np.testing.assert_array_equal(readers.read_mask(str(tmp_path / "v5.mat")), cube[0])
    with pytest.raises(UserError, match=r"name the array of .* it holds: T1 \[7, 5, 4\], T2 \[7, 5, 4\]"):
        readers.read_image(str(tmp_path / "v5.mat"))
    with pytest.raises(UserError, match="holds no array 'T3'"):
        readers.read_image(str(tmp_path / "v5.mat:T3"))


@pytest.mark.parametrize("suffix", [".bmp", ".png"])
def test_picture_masks(tmp_path, suffix):
    needs("PIL")
    from PIL import Image

    mask = np.array([[0, 255, 255], [0, 0, 255]], np.uint8)
    Image.fromarray(mask).save(tmp_path / f"mask{suffix}")
    Image.fromarray(np.repeat(mask[..., None], 3, 2)).save(tmp_path / f"colour{suffix}")
    for name in ("mask", "colour"):
        np.testing.assert_array_equal(readers.read_mask(str(tmp_path / f"{name}{suffix}")), mask)


def write_image(path, cube):
    """A file in the format of its suffix; ENVI without one."""
    from PIL import Image
    from scipy.io import savemat

    if path.suffix == ".tif":
        pytest.importorskip("tifffile").imwrite(path, cube, photometric="minisblack")
    elif path.suffix == ".png":
        Image.fromarray((np.random.default_rng(0).random((64, 64)) * 255).astype(np.uint8)).save(path)
    elif path.suffix == ".npz":
        np.savez(path, x=cube)
    elif path.name == "v73.mat":
        write_v73(path, cube, "x")
    elif path.suffix == ".mat":
        savemat(path, {"x": cube})
    else:
        write_envi(path, cube, "bsq")


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("envi", "spectral"), ("t.tif", "tifffile"), ("v5.mat", "h5py"), ("v73.mat", "h5py"), ("n.npz", "numpy"),
        ("p.png", "PIL"),
    ],
)  # fmt: skip
def test_a_truncated_file_is_one_sentence(tmp_path, cube, name, package):
    needs(package, "scipy", "PIL")
    path = tmp_path / name
    write_image(path, cube)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"^before: .*truncated") as error:
        (readers.read_mask if name == "p.png" else readers.read_image)(str(path), "before")
    assert "\n" not in str(error.value)


def test_files_that_are_none_are_one_sentence(tmp_path, cube):
    write_envi(tmp_path / "envi", cube, "bsq")
    for name, what in (("absent.tif", "no file"), (".", "is a folder"), ("envi.hdr:x", "holds one array")):
        with pytest.raises(UserError, match=what):
            readers.read_image(str(tmp_path / name) if name != "." else str(tmp_path))
    (tmp_path / "unknown.xyz").write_bytes(b"abc")
    with pytest.raises(UserError, match="no known format"):
        readers.read_image(str(tmp_path / "unknown.xyz"))


# --- checks, labels, presets ------------------------------------------------------------------------------------------


def pair(cube):
    other = np.random.default_rng(1).integers(0, 200, cube.shape).astype(np.uint16)
    return cube.astype(np.float32), other.astype(np.float32)


def test_bad_pairs_are_one_sentence(cube):
    a, b = pair(cube)
    nan, constant = a.copy(), a.copy()
    nan[2, 3, 1] = np.nan
    constant[1] = 7
    flat = b.copy()
    flat[1] = 7
    for first, second, sentence in (
        (a, b[:3], "after: expected the 4 bands of before, got 3"),
        (a, b[:, :6], r"after: expected the size of before, 7 x 5, got 6 x 5"),
        (nan, b, "before: 1 pixel with NaN or infinite values, the first at row 3, column 1"),
        (a, np.where(b == b[0, 0, 0], np.inf, b), "after: .* NaN or infinite"),
        (constant, flat, "1 of 4 bands are constant .* add --drop-bands 1$"),
        (a[:, :0], b[:, :0], "empty image"),
    ):
        with pytest.raises(UserError, match=sentence):
            data.check_pair(first, second)
    first, _ = data.check_pair(constant, flat, data.parse_bands("1"))
    np.testing.assert_array_equal(first, constant[[0, 2, 3]])
    with pytest.raises(UserError, match="expected bands 0 to 3, got 9"):
        data.check_pair(a, b, (9,))
    with pytest.raises(UserError, match="drop-bands: expected numbers and ranges"):
        data.parse_bands("1,x")
    assert data.parse_bands("0-2, 7") == (0, 1, 2, 7)
    assert data.parse_bands("3-3, 007") == (3, 7)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("7-3", "expected ranges that rise, below 65536, got '7-3'"),
        ("1,0-99999999", "expected ranges that rise, below 65536, got '0-99999999'"),
        ("0-9999999999", "expected numbers and ranges such as 0-3,7, got '0-9999999999'"),
        ("9" * 5000, "expected numbers and ranges such as 0-3,7, got '999"),
        ("²", "expected numbers and ranges such as 0-3,7, got '²'"),
        ("٣", "expected numbers and ranges such as 0-3,7, got '٣'"),
        ("1-", "expected numbers and ranges such as 0-3,7, got '1-'"),
        ("1-2-3", "expected numbers and ranges such as 0-3,7, got '1-2-3'"),
    ],
)
def test_bands_that_cannot_be_dropped(text, sentence):
    with pytest.raises(UserError, match=f"^drop-bands: {sentence}"):
        data.parse_bands(text)


def test_label_conventions(tmp_path):
    def write(name, values):
        np.save(tmp_path / name, np.array(values))
        return str(tmp_path / name)

    size = (2, 3)
    binary = write("binary.npy", [[0, 255, 0], [255, 0, 0]])
    three = write("three.npy", [[0, 1, 2], [2, 1, 0]])
    unchanged = write("unchanged.npy", [[1, 0, 0], [0, 0, 1]])
    np.testing.assert_array_equal(data.load_labels(binary, size), [[0, 1, 0], [1, 0, 0]])
    np.testing.assert_array_equal(data.load_labels(three, size, values=(1, 2)), [[-1, 1, 0], [0, 1, -1]])
    np.testing.assert_array_equal(data.load_labels(binary, size, unchanged), [[0, 1, -1], [1, -1, 0]])
    with pytest.raises(UserError, match=r"holds the values 0, 1, 2: say which"):
        data.load_labels(three, size)
    with pytest.raises(UserError, match="2 pixels marked in both masks"):
        data.load_labels(binary, size, binary)
    with pytest.raises(UserError, match="labels: expected the size of the images, 3 x 3, got 2 x 3"):
        data.load_labels(binary, (3, 3))
    for values, what in (
        ([[0, 0, 0]] * 2, "changed pixels, got 0"),
        ([[1, 1, 0]] * 2, None),
        ([[1] * 3] * 2, "unchanged"),
    ):
        labels = data.load_labels(write("case.npy", values), size)
        if what is None:
            data.check_labels(labels)
        else:
            with pytest.raises(UserError, match=what):
                data.check_labels(labels)


@pytest.mark.parametrize("name", data.PRESETS)
def test_presets_find_their_files(tmp_path, name):
    needs("h5py", "scipy")
    from scipy.io import savemat

    with pytest.raises(UserError, match=f"preset: {name} expects"):
        data.preset_files(name, tmp_path)
    files = data.PRESETS[name][-1]
    rng = np.random.default_rng(0)
    contents = {}
    for source, shape in ((files.before, (6, 5, 3)), (files.after, (6, 5, 3)), (files.labels, (6, 5))):
        path, _, key = source.rpartition(":")
        values = rng.choice([files.changed, files.unchanged], shape) if len(shape) == 2 else rng.random(shape)
        contents.setdefault(path, {})[key] = values
    for path, arrays in contents.items():
        savemat(tmp_path / path, arrays)
    found = data.preset_files(name, tmp_path)
    before, after = data.load_pair(found.before, found.after)
    labels = data.load_labels(found.labels, before.shape[1:], values=(found.changed, found.unchanged))
    assert before.shape == after.shape == (3, 6, 5)
    assert set(np.unique(labels)) == {0, 1}


def test_difference_scales_by_the_joint_range(cube):
    a, b = pair(cube)
    x = data.difference(a, b).numpy()
    low = np.minimum(a.min((1, 2)), b.min((1, 2)))[:, None, None]
    high = np.maximum(a.max((1, 2)), b.max((1, 2)))[:, None, None]
    np.testing.assert_allclose(x, (a - low) / (high - low) - (b - low) / (high - low), atol=1e-6)
    assert x.min() >= -1 and x.max() <= 1


@pytest.mark.parametrize("border", data.BORDERS)
@pytest.mark.parametrize("size", [(7, 5), (1, 1), (1, 6)])
def test_border(border, size):
    image = torch.rand(2, *size)
    expected = np.pad(image.numpy(), ((0, 0), (2, 2), (2, 2)), mode=data.BORDERS[border])
    np.testing.assert_array_equal(data.pad_border(image, 2, border), expected)


# --- splits -----------------------------------------------------------------------------------------------------------


def test_random_split(small):
    split = data.split_pixels(small.labels, 0.1, 0, "random", 5)
    labels = torch.from_numpy(small.labels).flatten()
    for value in (0, 1):
        assert (labels[split.train] == value).sum() == max(1, round(0.1 * int((labels == value).sum())))
    both = torch.cat([split.train, split.test])
    assert len(both.unique()) == len(both) == int((labels >= 0).sum())
    again = data.split_pixels(small.labels, 0.1, 0, "random", 5)
    other = data.split_pixels(small.labels, 0.1, 1, "random", 5)
    assert torch.equal(split.train, again.train) and not torch.equal(split.train, other.train)


def test_block_split_shares_no_pixel():
    scene = generate_scene(64, 60, 2, seed=1)
    split = data.split_pixels(scene.labels, 0.1, 0, "block", 5, block=12)
    train, test = (torch.stack([part // 60, part % 60], 1) for part in (split.train, split.test))
    distance = (train[:, None] - test[None]).abs().amax(-1).min()
    assert distance >= 5, "two 5 x 5 patches share pixels when their centres are closer than 5 rows and columns"
    with pytest.raises(UserError, match="use a smaller --block-size than 12"):
        data.split_pixels(scene.labels, 0.9, 0, "block", 5, block=12)
    with pytest.raises(UserError, match="train-fraction: expected a number between 0 and 1"):
        data.split_pixels(scene.labels, 1.0, 0, "random", 5)


# --- the generated scene ----------------------------------------------------------------------------------------------


def test_generated_scene_follows_its_seed():
    first, again, other = (generate_scene(32, 40, 6, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.before, again.before)
    np.testing.assert_array_equal(first.after, again.after)
    np.testing.assert_array_equal(first.labels, again.labels)
    assert not np.array_equal(first.before, other.before)
    assert first.before.shape == (6, 32, 40) and first.before.dtype == np.float32
    data.check_pair(first.before, first.after)
    data.check_labels(first.labels)
    changed = (first.labels == 1).mean()
    assert 0.02 < changed < 0.4
    gap = np.abs(first.before - first.after / 0.88).mean(axis=0)  # the second date has 0.88 of the light
    assert gap[first.labels == 1].mean() > 1.5 * gap[first.labels == 0].mean()
    with pytest.raises(UserError, match="expected at least 16 x 16 pixels"):
        generate_scene(8, 8, 4)
