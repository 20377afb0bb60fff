"""Images of digits in four parts: private, public, validation and test."""

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyml.methods import UserError, first_line
from pyml.methods._checkpoint import checksum

SIDES = (4, 64)  # of an image
LEAST = 100  # private records
LONGEST = 2**31  # bytes of an idx file


@dataclass(frozen=True)
class Records:
    """Images ``[N, 1, R, R]``, float32 in 0..1, and their labels ``[N]``."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, chosen: Tensor) -> "Records":
        return Records(self.images[chosen], self.labels[chosen])

    def to(self, device: torch.device) -> "Records":
        return Records(self.images.to(device), self.labels.to(device))

    def parts(self, size: int) -> Iterator["Records"]:
        for chosen in torch.arange(len(self)).split(size):
            yield self.take(chosen)


@dataclass(frozen=True)
class Task:
    """Only ``private`` is what epsilon speaks of. No part of the data is used to scale the images.

    ``source`` is a fingerprint of all records, however they are split. Like `facts` it is made of private records
    without noise, so it stays in the run folder: whoever knows all records but one could tell what that one is.
    """

    name: str
    source: str
    private: Records
    public: Records
    valid: Records
    test: Records

    @property
    def side(self) -> int:
        return self.private.images.shape[-1]

    @property
    def classes(self) -> int:
        """By the parts that are not private: released models tell it."""
        return 1 + max(int(part.labels.max()) for part in self._parts()[1:] if len(part))

    def _parts(self) -> tuple[Records, ...]:
        return self.private, self.public, self.valid, self.test

    def facts(self) -> dict[str, object]:
        """What identifies the data of a run."""
        counts = dict(zip(("private", "public", "validation", "test"), map(len, self._parts())))
        parts = [t for part in self._parts() for t in (part.images, part.labels)]
        return {"data": self.name, "side": self.side, "classes": self.classes, "records": counts,
                "data_checksum": checksum(parts), "source": self.source,
                "private_checksum": self.private_checksum}  # fmt: skip

    @property
    def private_checksum(self) -> str:
        """A fingerprint of the records that epsilon speaks of, in their order: clients are drawn from it."""
        return checksum((self.private.images, self.private.labels))


def split(
    name: str, records: Records, test: Records | None, *, public: float, valid: float, test_share: float, seed: int
) -> Task:
    """Draw the parts by a seed, the same for all arms and seeds of training; the private part is what is left."""
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed))
    shares = (public, valid, 0.0 if test is not None else test_share)
    counts = [round(len(records) * share) for share in shares]
    left = len(records) - sum(counts)
    if left < LEAST:
        raise UserError(f"data: expected at least {LEAST} private records, got {left} of {len(records)}")
    public_part, valid_part, test_part, private = (records.take(part) for part in order.split([*counts, left]))
    for label, part in (("validation", valid_part), ("test", test or test_part)):
        if not len(part):
            raise UserError(f"data: expected at least one {label} record, got none of {len(records)}")
    source = checksum((records.images, records.labels))
    task = Task(name, source, private, public_part, valid_part, test or test_part)
    if int(private.labels.max()) >= task.classes:
        expected = f"private labels below {task.classes}, as the other parts have no more classes"
        raise UserError(f"data: expected {expected}, got {int(private.labels.max())}")
    return task


def load_digits() -> Records:
    """scikit-learn's 1797 images of 8 x 8."""
    from sklearn import datasets

    found = datasets.load_digits()
    images = torch.from_numpy(found.images).to(torch.float32).unsqueeze(1) / 16
    return Records(images, torch.from_numpy(found.target).to(torch.int64))


def load_idx_folder(folder: Path) -> tuple[Records, Records]:
    """Training and test records of MNIST's four idx files, gzipped or not."""
    if not folder.is_dir():
        raise UserError(f"data: expected a folder with MNIST's idx files, got {folder}")
    train, test = (_records(folder, name) for name in ("train", "t10k"))
    if train.images.shape[1:] != test.images.shape[1:]:
        sizes = f"{list(train.images.shape[2:])} and {list(test.images.shape[2:])}"
        raise UserError(f"data: expected training and test images of one size, got {sizes}")
    return train, test


def _records(folder: Path, name: str) -> Records:
    images = read_images(_file(folder, f"{name}-images-idx3-ubyte"), "data")
    labels = torch.from_numpy(read_idx(_file(folder, f"{name}-labels-idx1-ubyte"), 1, "data")).to(torch.int64)
    if len(images) != len(labels):
        raise UserError(f"data: expected as many {name} labels as images, {len(images)}, got {len(labels)}")
    return Records(images, labels)


def _file(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise UserError(f"data: no file {name} or {name}.gz in {folder}")


def read_images(path: Path, name: str) -> Tensor:
    """Images of an idx file, float32 ``[N, 1, R, R]`` in 0..1. ``name`` is the option that gave it."""
    bytes_ = read_idx(path, 3, name)
    count, height, width = bytes_.shape
    if height != width or not SIDES[0] <= height <= SIDES[1] or not count:
        expected = f"at least one square image with sides from {SIDES[0]} to {SIDES[1]}"
        raise UserError(f"{name}: expected {expected} in {path}, got {count} of {height} x {width}")
    return torch.from_numpy(bytes_).unsqueeze(1).to(torch.float32) / 255


def read_idx(path: Path, dims: int, name: str) -> np.ndarray:
    """An idx file of unsigned bytes, gzipped where its name ends in .gz. ``name`` is the option that gave it.

    Raises:
        UserError: no such file, broken, another type or number of dimensions, another length than its header says.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(4 + 4 * dims)
            if len(head) < 4 + 4 * dims or head[:4] != bytes((0, 0, 8, dims)):
                raise UserError(f"{name}: expected an idx file of unsigned bytes with {dims} dimensions, got {path}")
            sizes = [int.from_bytes(head[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims)]
            count = int(np.prod([np.float64(size) for size in sizes]))
            if count > LONGEST:
                raise UserError(f"{name}: expected at most {LONGEST} values in {path}, got a header of {count}")
            body = file.read(count + 1)  # one more than there should be: a longer file is wrong too
    except (OSError, EOFError, zlib.error) as error:
        reason = (isinstance(error, OSError) and error.strerror) or first_line(error)
        raise UserError(f"{name}: {path} cannot be read ({reason})") from error
    if len(body) != count:
        got = f"more than {count}" if len(body) > count else str(len(body))
        raise UserError(f"{name}: expected {count} values after the header of {path}, got {got}")
    return np.frombuffer(bytearray(body), np.uint8).reshape(sizes)
