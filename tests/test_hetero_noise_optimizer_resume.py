"""HeteroNoiseOptimizer: what a checkpoint goes on with, what it owes, and what may not share a key."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import nn

from pyml.privacy import History, dp
from tests.test_hetero_noise_optimizer import give, gradients, made, parameters

PRICE = dp(1.0, 1e-6)


def go_on(state, steps=2, **named):
    """Sums of zeros: what is left in the gradients is the noise."""
    params = parameters()
    optimizer = made(params, torch.optim.Adam(params), **{"seed": None, **named})
    optimizer.load_state_dict(state)
    found = []
    for _ in range(steps):
        optimizer.empty_step()
        found.append(torch.cat([p.grad.flatten() for p in params]))
    return optimizer, torch.stack(found)


def saved(steps=3, **named):
    params = parameters()
    optimizer = made(params, torch.optim.Adam(params), **{"seed": None, **named})
    for _ in range(steps):
        optimizer.empty_step()
    return copy.deepcopy(optimizer.state_dict())


def test_two_continuations_of_a_checkpoint_have_different_noise():
    state = saved()
    (first, one), (second, other) = go_on(state), go_on(state)
    assert not torch.isclose(one, other, rtol=1e-3).any(), "or the difference of two releases would be free of noise"
    assert first.batch_key() != second.batch_key() != bytes(state["privacy"]["batches"])
    assert first.steps == first.history.steps == 5, "the budget goes on"
    again = [go_on(state, resume="repeat")[1] for _ in range(2)]
    assert torch.equal(*again), "where the owner has said so"
    seeded = saved(seed=7)
    assert torch.equal(*(go_on(seeded, seed=7)[1] for _ in range(2))), "a seed is no secret"


@pytest.mark.parametrize("changed", [{"dropout": 0.5}, {"lr": 0.1}])
def test_other_sums_get_other_noise(changed):
    """The same key, with dropout or another rate, would release the difference of two sums."""
    pytest.importorskip("opacus", reason="opacus is not installed (pip install 'pyml[privacy]')")
    from pyml.optim import make_private
    from tests.test_hetero_noise_optimizer_private import records

    def run(state=None, lr=0.3, dropout=0.0):
        model = nn.Sequential(nn.Linear(6, 5), nn.Dropout(dropout), nn.Linear(5, 3))
        inner = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        loader = torch.utils.data.DataLoader(records(), batch_size=6)
        model, optimizer, loader = make_private(model, inner, loader, clip=0.1, noise_multiplier=50.0)
        if state is not None:
            optimizer.load_state_dict(state)
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        return optimizer, torch.cat([p.grad.flatten() for p in optimizer.params])

    state = run()[0].state_dict()
    (_, one), (_, other) = run(state), run(state, **changed)
    noise = 50 * 0.1 / 6
    assert 0.5 * noise < (one - other).std() / 2**0.5 < 2 * noise, "the difference has the noise of both"


def test_what_was_recorded_before_a_checkpoint_is_loaded_is_kept_and_counts_once():
    guide = History(provenance=dp(0.2, 1e-7))
    guide.record(1.5, 0.2, 40, total_variation=1e-20)
    params = parameters()
    first = made(params, seed=None)
    first.empty_step()
    without = first.state_dict()
    other = made(params, seed=None)
    other.history.include(guide)
    other.history.record(3.0, 0.1, 5)  # steps that somebody has seen
    other.load_state_dict(without)
    expected = ((0.7, 0.1, 1), (1.5, 0.2, 40), (3.0, 0.1, 5))
    assert other.history.phases == expected and other.history.total_variation == pytest.approx(40e-20)
    assert [p.kind for p in other.history.provenance] == ["public", "dp"]
    again = made(params, seed=None)
    again.history.include(guide)
    again.load_state_dict(other.state_dict())
    assert again.history.state_dict() == other.history.state_dict(), "the guide is in the checkpoint too"
    again.load_state_dict(again.state_dict())
    assert again.history.phases == expected
    twice = made(params, seed=None)
    twice.history.include(guide)
    twice.history.include(guide)
    twice.load_state_dict(other.state_dict())
    assert twice.history.phases[1] == (1.5, 0.2, 80), "two guides of one make are two"


def test_a_guide_of_the_same_multiplier_is_no_part_of_the_run():
    guide = History(provenance="public")
    guide.record(0.7, 0.1, 4)
    state = saved(steps=3)
    other = made(parameters(), torch.optim.Adam(parameters()), seed=None)
    other.history.include(guide)
    other.load_state_dict(state)
    assert other.history.phases == ((0.7, 0.1, 7),)


def test_another_scale_of_the_same_price_is_paid_for():
    def scaled(value, price=PRICE):
        params = parameters()
        return made(params, scale=[torch.full(p.shape, value) for p in params], provenance=price)

    state = scaled(1.0).state_dict()
    for value, price, kinds in ((1.0, PRICE, 1), (2.0, PRICE, 2), (1.0, dp(1.0, 1e-7), 2)):
        other = scaled(value, price)
        other.load_state_dict(state)
        assert len(other.history.provenance) == kinds
        other.load_state_dict(other.state_dict())
        assert len(other.history.provenance) == kinds
    several = scaled(1.0)
    several.set_scale([torch.full(p.shape, 3.0) for p in several.params], dp(1.0, 1e-6))
    several.set_scale(1.0)
    several.load_state_dict(state)
    assert [p.kind for p in several.history.provenance] == ["dp", "dp", "public"], "what was paid stays paid"


@pytest.mark.parametrize("released", ["step", "empty_step"])
def test_a_parameter_that_was_frozen_is_not_stepped_by_its_gradient(released):
    params = parameters()
    params[1].requires_grad_(False)
    optimizer = made(params)
    before = [p.detach().clone() for p in params]
    give([params[0], *params[2:]], gradients([params[0], *params[2:]]))
    params[1].requires_grad_(True)
    params[1].grad = torch.ones(5)
    with pytest.raises(ValueError, match=r"optimizer: expected gradients of the parameters .* of shape \[5\]"):
        getattr(optimizer, released)()
    assert all(torch.equal(a, b) for a, b in zip(params, before)) and optimizer.steps == optimizer.history.steps == 0
    params[1].grad = None
    optimizer.step()
    assert optimizer.steps == 1 and torch.equal(params[1], before[1])


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_copy_is_refused_and_breaks_nothing(way):
    params = parameters()
    optimizer = made(params)
    with pytest.raises(TypeError, match=r"copy: expected state_dict\(\) loaded by another optimizer"):
        way(optimizer)
    optimizer.empty_step()
    assert optimizer.steps == 1


def one_rank(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    try:
        found = []
        for resume in ("fresh", "repeat"):
            optimizer = made(parameters(), seed=None, resume=resume)
            optimizer.empty_step()
            state = copy.deepcopy(optimizer.state_dict())
            # one rank alone has another rule: the keys of all change
            for clip in (0.9, 0.9 - 0.1 * rank):
                other = made(parameters(), seed=None, resume=resume, clip=clip)
                other.load_state_dict(state)
                found.append(torch.stack([state["privacy"]["key"], other._key]))
        torch.save(torch.stack(found), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_several_processes_agree_on_new_keys(tmp_path):
    processes.spawn(one_rank, (2, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(first, second)
    assert [bool(torch.equal(*pair)) for pair in first] == [False, False, True, False]


def test_noise_does_not_come_again_for_sums_of_another_rule():
    state = made(parameters(), seed=None).state_dict()
    same = made(parameters(), seed=None, resume="repeat")
    same.load_state_dict(state)
    assert torch.equal(same._key, state["privacy"]["key"]) and same.batch_key() == bytes(state["privacy"]["batches"])
    for change in (
        {"clip": 0.4}, {"noise_multiplier": 0.9}, {"sample_rate": 0.2}, {"expected_batch_size": 9.0}, {"mode": "l2"},
        {"global_clip": 0.5}, {"clip": [0.5, 0.8], "groups": [0, 0, 1, 1]}, {"scale": 2.0, "provenance": "public"},
        {"inner": torch.optim.SGD(parameters(), lr=0.2)}, {"inner": torch.optim.Adagrad(parameters(), lr=0.3)},
        {"inner": torch.optim.SGD(parameters(), lr=0.3, momentum=0.9)}, {"resume": "fresh"},
    ):  # fmt: skip
        other = made(parameters(), seed=None, **{"resume": "repeat", **change})
        other.load_state_dict(state)
        privacy = other.state_dict()["privacy"]
        assert not torch.equal(privacy["key"], state["privacy"]["key"]), change
        assert not torch.equal(privacy["batches"], state["privacy"]["batches"]), change
    seeded = made(parameters()).state_dict()
    other = made(parameters(), clip=0.4, seed=5)
    other.load_state_dict(seeded)
    assert torch.equal(other._key, seeded["privacy"]["key"]), "a seed is the seed that was given"
