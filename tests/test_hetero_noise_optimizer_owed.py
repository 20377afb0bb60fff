"""HeteroNoiseOptimizer: what loading a checkpoint owes for other runs, and what keys and reports it goes on with."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from pyml.privacy import History, dp
from tests.test_hetero_noise_optimizer import made, parameters

PHASE = (0.7, 0.1)


def fresh(steps=0, state=None, **named):
    optimizer = made(parameters(), seed=None, **named)
    if state is not None:
        optimizer.load_state_dict(copy.deepcopy(state))
    for _ in range(steps):
        optimizer.empty_step()
    return optimizer


def run_of(guide, **named):
    optimizer = fresh(**named)
    optimizer.history.include(guide)
    for _ in range(3):
        optimizer.empty_step()
    return optimizer


def test_another_guide_of_the_same_settings_is_another_guide():
    guide = fresh(20, scale=2.0, provenance=dp(0.5, 1e-6)).history
    state = run_of(guide).state_dict()
    for other, steps, prices in ((guide, 23, 1), (fresh(20, scale=2.0, provenance=dp(0.5, 1e-6)).history, 43, 2)):
        optimizer = fresh()
        optimizer.history.include(other)
        optimizer.load_state_dict(state)
        assert optimizer.history.phases == ((*PHASE, steps),)
        assert sum(p.kind == "dp" for p in optimizer.history.provenance) == prices


def test_a_guide_that_went_on_is_one_guide():
    """In another process, from its own checkpoint, and under new keys."""
    guide = fresh(20)
    state, saved = run_of(guide.history).state_dict(), guide.state_dict()
    longer = fresh(5, saved)
    optimizer = fresh()
    optimizer.history.include(longer.history)
    optimizer.load_state_dict(state)
    assert optimizer.history.phases == ((*PHASE, 28),)


@pytest.mark.parametrize("resume", ["fresh", "repeat"])
def test_steps_recorded_by_hand_are_no_steps_of_the_run(resume):
    early = fresh().state_dict()
    run = fresh(10, early, resume="repeat")
    late = run.state_dict()
    other = fresh(state=early, resume=resume)
    other.history.record(*PHASE, 5)
    saved = copy.deepcopy(other.state_dict())
    other.load_state_dict(late)
    assert other.steps == 10 and other.history.phases == ((*PHASE, 15),)
    again = fresh(state=saved, resume=resume)
    again.load_state_dict(saved)
    assert again.history.phases == ((*PHASE, 5),), "they are in the checkpoint too"


def test_a_checkpoint_may_be_loaded_again_before_a_step():
    state, later = fresh(3).state_dict(), fresh(4).state_dict()
    optimizer = fresh()
    keys = []
    for one in (state, state, later, state):
        optimizer.load_state_dict(one)
        keys.append(int(optimizer._key))
    assert len(set(keys)) == 4 and optimizer.steps == 3
    optimizer.empty_step()
    for one in (state, later):
        with pytest.raises(ValueError, match=r"of the state: expected (at least 4|that of this run, which has taken)"):
            optimizer.load_state_dict(one)
    twice = fresh(state=state)
    twice.load_state_dict(state)
    assert twice.history.steps == 3


def test_noise_does_not_come_again_under_another_scale():
    """One that `set_scale` gave before the checkpoint, and that nobody gave after it."""

    def scales(value):
        return [torch.full(p.shape, value) for p in parameters()]

    run = fresh(resume="repeat")
    run.set_scale(scales(2.0), "public")
    run.empty_step()
    state = run.state_dict()
    forgotten = fresh(state=state, resume="repeat")
    assert torch.equal(forgotten._key, run._key)
    forgotten.empty_step()
    assert not torch.equal(forgotten._key, run._key) and forgotten.batch_key() != run.batch_key()
    for value, before in ((2.0, True), (2.0, False), (3.0, False)):  # the last one as the run did after its checkpoint
        same = fresh(resume="repeat")
        if before:
            same.set_scale(scales(value), "public")
        same.load_state_dict(state)
        if not before:
            same.set_scale(scales(value), "public")
        same.empty_step()
        assert torch.equal(same._key, run._key)
    plain = fresh(1)
    same = fresh(2, plain.state_dict(), resume="repeat")
    assert torch.equal(same._key, plain._key)


def test_batches_begin_with_the_keys_of_all_their_steps():
    """The batch of a step that was released may not come again under other noise."""
    pytest.importorskip("opacus", reason="opacus is not installed (pip install 'pyml[privacy]')")
    from tests.test_hetero_noise_optimizer_private import private

    def drawn(optimizer, loader):
        found = [y.tolist() for _, y in loader]
        return found, optimizer.batch_key()

    _, run, loader = private(seed=None, resume="repeat")
    scale = [torch.full(p.shape, 2.0) for p in run.params]
    run.set_scale(scale, "public")
    expected = drawn(run, loader)
    state = run.state_dict()
    for known in (True, False):
        _, other, again = private(seed=None, resume="repeat")
        other.load_state_dict(state)
        if known:
            other.set_scale(scale, "public")
        found = drawn(other, again)
        assert (found == expected) == known and (found[1] == expected[1]) == known


def test_a_report_is_of_the_clip_that_is_in_use():
    pytest.importorskip("dp_accounting", reason="dp-accounting is not installed (pip install 'pyml[privacy]')")
    run = fresh(1)
    run.history.facts["note"] = "first"
    other = fresh(clip=5.0, scale=2.0, provenance="public", state=run.state_dict())
    facts = other.history.facts
    assert facts["clip"] == 5.0 and facts["note"] == "first"
    assert facts["scale"] == "1 everywhere", "of all steps so far"
    other.empty_step()
    assert facts["scale"].startswith("given: min 2") and other.history.report(1e-5).count("clip: 5.0") == 1


def one_rank(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    try:
        optimizer = fresh(2)
        optimizer.history.record(*PHASE, 5)
        if rank == 0:
            torch.save(optimizer.state_dict(), f"{folder}/state.pt")
        dist.barrier()
        state = torch.load(f"{folder}/state.pt", weights_only=True)
        broken = {**state, "privacy": {**state["privacy"], "noise": "secure"}}
        try:
            optimizer.load_state_dict(broken if rank else state)
        except ValueError as error:
            message = str(error)
        optimizer.load_state_dict(state)
        torch.save((message, optimizer.history.phases, optimizer.steps), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_the_checkpoint_of_one_process_is_that_of_all(tmp_path):
    processes.spawn(one_rank, (2, str(tmp_path)), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert "state: expected one that every process can load, got an error in another process" in found[0][0]
    assert "noise of the state: expected 'fast', got 'secure'" in found[1][0]
    assert all(phases == ((*PHASE, 7),) and steps == 2 for _, phases, steps in found)


def test_a_history_of_before_is_added():
    guide = History(provenance="public")
    guide.record(*PHASE, 4)
    state = copy.deepcopy(run_of(guide).state_dict())
    del state["privacy"]["history"]["recorded"]
    optimizer = fresh()
    optimizer.history.include(guide)
    optimizer.load_state_dict(state)
    assert optimizer.history.phases == ((*PHASE, 11),)
