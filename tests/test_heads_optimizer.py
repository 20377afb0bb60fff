"""SliceAdamW against torch's AdamW, transformers.Trainer, and the fused optimizer that must not meet strided slices."""

import copy

import pytest
import torch

from pyml.heads import HeadTuner, SliceAdamW
from tests.heads_models import labelled, rows, tiny

HEADS = [(1, 0), (2, 1), (2, 3)]
BATCH = labelled(rows((7, 5, 6)))


def tuned(dtype=torch.float32, name="llama-gqa"):
    return HeadTuner(tiny(name, dtype), HEADS, ("q", "k", "v", "o"), verbose=False)


def train(tuner, optimizer, steps=5, scheduler=None):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = tuner.loss(BATCH)
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_to_torch(dtype, foreach):
    options = {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    first, second = tuned(dtype), tuned(dtype)
    ours = first.optimizer(1e-2, **options)
    theirs = torch.optim.AdamW(second.parameters(), 1e-2, foreach=foreach, **options)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.7) for o in (ours, theirs)]
    losses = [train(*item) for item in ((first, ours, 5, schedules[0]), (second, theirs, 5, schedules[1]))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5 if dtype == torch.float32 else 1e-12)
    assert losses[0][-1] < losses[0][0]
    for a, b in zip(first.parameters(), second.parameters()):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7 if dtype == torch.float32 else 1e-14)


def test_a_saved_state_continues_bit_for_bit():
    first = tuned()
    optimizer = first.optimizer(1e-2)
    train(first, optimizer, 2)
    state, values = copy.deepcopy(optimizer.state_dict()), first.snapshot()
    train(first, optimizer, 3)
    second = tuned()
    second.restore(values)
    other = second.optimizer(5.0)
    other.load_state_dict(state)
    train(second, other, 3)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))


def test_parameters_without_a_gradient_wait():
    p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    a, b = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    ours, theirs = SliceAdamW([p, q], 0.1), torch.optim.AdamW([a, b], 0.1, weight_decay=0.0)
    for step in range(3):
        for optimizer, (x, y) in ((ours, (p, q)), (theirs, (a, b))):
            x.grad = torch.full((3,), float(step))
            y.grad = torch.ones(3) if step == 2 else None
            optimizer.step()
    assert torch.allclose(p, a) and torch.allclose(q, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_masters_keep_what_16_bits_round_away(dtype):
    """Steps below half an ulp are lost alone, and add up with a master."""
    ends = []
    for options in ({"master_weights": False}, {"master_weights": True}):
        p = torch.nn.Parameter(torch.full((4, 6), 4.0, dtype=dtype)[:, 1:3])
        optimizer = SliceAdamW([p], 5e-4, **options)
        for _ in range(80):
            p.grad = torch.ones_like(p)
            optimizer.step()
        ends.append(p.detach().float())
    assert (ends[0] == 4).all()
    assert torch.allclose(ends[1], torch.tensor(3.96), atol=2**-6 if dtype == torch.bfloat16 else 2e-3)
    state = optimizer.state[p]
    assert state["master"].dtype == torch.float32 and optimizer.state_bytes() == {"moments": 64, "masters": 32}
    other = SliceAdamW([torch.nn.Parameter(p.detach().clone())], 1e-3, master_weights=True)
    other.load_state_dict(optimizer.state_dict())
    (loaded,) = other.state.values()
    assert loaded["exp_avg"].dtype == torch.float32 and torch.equal(loaded["master"], state["master"])


def test_stochastic_rounding_is_right_on_average_and_repeats():
    def run(seed):
        p = torch.nn.Parameter(torch.full((64, 64), 4.0, dtype=torch.bfloat16))
        optimizer = SliceAdamW([p], 1e-3, stochastic_rounding=True, seed=seed)
        for _ in range(10):
            p.grad = torch.ones_like(p)
            optimizer.step()
        return p.detach().float()

    first = run(0)
    assert torch.equal(first, run(0)) and not torch.equal(first, run(1))
    assert float(first.mean()) == pytest.approx(3.99, abs=2e-3)


def test_the_key_of_the_rounding_is_made_once_for_a_device():
    p = torch.nn.Parameter(torch.full((8,), 4.0, dtype=torch.bfloat16))
    optimizer = SliceAdamW([p], 1e-3, stochastic_rounding=True, seed=3)
    first = optimizer._key(p.device)
    assert optimizer._key(p.device) is first and first.tolist() == [3]
    optimizer.seed = 4
    assert optimizer._key(p.device).tolist() == [4]
    other = copy.deepcopy(optimizer)
    other.load_state_dict(optimizer.state_dict())
    assert other._key(p.device).tolist() == [4]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"lr": -1.0}, "lr: expected a finite number"),
        ({"weight_decay": float("nan")}, "weight_decay: expected a finite number"),
        ({"betas": (0.9, 1.0)}, "betas: expected two numbers"),
        ({"master_weights": True, "stochastic_rounding": True}, "stochastic_rounding: expected False"),
    ],
)
def test_bad_options(options, sentence):
    with pytest.raises(ValueError, match=f"SliceAdamW: {sentence}"):
        SliceAdamW([torch.nn.Parameter(torch.ones(2))], **options)


