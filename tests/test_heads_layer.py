"""HeadLinear: slices stay views of the weight whatever is done to the module."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyml.nn.head_update import HeadLinear, HeadLora

CASES = {"rows": (0, False), "columns": (1, False), "rows-transposed": (0, True), "columns-transposed": (1, True)}


class Conv1D(nn.Module):
    """GPT-2's layer: the weight is [in, out]."""

    def __init__(self, linear):
        super().__init__()
        self.nf, self.nx = linear.out_features, linear.in_features
        self.weight, self.bias = nn.Parameter(linear.weight.detach().t().contiguous()), linear.bias

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], self.nf)


def layer(case="rows", dtype=torch.float64, **options):
    dim, transposed = CASES[case]
    torch.manual_seed(0)
    linear = nn.Linear(12, 8, dtype=dtype) if dim == 0 else nn.Linear(8, 12, dtype=dtype)
    plain = Conv1D(linear) if transposed else linear
    return HeadLinear(plain, [3, 1], 2, dim, transposed=transposed, **options)


def assert_tied(module):
    """A step on the slices is a step of the weight, and of nothing else in it."""
    old = module.weight.detach().clone()
    with torch.no_grad():
        for p in module.slices.all():
            p.add_(1)
    expected = torch.zeros_like(old)
    view = expected.t() if module.transposed else expected
    for block in module.blocks:
        view.narrow(module.dim, block * module.size, module.size).fill_(1)
    assert torch.equal(module.weight.detach(), old + expected)
    assert all(p.requires_grad for p in module.slices.all())
    x = torch.ones(1, module.in_features, dtype=module.weight.dtype)
    assert torch.equal(module(x), F.linear(x, module.linear_weight(), module.bias))


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradients_are_those_of_the_whole_weight(case):
    module = layer(case, scales=[1.0, 2.5])
    x = torch.randn(3, 5, module.in_features, dtype=torch.float64, requires_grad=True)
    weight = module.linear_weight().detach().clone().requires_grad_()
    y, expected = module(x), F.linear(x, weight, module.bias)
    assert torch.equal(y, expected)
    (dx, *slices) = torch.autograd.grad(y.sin().sum(), [x, *module.slices.all()])
    (dx2, dw) = torch.autograd.grad(expected.sin().sum(), [x, weight])
    assert torch.allclose(dx, dx2, rtol=0, atol=1e-14)
    for grad, block, scale in zip(slices, (3, 1), (1.0, 2.5)):
        assert torch.allclose(grad, scale * dw.narrow(module.dim, 2 * block, 2), rtol=0, atol=1e-13)
    assert module.weight.grad is None


def reload_assigned(module):
    other = layer(CASE_OF[module.dim, module.transposed], dtype=module.weight.dtype)
    other.load_state_dict(module.state_dict(), assign=True)
    return other


def torch_saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


