"""TopKAttention in the place of torch.nn.MultiheadAttention: kinds of masks, torch's encoder layers, sizes of NumPy."""

import numpy as np
import pytest
import torch
from torch import nn

from pyml.nn import BiLevelRoutingAttention, TopKAttention


@pytest.mark.parametrize(
    "wrong", [["key_padding_mask"], ["attn_mask"], ["key_padding_mask", "attn_mask"]], ids="+".join
)
@pytest.mark.parametrize("other", [torch.bool, torch.float32])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.complex64])
def test_a_mask_of_integers_is_refused(wrong, other, dtype, device):
    """Beside a floating mask its ones would be added to the logits."""
    layer, x = TopKAttention(8, 2, 3, batch_first=True, device=device), torch.randn(2, 5, 8, device=device)
    masks = {
        "key_padding_mask": torch.arange(5, device=device).expand(2, -1) > 2,
        "attn_mask": torch.ones(5, 5, device=device).triu(1) > 0,
    }
    given = {name: mask.to(dtype if name in wrong else other) for name, mask in masks.items()}
    with pytest.raises(TypeError) as caught:
        layer(x, x, x, **given)
    assert str(caught.value) == f"TopKAttention: {wrong[0]}: expected a bool or a floating tensor, got {dtype}"


@pytest.mark.parametrize("masks", ["none", "padding", "causal"])
@pytest.mark.parametrize("topk", [2, 6])
def test_torch_encoder_layers_keep_the_largest_in_evaluation_too(topk, masks, device):
    """In evaluation torch would run dense attention of its own on the weights, instead of forward."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    dense = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).to(device)
    layer.self_attn = TopKAttention(8, 2, topk, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).to(device)
    model.load_state_dict(dense.state_dict())
    x, options = torch.randn(3, 6, 8, device=device), {}
    if masks == "padding":
        options = {"src_key_padding_mask": torch.arange(6, device=device).expand(3, -1) > 4}
    elif masks == "causal":
        options = {"mask": nn.Transformer.generate_square_subsequent_mask(6, device=device), "is_causal": True}
    trained = model.train()(x, **options)
    with torch.no_grad():
        found, everything = model.eval()(x, **options), dense.eval()(x, **options)
    torch.testing.assert_close(found, trained)
    if topk == 6:
        torch.testing.assert_close(found, everything, rtol=1e-4, atol=1e-5)
    else:
        assert (found - everything).abs().max() > 0.01


def test_sizes_of_numpy_are_integers():
    one, two, eight = np.int64(1), np.int32(2), np.int64(8)
    layer = TopKAttention(eight, two, two, kv_heads=one)
    assert layer(*[torch.randn(5, 1, 8)] * 3)[0].shape == (5, 1, 8) and type(layer.topk) is int
    assert TopKAttention(eight, two, [one, two]).topk == [1, 2]
    assert BiLevelRoutingAttention(eight, two, two, topk=two)(torch.randn(1, 8, 4, 4)).shape == (1, 8, 4, 4)
