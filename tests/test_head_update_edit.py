"""Edits of heads: what stays as it was, how values broadcast, and when a write in place is refused."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pyml.backend import triton_reason
from pyml.ops import OPS, head_edit, head_edit_
from pyml.reference import head_update as reference
from tests.conftest import INTERPRETED

OP = OPS["head_edit"]
B, T, H, D = 2, 5, 4, 6


def maps(*lead: int, count: int = 2) -> dict[str, Tensor]:
    return {"values": torch.randn(*lead, count, D), "matrix": torch.randn(count, D, D)}


def test_other_heads_keep_their_bits(kernel):
    """Infinities, NaN and signed zeros too; and what is replaced as a whole leaves nothing behind."""
    x = torch.randn(B, T, H, D)
    x[0, 0, 0, :4] = torch.tensor([torch.nan, torch.inf, -0.0, 1e-42])
    x[1, 2, 1] = torch.nan
    y = head_edit(x, (1, 3))
    assert torch.equal(y.view(torch.int32)[:, :, [0, 2]], x.view(torch.int32)[:, :, [0, 2]])
    assert (y[:, :, [1, 3]] == 0).all()
    y = head_edit(x, (1,), values=torch.tensor(2.5))
    assert (y[:, :, 1] == 2.5).all()


def test_each_form_is_what_it_says(kernel):
    x, more = torch.randn(B, T, H, D, dtype=torch.float64), {n: t.double() for n, t in maps().items()}
    heads = (3, 1)
    affine = torch.einsum("btkd,ked->btke", x[:, :, heads], more["matrix"]) + more["values"]
    for strength in (1.0, 0.25, 0.0, -2.0):
        y = head_edit(x, heads, **more, strength=strength)
        expected = x.clone()
        expected[:, :, heads] = torch.lerp(x[:, :, heads], affine, strength)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        own = x.clone()
        assert head_edit_(own, heads, **more, strength=strength) is own
        torch.testing.assert_close(own, y, rtol=1e-14, atol=1e-14)


def test_values_broadcast(kernel):
    x = torch.randn(B, T, H, D)
    for shape in ((), (1,), (D,), (2, D), (2, 1), (T, 2, D), (1, 2, D), (B, 1, 2, D), (B, T, 1, 1), (1, 1, 2, D)):
        values = torch.randn(shape)
        whole = values.expand(B, T, 2, D).contiguous()
        assert torch.equal(head_edit(x, (2, 0), values), head_edit(x, (2, 0), whole)), shape
        assert torch.equal(head_edit(x, (2, 0), values)[:, :, [2, 0]], whole), shape
    values = torch.randn(D, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(head_edit(x.double(), (2, 0), values).sum(), values)
    assert torch.equal(found, torch.full((D,), 2.0 * B * T, dtype=torch.float64))


def test_layouts_of_attention(kernel):
    """As SDPA leaves it, [B, H, T, D] turned; and with more leading dimensions than join."""
    more = maps()
    attended = torch.randn(B, H, T, D).transpose(1, 2)
    dense = head_edit(attended.contiguous(), (0, 2), **more)
    torch.testing.assert_close(head_edit(attended, (0, 2), **more), dense)
    head_edit_(attended, (0, 2), **more)
    torch.testing.assert_close(attended, dense)
    many = torch.randn(3, 2, 2, 3, H, D).permute(3, 1, 0, 2, 4, 5)
    expected = head_edit(many.contiguous(), (1, 0), **more)
    torch.testing.assert_close(reference.head_edit(many, (1, 0), more["values"].expand(3, 2, 3, 2, 2, D),
                                                   more["matrix"], 1.0), expected)  # fmt: skip
    head_edit_(many, (1, 0), **more)
    torch.testing.assert_close(many, expected)


def test_more_heads_than_one_launch_takes():
    x, heads = torch.randn(3, 600, 2), tuple(range(599, -1, -2))
    matrix, values = torch.randn(300, 2, 2), torch.randn(300, 2)
    y = head_edit(x, heads, values, matrix)
    expected = torch.einsum("nkd,ked->nke", x[:, list(heads)], matrix) + values
    torch.testing.assert_close(y[:, list(heads)], expected)
    assert torch.equal(y[:, ::2], x[:, ::2])
    matrix.requires_grad_()
    (found,) = torch.autograd.grad(head_edit(x, heads, values, matrix).square().sum(), matrix)
    torch.testing.assert_close(found, torch.einsum("nke,nkd->ked", 2 * expected, x[:, list(heads)]))


def test_a_gradient_needs_the_form_that_makes_a_new_tensor(kernel):
    """Attention keeps its output for its backward: writing there would spoil that gradient."""
    q = torch.randn(B, H, T, D, requires_grad=True)
    x = F.scaled_dot_product_attention(q, q, q).transpose(1, 2)
    for call in (lambda: head_edit_(x, (1,)), torch.no_grad()(lambda: head_edit_(x, (1,)))):
        with pytest.raises(
            ValueError, match=r"head_edit_: x: expected a tensor without requires_grad, since attention"
        ):
            call()
    head_edit(x, (1,)).sum().backward()
    assert q.grad.isfinite().all()
    leaf = torch.randn(B, T, H, D, requires_grad=True)
    before = leaf.detach().clone()
    for mode in (torch.enable_grad(), torch.no_grad()):
        with mode, pytest.raises(ValueError, match=r"head_edit_: x: expected a tensor without requires_grad"):
            head_edit_(leaf, (1,))
    assert torch.equal(leaf, before)
    head_edit_(leaf.detach(), (1,))  # whoever means to write there
    assert (leaf[:, :, 1] == 0).all()
    own = torch.randn(B, T, H, D)
    for name, given in maps().items():
        with pytest.raises(ValueError, match=rf"head_edit_: {name}: expected a tensor without requires_grad"):
            head_edit_(own, (1, 2), **{name: given.requires_grad_()})
        with torch.no_grad():
            head_edit_(own, (1, 2), **{name: given})
        given.requires_grad_(False)


def test_values_lie_apart_from_what_is_written():
    x = torch.randn(B, T, H, D)
    before = x.clone()
    with pytest.raises(ValueError, match="head_edit_: values: expected memory apart from x"):
        head_edit_(x, (1,), x[:, :, 2:3], backend="cpp")
    assert torch.equal(x, before)
    assert torch.equal(head_edit(x, (1,), x[:, :, 2:3])[:, :, 1], x[:, :, 2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": (0, 0)}, r"head_edit: heads: expected heads that differ, got \(0, 0\)"),
        ({"heads": (0, 4)}, r"head_edit: heads: expected heads in \[0, 4\), got 4"),
        ({"heads": 1}, "head_edit: heads: expected a tuple of integers, got int"),
        (
            {"values": torch.ones(3, D)},
            r"head_edit: values: expected a shape that broadcasts to \[..., k, D\] = \[2, 5, 2",
        ),
        (
            {"matrix": torch.ones(2, D, 1)},
            r"head_edit: matrix: expected shape \[k, D, D\] = \[2, 6, 6\], got \[2, 6, 1\]",
        ),
        ({"strength": torch.inf}, "head_edit: strength: expected a finite number, got inf"),
        ({"x": torch.ones(3)}, r"head_edit: x: expected shape \[..., H, D\], got \[3\]"),
    ],
)
def test_bad_calls_are_refused(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        head_edit(**{"x": torch.ones(B, T, H, D), "heads": (0, 2), **change})


@pytest.mark.skipif(INTERPRETED or triton_reason() is not None, reason="compiles for a GPU")
def test_in_place_no_warp_of_triton_writes_what_another_still_reads():
    """At this width several warps share a row, and nothing else in the kernel makes them wait for each other."""
    import triton
    from pyml.triton_kernels import head_update, record
    from triton.backends.compiler import GPUTarget

    from tests.triton_aot import source_of

    width = 130
    with record(90) as launches:
        head_update.head_edit__fwd(torch.zeros(4, 8, 2, width), (1,), None, torch.zeros(1, width, width), 1.0)
    compiled = triton.compile(source_of(launches[0])[0], target=GPUTarget("cuda", 90, 32), options=launches[0].options)
    assert compiled.asm["ptx"].count("bar.sync") == 1
