"""BiLevelRoutingAttention and TopKAttention: values, padding, state dicts, wrong input; LSNet has a file of its own."""

import copy
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyml.nn import BiLevelRoutingAttention, TopKAttention


def awake(module: nn.Module) -> nn.Module:
    """Normalisations that are not the identity."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1, 0.3)
            nn.init.normal_(layer.bias, 0, 0.3)
            layer.running_mean.normal_(0, 0.3)
            layer.running_var.uniform_(0.5, 2)
    return module


def pixel_by_pixel(layer: BiLevelRoutingAttention, x: Tensor, soft: bool = False) -> Tensor:
    """The layer from its description: one region and one pixel after the other, plain convolutions."""
    n, heads = layer.n_win, layer.num_heads
    height, width = x.shape[2:]
    bottom, right = -height % n, -width % n
    padding = (0, right, 0, bottom)
    early = x if layer.mask_padding else F.pad(x, padding)
    q, kv = (p.bn(p.c(early)) for p in (layer.to_q, layer.to_kv))
    if layer.mask_padding:
        q, kv = F.pad(q, padding), F.pad(kv, padding)
    k, v = kv.split([layer.qk_dim, layer.dim], 1)
    out = torch.zeros_like(v)
    rows, columns = (height + bottom) // n, (width + right) // n
    regions = []
    for i in range(n):
        for j in range(n):
            pixels = [(a, b) for a in range(i * rows, (i + 1) * rows) for b in range(j * columns, (j + 1) * columns)]
            regions.append([(a, b) for a, b in pixels if not layer.mask_padding or (a < height and b < width)])
    for image in range(len(x)):
        q_of, k_of, v_of = (
            [torch.stack([t[image, :, a, b] for a, b in r]) if r else t.new_zeros(0, t.shape[1]) for r in regions]
            for t in (q, k, v)
        )
        empty = torch.tensor([len(t) == 0 for t in k_of], device=x.device)
        means = torch.stack([t.sum(0) / max(len(t), 1) for t in k_of])
        for number, own in enumerate(regions):
            if not own:
                continue
            similar = (means @ q_of[number].mean(0)) * layer.scale
            similar = similar.masked_fill(empty, -torch.inf)
            values, chosen = similar.sort(descending=True, stable=True)
            chosen = [int(c) for c in chosen[: layer.topk]]
            weights = values[: layer.topk].softmax(0) if soft else x.new_ones(layer.topk)
            if soft and not layer.diff_routing:
                weights = weights.detach()
            keys = torch.cat([k_of[c] * w for c, w in zip(chosen, weights)])
            vals = torch.cat([v_of[c] * w for c, w in zip(chosen, weights)])
            each = []
            for qh, kh, vh in zip(*(t.chunk(heads, 1) for t in (q_of[number], keys, vals))):
                each.append((qh @ kh.T * layer.scale).softmax(1) @ vh)
            for (a, b), row in zip(own, torch.cat(each, 1)):
                out[image, :, a, b] = row
    return (out + layer.lepe(v))[:, :, :height, :width]


SIZES = [(8, 12), (7, 9), (5, 4), (13, 3)]


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("training", [False, True])
def test_routing_layer_is_its_description(size, mask, training, device):
    layer = awake(BiLevelRoutingAttention(6, 2, 4, 8, topk=3, mask_padding=mask)).double().to(device).train(training)
    x = torch.randn(2, 6, *size, dtype=torch.float64, device=device, requires_grad=True)
    other = copy.deepcopy(layer)
    y, expected = layer(x), pixel_by_pixel(other, x)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-11)
    upstream = torch.randn_like(y)
    for found, truth in zip(
        torch.autograd.grad(y, (x, *layer.parameters()), upstream),
        torch.autograd.grad(expected, (x, *other.parameters()), upstream),
    ):
        torch.testing.assert_close(found, truth, rtol=1e-8, atol=1e-9)
    for (name, found), truth in zip(layer.named_buffers(), other.buffers()):
        torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-14, msg=name)
    assert layer.to_q.bn.num_batches_tracked == int(training)


@pytest.mark.parametrize("diff", [False, True])
@pytest.mark.parametrize("mask", [False, True])
def test_soft_routing(diff, mask, device):
    options = {"topk": 3, "soft_routing": True, "diff_routing": diff, "mask_padding": mask}
    layer = awake(BiLevelRoutingAttention(6, 2, 3, 8, **options)).double().to(device).eval()
    x = torch.randn(2, 6, 7, 8, dtype=torch.float64, device=device, requires_grad=True)
    y, expected = layer(x), pixel_by_pixel(layer, x, soft=True)
    tolerance = {"rtol": 1e-6, "atol": 1e-7}  # the logits of a routing without gradient are float32
    torch.testing.assert_close(y, expected, **tolerance)
    upstream = torch.randn_like(y)
    found, truth = (torch.autograd.grad(t, x, upstream)[0] for t in (y, expected))
    torch.testing.assert_close(found, truth, **tolerance)


def test_all_regions_are_dense_attention(device):
    layer = awake(BiLevelRoutingAttention(12, 2, 4, 48, topk=16, side_dwconv=0)).to(device).eval()
    x = torch.randn(2, 12, 12, 8, device=device)
    q, kv = (p.bn(p.c(x)).flatten(2).transpose(1, 2) for p in (layer.to_q, layer.to_kv))
    k, v = kv.split([48, 12], 2)
    heads = (t.unflatten(2, (2, -1)).transpose(1, 2) for t in (q, k, v))
    dense = F.scaled_dot_product_attention(*heads, scale=48**-0.5).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer(x), dense.transpose(1, 2).reshape(x.shape), rtol=1e-4, atol=1e-5)


def test_padded_pixels_stay_out(device):
    """With mask_padding nothing depends on how far the image is padded."""
    layer = awake(BiLevelRoutingAttention(4, 1, 2, topk=4, mask_padding=True)).double().to(device).eval()
    x = torch.randn(1, 4, 6, 6, dtype=torch.float64, device=device)
    odd = x[:, :, :5, :5]
    wider = BiLevelRoutingAttention(4, 1, 5, topk=25, mask_padding=True).double().to(device).eval()
    wider.load_state_dict(layer.state_dict())
    torch.testing.assert_close(
        layer(odd), wider(odd)
    )  # 2 x 2 padded regions or 5 x 5 whole ones: all pixels both times
    public = copy.deepcopy(layer)
    public.mask_padding = False
    assert not torch.allclose(public(odd), wider(odd))
    torch.testing.assert_close(public(x), layer(x), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_near(dtype, device):
    layer = awake(BiLevelRoutingAttention(12, 2, 4, 48, topk=16, side_dwconv=5)).to(device).eval()
    x = torch.randn(1, 12, 16, 16, device=device)
    truth = layer(x)
    y = copy.deepcopy(layer).to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    assert (y.float() - truth).abs().max() < 0.05 * truth.abs().max()
    with torch.autocast(device, dtype):
        cast = layer(x)
    assert (cast.float() - truth).abs().max() < 0.05 * truth.abs().max()


def test_routing_layer_state_and_copies():
    layer = BiLevelRoutingAttention(12, 2, 16, 48, topk=32, side_dwconv=5)
    shapes = {name: list(t.shape) for name, t in layer.state_dict().items()}
    bn = ("weight", "bias", "running_mean", "running_var")
    assert shapes == {
        "lepe.weight": [12, 1, 5, 5], "lepe.bias": [12],
        "to_q.c.weight": [48, 12, 1, 1], **{f"to_q.bn.{name}": [48] for name in bn}, "to_q.bn.num_batches_tracked": [],
        "to_kv.c.weight": [60, 12, 1, 1], **{f"to_kv.bn.{name}": [60] for name in bn},
        "to_kv.bn.num_batches_tracked": [],
    }  # fmt: skip
    assert sum(p.numel() for p in layer.parameters()) == 1824
    x = torch.randn(1, 12, 16, 16)
    again = pickle.loads(pickle.dumps(layer.eval()))
    torch.testing.assert_close(again(x), layer(x), rtol=0, atol=0)


def test_flops_of_the_published_size():
    layer = BiLevelRoutingAttention(12, 2, 16, 48, topk=32, side_dwconv=5)
    total, attention = layer.flops((1, 12, 128, 128))
    assert attention == 2 * 16384 * 2048 * 60  # 4.03 G
    assert total - attention == 2 * 16384 * 12 * 108 + 2 * 256 * 256 * 48 + 2 * 16384 * 12 * 25


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"dim": 0}, "dim: expected an integer >= 1, got 0"),
        ({"num_heads": 5}, "dim: expected a multiple of num_heads = 5, got 12"),
        ({"qk_dim": 7}, "qk_dim: expected a multiple of num_heads = 2, got 7"),
        ({"topk": 17}, "topk: expected an integer from 1 to n_win * n_win = 16, got 17"),
        ({"side_dwconv": 4}, "side_dwconv: expected 0 or an odd integer, got 4"),
        ({"kv_downsample_mode": "maxpool"}, "kv_downsample_mode: expected one of identity, got 'maxpool'"),
        ({"param_routing": True}, "param_routing: expected False, got True"),
        ({"diff_routing": True}, "diff_routing: expected soft_routing=True with it"),
    ],
)
def test_wrong_options_of_the_routing_layer(options, sentence):
    with pytest.raises(ValueError, match=re.escape(f"BiLevelRoutingAttention: {sentence}")):
        BiLevelRoutingAttention(**{"dim": 12, "num_heads": 2, "n_win": 4, **options})


def test_strides_and_an_empty_batch(device):
    layer = awake(BiLevelRoutingAttention(6, 2, 4, 8, topk=3)).double().to(device).eval()
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64, device=device)
    expected = layer(x)
    wide = torch.randn(2, 12, 18, 8, dtype=torch.float64, device=device)
    wide[:, ::2, ::2] = x
    for strided in (x.contiguous(memory_format=torch.channels_last), wide[:, ::2, ::2], x.mT.contiguous().mT):
        torch.testing.assert_close(layer(strided), expected)
    torch.testing.assert_close(layer(x[:1].expand(2, -1, -1, -1))[1], expected[0])
    assert layer(x[:0]).shape == (0, 6, 9, 8)


def test_wrong_input_of_the_routing_layer():
    layer = BiLevelRoutingAttention(12, 2, 4, auto_pad=False)
    with pytest.raises(ValueError, match=re.escape("x: expected [B, 12, H, W], got [1, 3, 8, 8]")):
        layer(torch.ones(1, 3, 8, 8))
    with pytest.raises(ValueError, match=re.escape("x: expected sides that n_win = 4 divides (auto_pad is off)")):
        layer(torch.ones(1, 12, 8, 9))


# --- token level ------------------------------------------------------------------------------------------------------

FORBIDDEN = torch.ones(5, 7, dtype=torch.bool).triu(3)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("sizes", [{}, {"kdim": 6, "vdim": 10}])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("masks", ["none", "padding", "forbidden", "added", "both", "per head"])
def test_all_keys_kept_is_torch(batch_first, sizes, bias, masks, device):
    theirs = nn.MultiheadAttention(12, 3, bias=bias, batch_first=batch_first, **sizes, device=device)
    ours = TopKAttention(12, 3, 7, bias=bias, batch_first=batch_first, **sizes, device=device)
    if bias:
        nn.init.normal_(theirs.in_proj_bias)
        nn.init.normal_(theirs.out_proj.bias)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    tensors = [
        torch.randn(2, length, width, device=device)
        for length, width in ((5, 12), (7, sizes.get("kdim", 12)), (7, sizes.get("vdim", 12)))
    ]
    q, k, v = (t if batch_first else t.transpose(0, 1) for t in tensors)
    options = {}
    if masks in ("padding", "both"):
        padding = torch.zeros(2, 7, dtype=torch.bool, device=device)
        padding[1, 4:] = True
        options["key_padding_mask"] = padding
    if masks in ("forbidden", "both"):
        options["attn_mask"] = FORBIDDEN.to(device)
    if masks == "added":
        options["attn_mask"] = torch.randn(5, 7, device=device)
    if masks == "per head":
        options["attn_mask"] = torch.randn(6, 5, 7, device=device)
    found, weights = ours(q, k, v, **options)
    expected, _ = theirs(q, k, v, need_weights=False, **options)
    assert weights is None
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_unbatched_causal_and_seeded_like_torch(device):
    torch.manual_seed(1)
    theirs = nn.MultiheadAttention(8, 2)
    torch.manual_seed(1)
    ours = TopKAttention(8, 2, 6)
    for (name, a), (other, b) in zip(theirs.named_parameters(), ours.named_parameters()):
        assert name == other and torch.equal(a, b), name
    x = torch.randn(6, 8)
    mask = torch.ones(6, 6, dtype=torch.bool).triu(1)
    expected, _ = theirs(x, x, x, attn_mask=mask, need_weights=False)
    for given in ({}, {"attn_mask": mask}, {"attn_mask": torch.zeros(6, 6).masked_fill(mask, -torch.inf)}):
        found, _ = ours(x, x, x, is_causal=True, **given)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    other = torch.eye(6, dtype=torch.bool).roll(-1, 1)  # forbids the key before the query's own
    expected, _ = theirs(x, x, x, attn_mask=mask | other, need_weights=False)
    torch.testing.assert_close(ours(x, x, x, is_causal=True, attn_mask=other)[0], expected, rtol=1e-4, atol=1e-5)


def heads_of(layer: TopKAttention, x: Tensor) -> list[Tensor]:
    weights = layer.in_proj_weight.split(list(layer.sizes))
    counts = (layer.num_heads, layer.kv_heads, layer.kv_heads)
    heads = [(x @ w.T).unflatten(-1, (n, -1)).transpose(1, 2) for w, n in zip(weights, counts)]
    group = layer.num_heads // layer.kv_heads
    return [heads[0], *(t.repeat_interleave(group, 1) for t in heads[1:])]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("topk", [2, [1, 3, 50]])
def test_only_the_largest_are_kept(kv_heads, topk, device):
    layer = TopKAttention(16, 4, topk, bias=False, batch_first=True, kv_heads=kv_heads).double().to(device)
    x = torch.randn(2, 9, 16, dtype=torch.float64, device=device)
    if layer.mix is not None:
        nn.init.normal_(layer.mix)
    q, k, v = heads_of(layer, x)
    logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    total = 0
    for number, weight in zip([topk] if isinstance(topk, int) else topk, [1] if layer.mix is None else layer.mix):
        cut = logits.topk(min(number, 9), -1).values[..., -1:]
        total = total + weight * logits.masked_fill(logits < cut, -torch.inf).softmax(-1) @ v
    expected = total.transpose(1, 2).flatten(2) @ layer.out_proj.weight.T
    found = layer(x, x, x)[0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    found.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: TopKAttention(10, 4, 2), "embed_dim: expected a multiple of num_heads = 4, got 10"),
        (lambda: TopKAttention(8, 4, 2, kv_heads=3), "kv_heads: expected a divisor of num_heads = 4, got 3"),
        (lambda: TopKAttention(8, 4, 0), "topk: expected an integer >= 1 or a list of them, got 0"),
        (lambda: TopKAttention(8, 4, []), "topk: expected an integer >= 1 or a list of them, got []"),
        (lambda: TopKAttention(8, 4, [2, 3], straight_through=True), "straight_through: expected False with several"),
        (lambda m, x: m(x, x, x, need_weights=True), "need_weights: expected False"),
        (lambda m, x: m(x[..., :4], x, x), "query: expected [..., 8] with 2 or 3 dimensions, as many as query"),
        (lambda m, x: m(x, x[:3], x), "key, value: expected one length and the batch of query"),
        (lambda m, x: m(x, x, x, x[0, :, 0] > 0), "key_padding_mask: expected [2, 5], got [1, 2]"),
        (lambda m, x: m(x, x, x, attn_mask=torch.ones(4, 4)), "attn_mask: expected [5, 5] or [4, 5, 5], got [4, 4]"),
        (lambda m, x: m(x, x, x, [[True] * 5] * 2), "key_padding_mask: expected None or a tensor, got list"),
        (lambda: TopKAttention(8, 4, 2, backend="cppp"), "backend: expected one of reference, cpp, cuda, triton, auto"),
        (lambda: TopKAttention(None, 4, 2), "embed_dim: expected an integer >= 1, got None"),
    ],
)
def test_wrong_input_of_the_token_layer(call, sentence):
    arguments = [TopKAttention(8, 2, 2), torch.randn(5, 2, 8)][: call.__code__.co_argcount]
    with pytest.raises(ValueError, match=re.escape(f"TopKAttention: {sentence}")):
        call(*arguments)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (BiLevelRoutingAttention(8, 2, 3, topk=4), (1, 8, 7, 6)),
        (
            BiLevelRoutingAttention(8, 2, 3, topk=4, soft_routing=True, diff_routing=True, mask_padding=True),
            (1, 8, 7, 6),
        ),
        (TopKAttention(8, 2, 3), (5, 2, 8)),
    ],
    ids=["hard", "soft", "token"],
)
def test_layers_compile_whole_and_export(layer, shape, device):
    layer = layer.to(device)
    arguments = [torch.randn(shape, device=device)] * (3 if isinstance(layer, TopKAttention) else 1)

    def first(found):
        return found[0] if isinstance(found, tuple) else found

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(first(compiled(*arguments)), first(layer(*arguments)))
    first(compiled(*arguments)).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    layer.eval()
    with torch.no_grad():
        exported = torch.export.export(layer, tuple(arguments)).module()
        torch.testing.assert_close(first(exported(*arguments)), first(layer(*arguments)))


def test_layers_say_what_their_input_should_be():
    routed, chosen = BiLevelRoutingAttention(8, num_heads=2, n_win=2, topk=2), TopKAttention(8, 2, 3)
    with pytest.raises(
        TypeError, match=r"BiLevelRoutingAttention: x: expected the dtype of the weights \(torch.float32"
    ):
        routed(torch.zeros(1, 8, 4, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="BiLevelRoutingAttention: x: expected at least one pixel"):
        routed(torch.zeros(1, 8, 0, 4))
    tokens = torch.zeros(5, 1, 8)
    with pytest.raises(TypeError, match="TopKAttention: key: expected the dtype of the weights"):
        chosen(tokens, tokens.double(), tokens)
    with pytest.raises(ValueError, match="TopKAttention: attn_mask: expected None or a tensor, got list"):
        chosen(tokens, tokens, tokens, attn_mask=[1])
    for topk in (1.5, True):
        with pytest.raises(ValueError, match="TopKAttention: topk: expected an integer >= 1 or a list of them"):
            TopKAttention(8, 2, topk)
