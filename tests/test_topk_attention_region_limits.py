"""`region_attention` on a CPU: what memory it takes, and what it refuses. Bad indices on a GPU: see *_region_gpu.py."""

import subprocess
import sys

import pytest
import torch

from pyml import ops

MEMORY = """
import resource, torch
from pyml import ops
q, k = (torch.randn(1, 2, 256, 64, 24, requires_grad=True) for _ in range(2))
v = torch.randn(1, 2, 256, 64, 6, requires_grad=True)
index = torch.rand(1, 1, 256, 256).argsort(-1)
ops.region_attention(*(t[:, :, :2] for t in (q, k, v)), index[:, :, :2, :1] % 2).sum().backward()
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
start = peak()
out = ops.region_attention(q, k, v, index[..., :32])
forward = peak()
out.sum().backward()
both = peak()
ops.region_attention(q, k, v, index[..., :128]).sum().backward()
print(forward - start, both - start, peak() - both)
"""


def test_memory_at_the_published_size_and_none_for_more_regions():
    result = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, timeout=300)
    forward, both, more = map(float, result.stdout.split())
    assert forward < 12 and both < 50, "MiB; gathered keys and values alone are 120, the logits 256"
    assert more < 8, "four times as many regions a query must need no more memory"


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": torch.tensor([[[[0, 4]]]])}, "index: expected regions from 0 to 3 or -1 for none, got 4"),
        ({"index": torch.tensor([[[[0, -2]]]])}, "index: expected regions from 0 to 3 or -1 for none, got -2"),
        ({"index": torch.tensor([[[[2**62, 0]]]])}, "index: expected regions from 0 to 3 or -1 for none, got 4611"),
        ({"index": torch.zeros(1, 1, 1, 2)}, "index: expected torch.int64, got torch.float32"),
        ({"index": torch.zeros(1, 1, 2, 2, dtype=torch.int64)}, r"index: expected shape \[B, 1 or H, P, K\]"),
        ({"counts": torch.tensor([[[3]]])}, "counts: expected numbers from 0 to K = 2, got"),
        ({"counts": torch.tensor([[[-1]]])}, "counts: expected numbers from 0 to K = 2, got"),
        ({"key_mask": torch.ones(1, 4, 6)}, "key_mask: expected torch.bool, got torch.float32"),
        ({"key_mask": torch.ones(1, 6, 4).bool()}, r"key_mask: expected shape \[B, regions, tokens\] = \[1, 4, 6\]"),
        ({"region_weight": torch.ones(1, 1, 1, 3)}, r"region_weight: expected shape \[B, 1 or H, P, K\]"),
        ({"v": torch.ones(1, 2, 4, 5, 3)}, r"v: expected shape \[B, H, Pk, Sk, Dv\] = \[1, 2, 4, 6, 3\]"),
        ({"k": torch.ones(1, 1, 4, 6, 8)}, r"k: expected shape \[B, H, Pk, Sk, D\]"),
        ({"scale": torch.nan}, "scale: expected a finite number or None, got nan"),
    ],
)
def test_errors_are_one_sentence(change, message, backend):
    good = {
        "q": torch.ones(1, 2, 1, 5, 8), "k": torch.ones(1, 2, 4, 6, 8), "v": torch.ones(1, 2, 4, 6, 3),
        "index": torch.tensor([[[[0, 3]]]]),
    }  # fmt: skip
    ops.region_attention(**good, backend=backend)
    with pytest.raises((ValueError, TypeError), match=f"^region_attention: {message}"):
        ops.region_attention(**{**good, **change}, backend=backend)


def test_the_backward_reads_through_no_bad_index_either():
    q, k, v = torch.ones(1, 1, 1, 2, 4), torch.ones(1, 1, 2, 3, 4), torch.ones(1, 1, 2, 3, 4)
    index = torch.tensor([[[[1]]]])
    out, lse, exact, _ = torch.ops.pyml.region_attention_fwd(q, k, v, index, None, None, None, None)
    for bad in (2, -7, 2**40):
        with pytest.raises(ValueError, match=r"^region_attention: index: expected regions from 0 to 1 "):
            torch.ops.pyml.region_attention_bwd(
                out, q, k, v, torch.tensor([[[[bad]]]]), None, None, None, None, out, lse, exact, [True] * 4
            )
