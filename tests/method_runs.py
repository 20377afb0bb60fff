"""What the tests of every method do with training runs: read what was learned, kill, resume, start processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pyml.methods._checkpoint import load_checkpoint

ROOT = Path(__file__).parents[1]
TRAINING = ("accelerate", "matplotlib", "PIL", "safetensors", "tensorboard", "torchmetrics")


def needs(*packages):
    """Skip the test that calls this, or the file whose top does, where a package of the extra [train] is missing."""
    for name in packages:
        pytest.importorskip(name, reason=f"{name} is not installed (pip install 'pyml[train]')")


def learned(folder):
    """Every tensor of a checkpoint but the states of the random generators."""
    tensors = load_checkpoint(folder / "checkpoint.safetensors").tensors
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("rng.")}


def assert_same_bits(first, second):
    """Two results of `learned` are equal."""
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def wait_for_rows(log, rows, process, seconds=180):
    """Until a run has logged more than so many lines."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if log.exists() and log.read_text().count("\n") > rows:
            return
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    raise AssertionError(f"{log} has not reached {rows} rows")


def kill_and_resume(command, out, arch, rows):
    """Run ``command(out)``, kill it in its second seed after so many lines of its log, let ``--resume`` end it.

    Returns:
        The epoch of the checkpoint that the kill left.
    """
    second = out / arch / "seed1"
    process = subprocess.Popen([sys.executable, *command(out)], cwd=ROOT)
    try:
        wait_for_rows(second / "log.csv", rows, process)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (out / "metrics.json").exists()
    reached = load_checkpoint(second / "checkpoint.safetensors").info["epoch"]
    subprocess.run([sys.executable, *command(out, "--resume")], check=True, cwd=ROOT)
    return reached


def assert_same_runs(whole, resumed, arch, files=()):
    """Two runs of two seeds learned the same, bit for bit, and logged the same; so are the files named."""
    for seed in ("seed0", "seed1"):
        one, two = (folder / arch / seed for folder in (whole, resumed))
        assert_same_bits(learned(one), learned(two))
        for name in ("log.csv", *files):
            assert (one / name).read_bytes() == (two / name).read_bytes(), name


def launch(launcher, command):
    """Run a command under ``python -m <launcher>``, one thread a process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", *launcher, *command], check=True, cwd=ROOT, env=environment, timeout=300)


TWO_PROCESSES = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# By number of processes: accelerate starts several only on GPUs or by MPI.
LAUNCHERS = {
    1: ("accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no",
        "--dynamo_backend", "no"),
    2: TWO_PROCESSES,
}  # fmt: skip
