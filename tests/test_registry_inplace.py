"""The registry serves ops that write to lists of tensors, draw random numbers, or share a batch among arguments.

The generic tests run here on toy ops, right ones and wrong ones: a test that never fails proves nothing.
"""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

import pyml.ops
from pyml.ops import Capability
from pyml.ops._check import overlaps
from pyml.ops._registry import OPS, Op
from pyml.testing import Sample, check
from tests import test_ops, test_ops_inplace, test_ops_torch
from tests.op_helpers import DENSE_LAYOUTS, expanded

LIBRARY = torch.library.Library("pyml", "FRAGMENT")
CALLS = {"pair": 0}


# --- an op that adds seeded noise to a list of tensors, each of its own length ----------------------------------------


def _noise(t: Tensor, key: int, step: int, number: int) -> Tensor:
    """A counter-based toy generator: a fraction of a large multiple, element by element."""
    count = torch.arange(1, t.numel() + 1, dtype=torch.float64).view(t.shape)
    return (count * (0.6180339887 + 0.1 * key + 0.01 * step + 0.001 * number) * 7919).frac().to(t.dtype)


def _add_noise(tensors, scale, key, step):
    for n, t in enumerate(tensors):
        t.add_(_noise(t, key, step, n) * scale)


def _check_noise(tensors, scale, key, step) -> None:
    if not isinstance(tensors, (list, tuple)) or not all(isinstance(t, Tensor) for t in tensors):
        raise TypeError("toy_noise_: tensors: expected a list of tensors")


def _public_noise(tensors, scale, key, step, backend=None):
    """Adds noise."""
    return OPS["toy_noise_"](tensors, scale, key, step, backend=backend)


def _build(g):
    tensors = [torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((3, 4), (5, 2), (7,))]
    return {"tensors": tensors, "scale": 0.5, "key": 3, "step": 8}


# --- an op of two tensors that share a batch, and a status word ------------------------------------------------------


def _pair(q, k, shared):
    CALLS["pair"] += 1
    return torch.einsum("bij,bkj->bik", q, k) * shared, q.sum((1, 2)), torch.zeros(1, dtype=torch.int32)


def _pair_bwd(grad, q, k, shared, size, mask):
    CALLS["pair"] += 1
    wanted = (
        torch.einsum("bik,bkj->bij", grad, k) * shared,
        torch.einsum("bik,bij->bkj", grad, q) * shared,
        (torch.einsum("bij,bkj->bik", q, k) * grad).sum().reshape(1),
    )
    return tuple(w if want else w.new_empty(0) for w, want in zip(wanted, mask))


def _finish_pair(found, q, k, shared):
    pyml.ops._registry.read_status("toy_batch", found[2], "q: expected better")
    return found[0]


def _public_pair(q, k, shared, backend=None):
    """Products."""
    return OPS["toy_batch"](q, k, shared, backend=backend)


def _build_pair(g):
    q, k = (torch.randn(2, n, 3, generator=g, dtype=torch.float64) for n in (4, 5))
    return {"q": q, "k": k, "shared": torch.ones(1, dtype=torch.float64)}


@pytest.fixture(scope="module")
def toys():
    module = ModuleType("pyml.testing.toy")
    flags = {"tiny": True, "smooth": True}
    module.SAMPLES = {
        "toy_noise_": [Sample("three", _build, **flags)],
        "toy_batch": [Sample("two", _build_pair, **flags)],
    }
    sys.modules["pyml.testing.toy"] = module
    pyml.ops.toy_noise_, pyml.ops.toy_batch = _public_noise, _public_pair
    LIBRARY.define("toy_noise__fwd(Tensor(a!)[] tensors, float scale, int key, int step) -> ()")
    LIBRARY.impl("toy_noise__fwd", _add_noise, "CompositeExplicitAutograd")
    LIBRARY.define("toy_batch_fwd(Tensor q, Tensor k, Tensor shared) -> (Tensor, Tensor, Tensor)")
    LIBRARY.impl("toy_batch_fwd", _pair, "CompositeExplicitAutograd")
    LIBRARY.define(
        "toy_batch_bwd(Tensor grad, Tensor q, Tensor k, Tensor shared, Tensor size, bool[] mask)"
        " -> (Tensor, Tensor, Tensor)"
    )
    LIBRARY.impl("toy_batch_bwd", _pair_bwd, "CompositeExplicitAutograd")
    claims = {name: False for name in ("gradient", "double_backward", "vmap", "export", "autocast")}
    noise = Op(
        "toy_noise_", "toy", reference=_add_noise, check=_check_noise, fake=lambda *args: None, gradients=(),
        mutates=("tensors",), keys=("key", "step"), capability=Capability(**claims), has_cuda=False, has_triton=False,
    )  # fmt: skip
    batch = Op(
        "toy_batch", "toy", reference=lambda q, k, shared: torch.einsum("bij,bkj->bik", q, k) * shared,
        check=lambda q, k, shared: None,
        fake=lambda q, k, shared: (q.new_empty(q.shape[0], q.shape[1], k.shape[1]), q.new_empty(q.shape[0]),
                                   q.new_empty(1, dtype=torch.int32)),
        gradients=("q", "k", "shared"), saved=(1,), finish=lambda found, *args: (
            found if isinstance(found, Tensor) else _finish_pair(found, *args)
        ),
        composed=lambda q, k, shared, backend: torch.einsum("bij,bkj->bik", q, k) * shared,
        batched=("q", "k"), free_leading_dims=False, has_cuda=False, has_triton=False,
    )  # fmt: skip
    yield SimpleNamespace(noise=noise, batch=batch)
    for name in ("toy_noise_", "toy_batch"):
        del OPS[name]
        delattr(pyml.ops, name)
    del sys.modules["pyml.testing.toy"]


