"""make_private: Opacus' gradients, Poisson batches, physical batches, several processes that are one."""

import math
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import nn
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

from pyml.nn import HeteroNoise
from pyml.optim import HeteroNoiseOptimizer, PoissonBatches, make_private
from pyml.privacy import epsilon

pytest.importorskip("opacus", reason="opacus is not installed (pip install 'pyml[privacy]')")
pytest.importorskip("cryptography", reason="cryptography is not installed (pip install 'pyml[privacy]')")
pytest.importorskip("dp_accounting", reason="dp-accounting is not installed (pip install 'pyml[privacy]')")

# Opacus' hooks see inputs that need no gradient: torch warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing", "ignore:grad and param do not obey")
RECORDS, BATCH = 24, 6


def network():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    made[0].weight = nn.Parameter(made[0].weight.detach().t().contiguous().t())  # parameters may have any layout
    return made


def records(count=RECORDS):
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(count, 6, generator=generator), torch.arange(count) % 3)


def private(model=None, inner=torch.optim.SGD, **named):
    model = model or network()
    loader = DataLoader(records(), batch_size=BATCH, shuffle=True)
    options = {"noise_multiplier": 0.8, "clip": 0.7, "seed": 4} | named
    if options.get("target_epsilon"):
        del options["noise_multiplier"]
    return make_private(model, inner(model.parameters(), lr=0.2), loader, **options)


def train(model, optimizer, batches):
    sizes = []
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        sizes.append(len(x))
    return sizes


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def close(a, b, tolerance=1e-6):
    return all(torch.allclose(x, y, rtol=0, atol=tolerance) for x, y in zip(weights(a), weights(b)))


def test_training_warns_of_nothing():
    with warnings.catch_warnings(record=True) as seen:
        warnings.resetwarnings()
        network = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        assert sum(train(*private(network))) > 0
    assert [str(one.message) for one in seen if issubclass(one.category, UserWarning)] == []


@pytest.mark.parametrize("mode", ["hooks", "functorch"])
def test_without_noise_it_is_opacus(mode):
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    x, y = records()[:9]
    ours, optimizer, _ = private(noise_multiplier=0.0, clip=0.3, grad_sample_mode=mode)
    theirs = GradSampleModule(network())
    other = DPOptimizer(
        torch.optim.SGD(theirs.parameters(), lr=0.2), noise_multiplier=0.0, max_grad_norm=0.3, expected_batch_size=BATCH
    )
    for _ in range(2):
        train(ours, optimizer, [(x, y)])
        train(theirs, other, [(x, y)])
        other.zero_grad()
    assert close(ours, theirs, 1e-5)  # Opacus adds 1e-6 to each norm
    assert not close(ours, network(), 1e-3)


def test_the_steps_of_the_benchmark_are_the_same_work(monkeypatch):
    from pyml.benchmarks.cases import dp_step
    from pyml.benchmarks.registry import Setup, load

    monkeypatch.setattr(dp_step, "NOISE", 0.0)
    monkeypatch.setattr(dp_step, "RATE", 1.0)
    made = load(["hetero_noise"]).find("DP-SGD step digits CNN, batch 64").setup(Setup())
    losses = {}
    for name, contender in made.items():
        call = contender.build(dp_step.STEP)
        losses[name] = torch.stack([call() for _ in range(4)])
    assert losses["pyml"][-1] < losses["pyml"][0] - 0.05
    torch.testing.assert_close(losses["pyml"], losses[dp_step.OPACUS], rtol=0, atol=2e-6)
    for other in (dp_step.SCALED, dp_step.BARE):  # other norms or none: the way differs, the first loss does not
        assert losses[other][0] == losses["pyml"][0] and losses[other][-1] != losses["pyml"][-1]


def test_the_loop_and_its_account():
    model, optimizer, loader = private(seed=None)
    sizes = [n for _ in range(3) for n in train(model, optimizer, loader)]
    assert len(sizes) == 3 * len(loader) == 12 and optimizer.steps == 12
    assert optimizer.history.phases == ((0.8, 0.25, 12),) and optimizer.divide_by == BATCH
    bound = optimizer.epsilon(1e-4)
    assert bound == epsilon(0.8, 0.25, 12, delta=1e-4, provenance="public") and bound.noise == "fast"


