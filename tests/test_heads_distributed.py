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


def tuned(projections=("q", "k", "v", "o")):
    return HeadTuner(tiny("llama-gqa", torch.float32), HEADS, projections, verbose=False)


def steps(tuner, model, batch):
    optimizer = tuner.optimizer(1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(tuner.parameters(), 1.0)
        optimizer.step()
    return {k: v.clone() for k, v in tuner.model.state_dict().items()}


def sharded(projections):
    """What FSDP2 says to a tuned model, or the model to FSDP2."""
    from torch.distributed.fsdp import fully_shard

    tuner = tuned(projections)
    try:
        for layer in tuner.adapter.layers:
            fully_shard(layer)
        fully_shard(tuner.model)
        tuner.model(**BATCH, use_cache=False)
    except (ValueError, NotImplementedError) as error:
        return str(error)
    return "nothing"


def process(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    tuner = tuned()
    model = torch.nn.parallel.DistributedDataParallel(tuner.model)
    found = steps(tuner, model, {k: v[2 * rank : 2 * rank + 2] for k, v in BATCH.items()})
    torch.save((found, [sharded(("q", "k", "v")), sharded(("q", "o"))]), os.path.join(folder, f"{rank}.pt"))
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
    for _, (rows_alone, with_columns) in results:
        assert "expected a view of the weight" in rows_alone and "\n" not in rows_alone
        assert "FSDP does not support non-contiguous parameters" in with_columns  # torch's own words
