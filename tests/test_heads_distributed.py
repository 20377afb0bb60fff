"""HeadTuner in two processes: DDP gives the gradients of one process, FSDP2 is refused."""

import os
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pyml.heads import HeadTuner
from tests.heads_models import labelled, rows, tiny

HEADS = [(1, 0), (2, 1)]
BATCH = labelled(rows((7, 7, 7, 7)))
pytestmark = pytest.mark.skipif(sys.platform != "linux" or not dist.is_gloo_available(), reason="gloo is not available")


def tuned(heads=HEADS, projections=("q", "k", "v", "o"), **options):
    return HeadTuner(tiny("llama-gqa", torch.float32), heads, projections, verbose=False, **options)


def steps(tuner, model, batch):
    optimizer = tuner.optimizer(1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(tuner.parameters(), 1.0)
        optimizer.step()
    return {k: v.clone() for k, v in tuner.model.state_dict().items()}


def sharded(**options):
    """What a tuned model says to FSDP2, before any forward."""
    from torch.distributed.fsdp import fully_shard

    tuner = tuned(**options)
    try:
        for layer in tuner.adapter.layers:
            fully_shard(layer)
        fully_shard(tuner.model)
    except (ValueError, NotImplementedError) as error:
        return str(error)
    return "nothing"


def sharded_mlps():
    """What a tuner of whole MLPs says when FSDP2 has come: its optimizer, its loss, an optimizer of before."""
    from torch.distributed.fsdp import fully_shard

    tuner = tuned([], mlps=(1,))
    optimizer = tuner.optimizer(1e-2)
    fully_shard(tuner.model)
    told = []
    for call in (lambda: tuner.optimizer(1e-2), lambda: tuner.loss(BATCH)):
        try:
            call()
        except ValueError as error:
            told.append(str(error))
    optimizer.param_groups[0]["params"] = tuner.parameters()
    tuner.model(**BATCH, use_cache=False).loss.backward()
    before = [p.to_local().clone() for p in tuner.parameters()]
    try:
        optimizer.step()
    except ValueError as error:
        told.append(str(error))
    assert all(torch.equal(p.to_local(), old) for p, old in zip(tuner.parameters(), before))
    return told


def process(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    tuner = tuned()
    model = torch.nn.parallel.DistributedDataParallel(tuner.model)
    found = steps(tuner, model, {k: v[2 * rank : 2 * rank + 2] for k, v in BATCH.items()})
    cases = [{"projections": names} for names in (("q", "k", "v"), ("q", "o"), ("o",))]
    told = [sharded(**options) for options in (*cases, {"lora_rank": 2}, {"projections": ("o",), "lora_rank": 2})]
    told += sharded_mlps()
    with torch.no_grad():
        tuner.loss(BATCH)  # a score needs no other process
    try:
        tuner.loss(BATCH)
    except ValueError as error:
        told.append(str(error))
    torch.save((found, told), os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of both processes: the model after training under DDP, and the sentences of FSDP2."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(process, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def test_ddp_is_one_process(results):
    first, second = (found for found, _ in results)
    assert all(torch.equal(first[k], second[k]) for k in first)
    tuner = tuned()
    before = {k: v.clone() for k, v in tuner.model.state_dict().items()}
    alone = steps(tuner, tuner.model, BATCH)
    for k in alone:
        assert torch.allclose(first[k], alone[k], rtol=1e-4, atol=1e-6), k
    assert sum(int((first[k] != before[k]).sum()) for k in first) == tuner.report().trained


def test_fsdp2_is_refused_in_one_sentence(results):
    for _, told in results:
        for sentence in told[:5]:
            assert sentence.startswith("HeadTuner: model: expected a whole weight in each process")
            assert "FSDP2" in sentence and "\n" not in sentence
        rest = "params: expected a whole tensor in each process (DistributedDataParallel), got a DTensor, in shards"
        for op, sentence in zip(("SliceAdamW", "HeadTuner.loss", "SliceAdamW"), told[5:8], strict=True):
            assert sentence.startswith(f"{op}: {rest}")


def test_a_loss_whose_gradients_no_process_would_average_is_refused(results):
    for _, told in results:
        assert told[8:] == [
            "HeadTuner.loss: model: expected a call within DistributedDataParallel's forward (train on its own loss: "
            "wrapped(**batch).loss), got 2 processes and none"
        ]


def test_data_parallel_in_one_process_is_refused_before_a_forward():
    """torch asks each module for a copy of itself, of which there are several GPUs at least; here it is asked alone."""
    tuner = tuned()
    with pytest.raises(ValueError, match=r"HeadTuner: model: expected a process a GPU .* got nn\.DataParallel"):
        for module in tuner.model.modules():
            module._replicate_for_data_parallel()
    for module in tuner.detach().modules():
        assert type(module._replicate_for_data_parallel()) is type(module)