# --- torch's fused AdamW ----------------------------------------------------------------------------------------------


def test_a_fused_optimizer_over_strided_slices_raises_before_it_writes():
    tuner = tuned()
    optimizer = torch.optim.AdamW(tuner.parameters(), 1e-2, fused=True)
    tuner.loss(BATCH).backward()
    before = {k: v.clone() for k, v in tuner.model.state_dict().items()}
    with pytest.raises(ValueError, match=r"HeadTuner: optimizer: expected HeadTuner.optimizer\(\) or fused=False"):
        optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in tuner.model.state_dict().items())


def test_a_fused_optimizer_over_rows_alone_is_fine():
    tuner = HeadTuner(tiny("llama", torch.float32), HEADS, ("q",), verbose=False)
    other = HeadTuner(tiny("llama", torch.float32), HEADS, ("q",), verbose=False)
    train(tuner, torch.optim.AdamW(tuner.parameters(), 1e-2, fused=True, weight_decay=0.0))
    train(other, other.optimizer(1e-2))
    for a, b in zip(tuner.parameters(), other.parameters()):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, i):
        return {k: v[i] for k, v in BATCH.items()}


def arguments(folder, **options):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="accelerate is not installed (pip install 'pyml[train]')")
    return transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=3, max_steps=2, report_to=[], use_cpu=True,
        weight_decay=0.1, disable_tqdm=True, lr_scheduler_type="constant", **{"save_strategy": "no", **options},
    )  # fmt: skip


def test_trainer_takes_the_optimizer(tmp_path):
    from transformers import Trainer

    tuner, other = tuned(), tuned()
    before = {k: v.clone() for k, v in tuner.model.state_dict().items()}
    trainer = Trainer(
        model=tuner.model, args=arguments(tmp_path, save_strategy="steps", save_steps=2), train_dataset=Rows(),
        optimizers=(tuner.optimizer(1e-2, weight_decay=0.1), None),
    )  # fmt: skip
    trainer.train()
    optimizer = other.optimizer(1e-2, weight_decay=0.1)
    other.model.train()
    for _ in range(2):
        optimizer.zero_grad()
        other.model(**BATCH, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        optimizer.step()
    for a, b in zip(tuner.parameters(), other.parameters()):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
    after = tuner.model.state_dict()
    assert sum(int((after[k] != before[k]).sum()) for k in after) == tuner.report().trained
    saved = type(tuner.model).from_pretrained(tmp_path / "checkpoint-2")  # whole, under the usual names
    assert saved.state_dict().keys() == before.keys()
    assert all(torch.equal(v, after[k]) for k, v in saved.state_dict().items())


def test_the_default_optimizer_of_trainer_raises(tmp_path):
    from transformers import Trainer

    tuner = tuned()
    trainer = Trainer(model=tuner.model, args=arguments(tmp_path, optim="adamw_torch_fused"), train_dataset=Rows())
    with pytest.raises(ValueError, match=r"optimizer: expected HeadTuner\.optimizer"):
        trainer.train()