def test_the_noise_for_a_target():
    _, optimizer, loader = private(target_epsilon=2.0, delta=1e-4, epochs=3)
    for _ in range(3 * len(loader)):
        optimizer.empty_step()
    assert 1.98 < optimizer.epsilon(1e-4) <= 2.0


def test_batches_of_a_loader_that_is_kept_get_no_epsilon():
    model, optimizer, loader = private(poisson=False)
    assert train(model, optimizer, loader) == [BATCH] * 4
    assert optimizer.epsilon(1e-4) == math.inf


def test_poisson_batches():
    drawn = [i for _ in range(50) for batch in PoissonBatches(200, 0.1) for i in batch]
    assert abs(len(drawn) / (500 * 200) - 0.1) < 0.005 and set(drawn) == set(range(200))
    sizes = [len(batch) for _ in range(20) for batch in PoissonBatches(30, 0.02)]
    assert 0 in sizes and max(sizes) > 1, "empty batches are batches"
    key = bytes(range(32))
    whole = list(PoissonBatches(100, 0.3, key=lambda: key))
    assert len({tuple(batch) for batch in whole}) == len(whole) == 4
    parts = zip(*(PoissonBatches(100, 0.3, key=lambda: key, rank=r, world=3) for r in range(3)))
    assert [sorted(i for part in group for i in part) for group in parts] == whole
    assert all(i % 3 == 1 for batch in PoissonBatches(100, 0.3, rank=1, world=3) for i in batch)
    assert list(PoissonBatches(100, 0.3, key=lambda: key, start=lambda: 2))[:2] == whole[2:]
    for named, sentence in (((0, 0.5), "at least one record"), ((5, 0.0), "a rate above 0"), ((5, 2), "sample_rate")):
        with pytest.raises(ValueError, match=sentence):
            PoissonBatches(*named)


def test_empty_batches_of_the_loader():
    model, optimizer, loader = private()
    loader.batch_sampler.sample_rate = 0.01
    before = weights(model)
    sizes = train(model, optimizer, (batch for _, batch in zip(range(6), loader)))
    assert 0 in sizes and optimizer.steps == 6 and optimizer.bad == 0
    assert not any(torch.equal(a, b) for a, b in zip(weights(model), before))
    assert all(w.isfinite().all() for w in weights(model))


def test_physical_batches_are_the_batch():
    from opacus.utils.batch_memory_manager import BatchMemoryManager

    whole, optimizer, loader = private()
    sizes = train(whole, optimizer, loader)
    parts, other, loader = private()
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=other) as smaller:
        small = train(parts, other, smaller)
    assert max(small) == 2 < max(sizes) and sum(small) == sum(sizes)
    assert other.steps == optimizer.steps == 4 and close(whole, parts)


def test_a_loop_that_was_left_leaves_nothing_behind():
    from opacus.utils.batch_memory_manager import BatchMemoryManager

    model, optimizer, loader = private()
    with BatchMemoryManager(data_loader=loader, max_physical_batch_size=1, optimizer=optimizer) as smaller:
        train(model, optimizer, (batch for _, batch in zip(range(1), smaller)))
        assert optimizer.steps == 0
        train(model, optimizer, smaller)
    whole, other, loader = private()
    train(whole, other, loader)
    assert optimizer.steps == 4 and close(model, whole)


@pytest.mark.parametrize("seed", [4, None])
def test_a_resumed_run_repeats_the_run(tmp_path, seed):
    """Batches and noise: no two sums are ever released under one noise, with a key that nobody knows too."""
    model, optimizer, loader = private(inner=torch.optim.Adam, seed=seed, resume="repeat")
    train(model, optimizer, loader)
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "run.pt")
    train(model, optimizer, loader)
    other, resumed, loader = private(inner=torch.optim.Adam, seed=seed, resume="repeat")
    states = torch.load(tmp_path / "run.pt", weights_only=True)
    other.load_state_dict(states[0])
    resumed.load_state_dict(states[1])
    train(other, resumed, loader)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(other)))


def test_batches_under_secure_noise_do_not_come_again():
    loader = private(seed=None, secure=True)[2]
    assert loader.batch_sampler.key is None and list(loader.batch_sampler) != list(loader.batch_sampler)


def test_two_backward_passes_before_a_step_are_refused():
    model, _, _ = private()
    x, y = records()[:4]
    nn.functional.cross_entropy(model(x), y).backward()
    with pytest.raises(ValueError, match="not compatible with grad accumulation"):
        nn.functional.cross_entropy(model(x), y).backward()


