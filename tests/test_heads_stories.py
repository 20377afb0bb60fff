"""A real checkpoint with shared key-value heads: stories260K of llama2.c, where it is at hand."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pyml.heads import HeadTuner, merge, path_patch, path_patch_loop
from tests.heads_models import exact

transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install 'pyml[train]')")
ROOT = Path(__file__).parents[1]
FILE = Path(os.environ.get("PYML_DATA", ROOT.parent / "shared" / "data")) / "stories260K.bin"
pytestmark = pytest.mark.skipif(
    not FILE.exists(), reason="stories260K.bin is not here (PYML_DATA names the folder that holds it)"
)


def read():
    """The sizes, and the weights by their names in llama2.c."""
    data = FILE.read_bytes()
    dim, inner, layers, heads, shared, vocabulary, length = np.frombuffer(data, np.int32, 7).tolist()
    assert vocabulary > 0  # negative: a classifier of its own
    numbers = torch.from_numpy(np.frombuffer(data, np.float32, offset=28).copy())
    width = dim // heads
    shapes = {
        "tokens": (vocabulary, dim), "att_norm": (layers, dim), "q": (layers, dim, dim),
        "k": (layers, shared * width, dim), "v": (layers, shared * width, dim), "o": (layers, dim, dim),
        "ffn_norm": (layers, dim), "gate": (layers, inner, dim), "down": (layers, dim, inner),
        "up": (layers, inner, dim), "norm": (dim,),
    }  # fmt: skip
    found, start = {}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        found[name] = numbers[start : start + size].view(shape)
        start += size
    assert len(numbers) - start == length * width  # cosines and sines
    return (dim, inner, layers, heads, shared, vocabulary, length), found


def halves(weight, heads):
    """Rows of a head from rotated pairs side by side, as llama2.c has them, to pairs half a head apart."""
    return weight.view(heads, -1, 2, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def load():
    (dim, inner, layers, heads, shared, vocabulary, length), w = read()
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=dim, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=shared, max_position_embeddings=length, rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    state = {"model.embed_tokens.weight": w["tokens"], "lm_head.weight": w["tokens"], "model.norm.weight": w["norm"]}
    for n in range(layers):
        at = f"model.layers.{n}"
        state[f"{at}.input_layernorm.weight"] = w["att_norm"][n]
        state[f"{at}.post_attention_layernorm.weight"] = w["ffn_norm"][n]
        state[f"{at}.self_attn.q_proj.weight"] = halves(w["q"][n], heads)
        state[f"{at}.self_attn.k_proj.weight"] = halves(w["k"][n], shared)
        for name in "vo":
            state[f"{at}.self_attn.{name}_proj.weight"] = w[name][n]
        for name in ("gate", "up", "down"):
            state[f"{at}.mlp.{name}_proj.weight"] = w[name][n]
    model.load_state_dict(state)
    return model.eval()


def llama2c(ids):
    """Logits ``[T, V]`` by the program of llama2.c in float64: pairs side by side are rotated."""
    (dim, _, layers, heads, shared, _, _), w = read()
    w = {name: t.double() for name, t in w.items()}
    width, count = dim // heads, len(ids)
    angles = torch.arange(count)[:, None] * 10000.0 ** (-torch.arange(0, width, 2) / width).double()
    turn = torch.polar(torch.ones_like(angles), angles)
    norm = lambda x, weight: x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight  # noqa: E731

    def rotated(x, n):
        pairs = torch.view_as_complex(x.view(count, n, width // 2, 2)) * turn[:, None]
        return torch.view_as_real(pairs).flatten(-2)

    x = w["tokens"][ids]
    past = torch.ones(count, count).tril().bool()
    for n in range(layers):
        y = norm(x, w["att_norm"][n])
        q = rotated(y @ w["q"][n].t(), heads)
        k = rotated(y @ w["k"][n].t(), shared).repeat_interleave(heads // shared, 1)
        v = (y @ w["v"][n].t()).view(count, shared, width).repeat_interleave(heads // shared, 1)
        weights = torch.einsum("thd,shd->hts", q, k) / width**0.5
        weights = weights.masked_fill(~past, float("-inf")).softmax(-1)
        x = x + torch.einsum("hts,shd->thd", weights, v).flatten(1) @ w["o"][n].t()
        y = norm(x, w["ffn_norm"][n])
        x = x + (F.silu(y @ w["gate"][n].t()) * (y @ w["up"][n].t())) @ w["down"][n].t()
    return norm(x, w["norm"]) @ w["tokens"].t()


def prompt(seed, count=4):
    return {"input_ids": torch.randint(3, 512, (count, 12), generator=torch.Generator().manual_seed(seed))}


def test_the_loaded_model_is_that_of_llama2c():
    model = load()
    assert sum(p.numel() for p in model.parameters()) == 260_032
    ids = prompt(0, 1)["input_ids"]
    expected = llama2c(ids[0])
    with torch.no_grad():
        found = model(ids).logits[0].double()
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_path_patching_on_it_equals_the_loop():
    model = exact(load())
    clean, other = prompt(1), prompt(2)
    found = path_patch(model, clean, other, (261, 300), mlps=True, difference="plain")
    loop = path_patch_loop(model, clean, other, (261, 300), mlps=True, difference="plain")
    assert found.heads.shape == (5, 8)
    for mine, theirs in ((found.heads, loop.heads), (found.mlps, loop.mlps)):
        assert (mine - theirs).abs().max() < 1e-9 and theirs.abs().max() > 0.01


def test_heads_of_it_are_tuned_and_merged(tmp_path):
    tuner = HeadTuner(load(), [(2, 1), (4, 6)], ("q", "k", "v", "o"), verbose=False)
    assert tuner.siblings == {2: [0], 4: [7]}
    before = tuner.model.state_dict()["model.layers.2.self_attn.k_proj.weight"].clone()
    batch = prompt(3)
    batch["labels"] = batch["input_ids"]
    optimizer = tuner.optimizer(1e-2)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = tuner.loss(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    rows = (tuner.model.state_dict()["model.layers.2.self_attn.k_proj.weight"] != before).any(1)
    assert rows.nonzero().flatten().tolist() == list(range(8))  # key-value head 0, of query heads 0 and 1
    tuner.save(tmp_path / "delta.safetensors")
    with torch.no_grad():
        expected = tuner.model(batch["input_ids"]).logits
        assert torch.equal(merge(load(), tmp_path / "delta.safetensors")(batch["input_ids"]).logits, expected)