CASE_OF = {value: name for name, value in CASES.items()}
MOVES = {
    "to": lambda m: m.to("cpu"),
    "float": lambda m: m.float(),
    "bfloat16": lambda m: m.bfloat16(),
    "twice": lambda m: m.float().double(),
    "meta": lambda m: m.to("meta").to_empty(device="cpu"),
    "deepcopy": copy.deepcopy,
    "deepcopy of a moved one": lambda m: copy.deepcopy(m.float()),
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": torch_saved,
    "load_state_dict": lambda m: (m.load_state_dict(m.state_dict()), m)[1],
    "load_state_dict assign": reload_assigned,
    "share_memory": lambda m: m.share_memory(),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("case", CASES)
def test_slices_stay_views(case, move):
    module = layer(case)
    before = module.slices.all()
    module(torch.randn(2, module.in_features, dtype=torch.float64)).sum().backward()
    moved = MOVES[move](module)
    if move == "meta":
        moved.weight.data.zero_()
        moved.bias.data.zero_()
    assert_tied(moved)
    if moved is module and move != "meta":  # optimizers hold the parameters
        assert all(a is b for a, b in zip(before, module.slices.all()))
        assert all(p.grad.dtype == p.dtype for p in module.slices.all())
    if "copy" in move or "pickle" in move or "save" in move:
        assert_tied(module)


def test_a_deepcopy_has_memory_of_its_own():
    module = layer()
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.slices.all()[0].zero_()
    assert module.weight[6:8].abs().min() > 0 and other.weight[6:8].abs().max() == 0


@pytest.mark.parametrize("case", CASES)
def test_the_state_dict_is_that_of_the_plain_layer(case):
    module = layer(case)
    assert list(module.state_dict()) == ["weight", "bias"]
    plain = module.original()
    assert list(plain.state_dict()) == ["weight", "bias"]
    new = {name: torch.randn_like(t) for name, t in plain.state_dict().items()}
    assert not any(module.load_state_dict(new))
    assert torch.equal(module.weight, new["weight"])
    assert_tied(module)
    x = torch.randn(2, module.in_features, dtype=torch.float64)
    assert torch.allclose(plain(x), module(x), rtol=0, atol=1e-14)


def test_a_separated_slice_is_refused():
    module = layer()
    module.slices.all()[0].data = torch.zeros(2, 12, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"slices\[0\]: expected a view of the weight"):
        module(torch.zeros(1, 12, dtype=torch.float64))


@pytest.mark.parametrize("blocks", [[], [1, 1], [-1], [4]])
def test_bad_blocks(blocks):
    with pytest.raises(ValueError, match="HeadLinear: blocks: expected distinct blocks of 2 within the 8"):
        HeadLinear(nn.Linear(12, 8), blocks, 2, 0)


@pytest.mark.parametrize("case", CASES)
def test_low_rank_products_touch_their_blocks_alone(case):
    dim, transposed = CASES[case]
    plain = layer(case).original()
    expected = plain(torch.ones(1, 12 if dim == 0 else 8, dtype=torch.float64))
    module = HeadLora(plain, [3, 1], 2, dim, rank=2, alpha=4.0, transposed=transposed)
    x = torch.ones(1, module.in_features, dtype=torch.float64)
    assert torch.allclose(module(x), expected, rtol=0, atol=1e-14)  # b is 0 at first
    with torch.no_grad():
        module.b.normal_()
    merged = module.merged_weight()
    x = torch.randn(3, 5, module.in_features, dtype=torch.float64)
    assert torch.allclose(module(x), F.linear(x, merged, module.bias), rtol=0, atol=1e-12)
    change = merged - module.linear_weight()
    for block in (0, 2):
        assert change.narrow(dim, 2 * block, 2).abs().max() == 0
    for block in (1, 3):
        assert torch.linalg.matrix_rank(change.narrow(dim, 2 * block, 2)) == 2
    assert [n for n, p in module.named_parameters() if p.requires_grad] == ["a", "b"]


def test_compiled_without_a_break():
    module = layer("columns", dtype=torch.float32)
    x = torch.randn(4, 8, requires_grad=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(m(x).sin().sum(), [x, *module.slices.all()]) for m in (module, compiled)]
    for a, b in zip(*grads):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_autocast_leaves_doubles_alone(case):
    """As it does in nn.Linear."""
    module = layer(case)
    x = torch.randn(4, module.in_features, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(module(x).square().sum(), [x, *module.slices.all()])
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
        found = torch.autograd.grad(y.square().sum(), [x, *module.slices.all()])
    assert y.dtype == torch.float64 and torch.equal(y, F.linear(x, module.linear_weight(), module.bias))
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.parametrize("case", CASES)
def test_autocast_multiplies_in_16_bits_and_keeps_the_slices_gradients_whole(case):
    module = layer(case, dtype=torch.float32, scales=[1.0, 2.0])
    lora = HeadLora(layer(case, dtype=torch.float32).original(), [3, 1], 2, module.dim, rank=1, alpha=1.0,
                    transposed=module.transposed)  # fmt: skip
    x = torch.randn(4, module.in_features)
    for m, trained in ((module, module.slices.all()), (lora, [lora.a, lora.b])):
        with torch.autocast("cpu", torch.bfloat16):
            y = m(x)
        assert y.dtype == torch.bfloat16 and torch.allclose(y.float(), m(x), rtol=0.05, atol=0.05)
        y.float().square().sum().backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in trained)