def test_refusals():
    batch_norm = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5, affine=False))
    stranger = network()
    subset = DataLoader(records(), batch_size=3, sampler=SubsetRandomSampler([1, 2]))
    for build, sentence in (
        (lambda: private(grad_sample_mode="ew"), "grad_sample_mode: expected one of hooks, functorch, ghost"),
        (lambda: private(batch_norm), "model: expected no batch norm, which mixes samples, got BatchNorm1d '1'"),
        (lambda: private(noise_multiplier=None), "expected one of noise_multiplier and target_epsilon, got none"),
        (lambda: private(target_epsilon=1.0), "delta, epochs: expected numbers beside target_epsilon"),
        (lambda: private(inner=lambda p, lr: torch.optim.SGD(stranger.parameters(), lr)), "parameters of the model"),
        (lambda: private(scale=[torch.ones(2)] * 4), "provenance: expected where the scale comes from"),
        (lambda: make_private(stranger, torch.optim.SGD(stranger.parameters()), subset, clip=1.0, noise_multiplier=1.0),
         "loader: expected a loader of the whole data set, in order or shuffled, got SubsetRandomSampler"),
        (lambda: make_private(stranger, torch.optim.SGD(stranger.parameters()), DataLoader(records(), batch_size=None),
                              clip=1.0, noise_multiplier=1.0), "loader: expected one with a batch size"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=sentence):
            build()


def test_the_layer_has_a_place_in_a_private_model():
    model = nn.Sequential(nn.Linear(6, 5), HeteroNoise(0.1, torch.ones(5), seed=2), nn.Linear(5, 3))
    model, optimizer, loader = private(model)
    train(model, optimizer, loader)
    assert optimizer.steps == 4 and model._module[1].step == 4


# --- several processes ------------------------------------------------------------------------------------------------

WAYS = [
    {"scale": [(torch.linspace(0.5, 2, 5), torch.linspace(1, 2, 6)), 0.7, torch.linspace(0.3, 1, 15).view(3, 5), 1.5],
     "provenance": "public"},
    {"mode": "group", "clip": [0.5, 0.4], "groups": [0, 0, 1, 1], "global_clip": 0.6},
]  # fmt: skip


def one_rank(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    try:
        found = []
        for way in WAYS:
            model = network()
            with torch.no_grad():
                model[0].weight += rank  # the parameters of rank 0 count
            model, optimizer, loader = private(model, **way)
            sizes = [n for _ in range(2) for n in train(model, optimizer, loader)]
            found.append((weights(model), sizes, optimizer.steps))
        unseeded = private(seed=None)[1]
        found.append(unseeded.state_dict()["privacy"]["key"])
        try:
            private(seed=None, secure=True)
        except ValueError as error:
            found.append(str(error))
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    """The noise is the same, bit for bit; sums of gradients are added in another order."""
    processes.spawn(one_rank, (2, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for n, way in enumerate(WAYS):
        model, optimizer, loader = private(**way)
        sizes = [n for _ in range(2) for n in train(model, optimizer, loader)]
        (first, sizes_first, steps), (second, sizes_second, _) = ranks[0][n], ranks[1][n]
        assert all(torch.equal(a, b) for a, b in zip(first, second))
        assert [a + b for a, b in zip(sizes_first, sizes_second)] == sizes and steps == 8 and min(sizes_first) < BATCH
        assert all(torch.allclose(a, b, rtol=0, atol=2e-6) for a, b in zip(first, weights(model)))
    assert torch.equal(ranks[0][2], ranks[1][2]), "all use the key of rank 0"
    assert 'secure: expected mode "whitened" in one process' in ranks[0][3]


def test_the_shares_of_all_ranks_are_the_noise_once():
    params = [nn.Parameter(torch.zeros(shape)) for shape in ((5, 3), (1, 7), (), (0, 4), (8,))]
    optimizer = HeteroNoiseOptimizer(
        torch.optim.SGD(params, lr=1.0), noise_multiplier=1.0, clip=1.0, sample_rate=0.5, expected_batch_size=1
    )
    for world in (1, 2, 3, 9):
        counts = [torch.zeros(p.shape) for p in params]
        for rank in range(world):
            share = optimizer._scales.share(counts, rank, world)
            for t, i, offset in zip(share.tensors, share.ids, share.offsets):
                assert t.data_ptr() == counts[i].data_ptr() + 4 * offset
                t += 1
        assert all((c == 1).all() for c in counts)