def test_an_op_that_writes_and_draws_passes_the_generic_tests(toys):
    op = toys.noise
    sample = sys.modules["pyml.testing.toy"].SAMPLES[op.name][0]
    for backend in ("reference", "cpp"):
        check(op, sample, backend, torch.float32, "cpu")
        for layout in DENSE_LAYOUTS:
            test_ops.test_memory_layout_changes_nothing(op, backend, layout, "cpu")
            test_ops_inplace.test_only_the_elements_are_written(op, backend, layout, "cpu")
        test_ops_inplace.test_the_layout_does_not_change_the_numbers(op, backend, "cpu")
        test_ops_inplace.test_elements_that_share_a_place_are_refused(op, backend, "cpu")
        test_ops_inplace.test_one_tensor_twice_is_refused(op, backend, "cpu")
        test_ops_inplace.test_the_key_alone_chooses_the_numbers(op, backend, "cpu")
        test_ops_inplace.test_compiles_with_its_writes(op, backend, "cpu")
    test_ops_inplace.test_autograd_sees_the_write(op, "cpp", "cpu")
    test_ops.test_bits(op, "cpp", sample, "cpu")
    test_ops_torch.test_opcheck(op, "cpp", sample, "cpu")


@pytest.mark.parametrize(
    ("wrong", "test", "arguments"),
    [
        ("add_torch_noise", test_ops_inplace.test_the_key_alone_chooses_the_numbers, ()),
        ("ignores_step", test_ops_inplace.test_the_key_alone_chooses_the_numbers, ()),
        ("writes_beside", test_ops_inplace.test_only_the_elements_are_written, (DENSE_LAYOUTS[0],)),
        ("does_nothing", test_ops_inplace.test_only_the_elements_are_written, (DENSE_LAYOUTS[0],)),
        ("by_memory_order", test_ops_inplace.test_the_layout_does_not_change_the_numbers, ()),
    ],
)
def test_the_generic_tests_find_a_wrong_op(toys, monkeypatch, wrong, test, arguments):
    def add_torch_noise(tensors, scale, key, step):
        for t in tensors:
            t.add_(torch.rand_like(t))

    def ignores_step(tensors, scale, key, step):
        _add_noise(tensors, scale, key, 0)

    def writes_beside(tensors, scale, key, step):
        for t in tensors:
            torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()).add_(1)

    def does_nothing(tensors, scale, key, step):
        pass

    def by_memory_order(tensors, scale, key, step):
        for t in tensors:
            t.add_(torch.empty_like(t).as_strided((t.numel(),), (1,)).copy_(torch.arange(t.numel())).as_strided(
                t.shape, torch.empty_like(t).stride()))  # fmt: skip

    monkeypatch.setitem(toys.noise.run, "cpp", locals()[wrong])
    with pytest.raises(AssertionError, match=r"toy_noise_|nothing happened"):
        test(toys.noise, "cpp", *arguments, "cpu")


def test_an_op_whose_arguments_share_a_batch_passes_the_generic_tests(toys):
    op = toys.batch
    for backend in ("reference", "cpp"):
        test_ops_torch.test_compiles_without_graph_break_or_recompile(op, backend, "cpu")
        test_ops_torch.test_exports(op, backend, "cpu")
        test_ops_torch.test_vmap(op, backend, "cpu")
        test_ops_torch.test_per_sample_gradients(op, backend, "cpu")
    test_ops_torch.test_second_derivatives_by_functional_transforms(op, "cpp", "cpu")
    test_ops_torch.test_opcheck(op, "cpp", sys.modules["pyml.testing.toy"].SAMPLES[op.name][0], "cpu")


def test_vmap_over_the_batch_is_one_call(toys):
    """Also where only one of the batched arguments is mapped, and backward; a shared argument takes one call a row."""
    op = toys.batch
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(6, 2, 4, 3, generator=g), torch.randn(2, 5, 3, generator=g)
    shared = torch.ones(1)

    def calls(run) -> int:
        CALLS["pair"] = 0
        run()
        return CALLS["pair"]

    assert calls(lambda: torch.vmap(op, in_dims=(0, None, None))(q, k, shared)) == 1
    assert calls(lambda: torch.vmap(op, in_dims=(0, None, None))(q, k[:1], shared)) == 1  # broadcast batch
    assert calls(lambda: torch.vmap(op, in_dims=(None, None, 0))(q[0], k, shared.expand(6, 1))) == 6

    def slope(q: Tensor) -> Tensor:
        return torch.func.grad(lambda q: op(q, k, shared).sin().sum())(q)

    assert calls(lambda: torch.vmap(slope)(q)) == 2
    torch.testing.assert_close(torch.vmap(slope)(q), torch.stack([slope(row) for row in q]))


def test_overlaps():
    t = torch.zeros(4, 6)
    for whole in (t, t.t(), t[:, ::2], t[1:], t[:0].expand(0, 6), t[:1], t[:, :1].t(), torch.zeros(())):
        assert not overlaps(whole)
    for shared in (expanded(t), t.view(-1).unfold(0, 5, 2), t.as_strided((3, 3), (1, 1))):
        assert overlaps(shared)
