"""The lists of adamw_slices_: which slices may be together, and bad calls."""

import pytest
import torch
from torch import Tensor

from pyml.ops import OPS, adamw_slices_
from tests.conftest import INTERPRETED
from tests.test_head_update_ops import KEY, Adam

OP = OPS["adamw_slices_"]

# --- which slices may be together -------------------------------------------------------------------------------------


def empty_state(params: list[Tensor]) -> tuple[list[Tensor], ...]:
    return tuple([torch.zeros(p.shape) for p in params] for _ in range(3))


EVERY = [
    "reference", "cpp",
    pytest.param("triton", marks=pytest.mark.skipif(not INTERPRETED, reason="Triton runs on a CPU interpreted alone")),
]  # fmt: skip


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize(
    "choose",
    [
        lambda w: [w[:, :8], w[:, 7:12]],
        lambda w: [w[2:4], w[:, 3:5]],
        lambda w: [w[:, 4:], w.t()[:5]],
        lambda w: [w[1:3], w[2:9]],
        lambda w: [w.flatten()[5:40], w[0]],
    ],
)
def test_slices_that_share_elements_are_refused(choose, backend):
    """Threads would meet there. Nothing is written before the refusal."""
    w = torch.ones(12, 12)
    params = choose(w)
    grads, m, v = empty_state(params)
    with pytest.raises(ValueError, match="adamw_slices_: params: expected slices whose elements are no others' too"):
        adamw_slices_(params, grads, m, v, step=1, lr=0.1, weight_decay=0.1, backend=backend)
    assert (w == 1).all()


@pytest.mark.parametrize("backend", EVERY)
def test_state_and_gradients_lie_apart(backend):
    p, g, m, v = (torch.ones(4, 6) for _ in range(4))
    if backend != "reference":
        both = r"got (exp_avgs\[0\] and exp_avg_sqs|exp_avg_sqs\[0\] and exp_avgs)\[0\]"
        with pytest.raises(ValueError, match=both):
            adamw_slices_([p], [g], [m], [m.view(4, 6)], step=1, lr=0.1, backend=backend)
    for grad, second in ((g, m.view(4, 6)), (p.view(4, 6), v)):
        with pytest.raises(ValueError, match="no others' too"):
            adamw_slices_([p], [grad], [m], [second], step=1, lr=0.1, backend=backend)
    assert all((t == 1).all() for t in (p, g, m, v))
    adamw_slices_([p[:2], p[2:]], [g[0].expand(2, 6)] * 2, [m[:2], m[2:]], [v[:2], v[2:]], step=1, lr=0.1)
    assert (p != 1).all()  # gradients may share memory


def test_all_heads_of_a_projection_at_once(kernel):
    """Columns side by side reach over each other's places in memory, and share none."""
    w = torch.randn(10, 24)
    other = w.clone()
    grad = torch.randn(10, 24)
    heads = [w[:, n : n + 4] for n in range(0, 24, 4)]
    adam, whole = Adam(heads, lr=0.1), Adam([other], lr=0.1)
    adam.step([grad[:, n : n + 4] for n in range(0, 24, 4)])
    whole.step([grad])
    assert torch.equal(w, other)


def test_an_empty_list_is_nothing_to_do():
    adamw_slices_([], [], [], [], step=1, lr=0.1)
    with pytest.raises(ValueError, match="adamw_slices_: grads: expected 0 tensors, got 1"):
        adamw_slices_([], [torch.ones(1)], [], [], step=1, lr=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 0}, "adamw_slices_: step: expected the number of this step, from 1 on, got 0"),
        ({"lr": -0.1}, "adamw_slices_: lr: expected a finite number of at least 0, got -0.1"),
        ({"betas": (0.9, 1.0)}, r"adamw_slices_: betas: expected two numbers in \[0, 1\), got 1.0"),
        ({"betas": (0.9,)}, r"adamw_slices_: betas: expected two numbers in \[0, 1\), got \(0.9,\)"),
        ({"grads": [torch.ones(3)]}, r"adamw_slices_: grads\[0\]: expected shape of its parameter = \[10\], got \[3\]"),
        ({"masters": [torch.ones(10)], "key": KEY}, "adamw_slices_: key: expected None beside masters"),
        ({"key": torch.ones(1)}, "adamw_slices_: key: expected an int64 tensor, got torch.float32"),
        ({"ids": [-1]}, r"adamw_slices_: ids\[0\]: expected an integer in \[0, 2\^32\), got -1"),
        ({"exp_avgs": []}, "adamw_slices_: exp_avgs: expected 1 tensors, got 0"),
    ],
)
def test_bad_calls_change_nothing(change, message):
    tensors = {name: [torch.ones(10)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    with pytest.raises((ValueError, TypeError), match=message):
        adamw_slices_(**{**tensors, "step": 1, "lr": 0.1, **change})
    assert all((t[0] == 1).all() for t in tensors.values())


@pytest.mark.kernels
def test_the_torch_op_checks_its_lists_itself(kernel):
    """The public function leaves them to it. What is refused counts as no write, for autograd."""
    op = getattr(torch.ops.pyml, "adamw_slices__fwd" + ("_triton" if kernel == "triton" else ""))
    p, g, m, v = ([torch.ones(n, 3) for n in (2, 0, 4)] for _ in range(4))
    twice = [v[0], v[1], v[1]]
    leaf = [t.clone().requires_grad_() for t in p]
    for change, message in (
        ({"params": [p[0], p[1], p[2][:1]]}, "shape"),
        ({"exp_avgs": [m[0], m[1], m[0][:1].expand(4, 3)]}, "exp_avgs.*: expected elements with places of their own"),
        ({"exp_avg_sqs": twice, "params": [p[0], p[1], p[1]], "grads": [g[0], g[1], g[1]],
          "exp_avgs": [m[0], m[1], m[1]]}, "expected tensors that differ"),
        ({"params": leaf}, "params.*: expected a tensor without requires_grad"),
        ({"ids": [3, 1, 3]}, "ids: expected"),
        ({"grads": g[:2]}, "grads: expected 3 tensors, got 2"),
        ({"params": [], "grads": g}, "grads: expected 0 tensors, got 3"),
    ):  # fmt: skip
        lists = {"params": p, "grads": g, "exp_avgs": m, "exp_avg_sqs": v, "ids": None} | change
        versions = [t._version for name in ("params", "exp_avgs", "exp_avg_sqs") for t in lists[name]]
        with pytest.raises(ValueError, match=f"adamw_slices_: .*{message}"):
            op(*(lists[n] for n in ("params", "grads", "exp_avgs", "exp_avg_sqs")), 1, 0.1, [0.9, 0.999], 1e-8, 0.1, [],
               None, lists["ids"])  # fmt: skip
        assert versions == [t._version for name in ("params", "exp_avgs", "exp_avg_sqs") for t in lists[name]]
    assert all((t == 1).all() for t in (*p, *g, *m, *v, *leaf))
    op(p, g, m, v, 1, 0.1, [0.9, 0.999], 1e-8, 0.1, [], None, [3, 3, 1])  # an empty slice takes no words
    assert [t._version for t in (p[0], p[2], m[0], v[2], g[0])] == [1, 1, 1, 1, 0]
