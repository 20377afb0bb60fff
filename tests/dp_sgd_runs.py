"""What the tests of `pyml train dp_sgd` share: short runs on the digits, and the privacy in their checkpoints."""

from pyml.methods._checkpoint import load_checkpoint
from pyml.methods.dp_sgd import data
from pyml.methods.dp_sgd.train import Options, train

ONE = {"learning_rates": (2.0,), "clips": (0.2,)}  # no tuning
QUICK = {"epsilons": (3.0,), "delta": 1e-4, "epochs": 2, "seeds": 1, "momentum": 0.0}
CLIENTS = {"federated": 40, "delta": 1e-3, "client_share": 0.5, "learning_rates": (1.0,), "clips": (0.5,)}


def digits(seed=0):
    return data.split("digits", data.load_digits(), None, public=0.1, valid=0.15, test_share=0.2, seed=seed)


def run(task, folder, *, guide=None, resume=False, **options):
    made = Options(**{**QUICK, **ONE, **options})
    return train(task, made, folder, guide=guide, resume=resume, quiet=True, device="cpu")


def privacy_of(folder):
    """History and keys in a checkpoint."""
    checkpoint = load_checkpoint(folder / "checkpoint.safetensors")
    return checkpoint.info["privacy"], checkpoint.part("privacy")


def phases_of(folder):
    return [tuple(phase) for phase in privacy_of(folder)[0]["history"]["phases"]]
