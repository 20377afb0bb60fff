"""Sample inputs of top-k attention: odd sizes, ragged, shared and crowded indices, masks, cross-attention."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor

from pyml.reference.topk_attention import token_logits
from pyml.testing.samples import Sample


def _normal(g: Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


# --- choices: [B, heads, P, K] of Pk regions --------------------------------------------------------------------------


def different(g: Generator, shape: tuple[int, ...], regions: int) -> Tensor:
    """Each row names K different regions."""
    return torch.rand(*shape[:3], regions, generator=g).argsort(-1)[..., : shape[3]].contiguous()


def repeated(g: Generator, shape: tuple[int, ...], regions: int) -> Tensor:
    """Any regions, some of them twice."""
    return torch.randint(regions, shape, generator=g)


def ragged(g: Generator, shape: tuple[int, ...], regions: int) -> Tensor:
    """About a third of the entries are -1, all of them in the first row."""
    index = different(g, shape, regions)
    gone = torch.rand(shape, generator=g) < 0.33
    gone[:, :, :1] = True
    return index.masked_fill(gone, -1)


def crowded(g: Generator, shape: tuple[int, ...], regions: int) -> Tensor:
    """Every row names region 1, and no row the last region."""
    index = torch.randint(regions - 1, shape, generator=g)
    index[..., :1] = min(1, regions - 1)
    return index


def nothing(g: Generator, shape: tuple[int, ...], regions: int) -> Tensor:
    return torch.full(shape, -1)


# --- calls ------------------------------------------------------------------------------------------------------------


def _region(
    B=1, H=2, P=3, S=5, Pk=None, Sk=None, K=2, D=4, Dv=3, index=different, heads=1, scale: float | None = None,
    counts=False, mask=False, weight=False, large: float = 1.0,
) -> Callable[[Generator], dict[str, Any]]:  # fmt: skip
    regions, tokens = P if Pk is None else Pk, S if Sk is None else Sk

    def build(g: Generator) -> dict[str, Any]:
        values: dict[str, Any] = {
            "q": large * _normal(g, B, H, P, S, D),
            "k": _normal(g, B, H, regions, tokens, D),
            "v": _normal(g, B, H, regions, tokens, Dv),
            "index": index(g, (B, heads, P, K), regions),
            "scale": scale,
            "counts": torch.randint(K + 1, (B, heads, P), generator=g) if counts else None,
            "key_mask": None,
            "region_weight": 0.5 + torch.rand(B, heads, P, K, generator=g, dtype=torch.float64) if weight else None,
        }
        if counts:  # what lies beyond them must not matter
            beyond = torch.arange(K) >= values["counts"].unsqueeze(-1)
            values["index"] = values["index"].masked_fill(beyond, 2**40)
        if mask:
            values["key_mask"] = torch.rand(B, regions, tokens, generator=g) < 0.7
            values["key_mask"][:, -1:] = False
        return values

    return build


def _smooth(id: str, build: Callable[[Generator], dict[str, Any]]) -> Sample:
    return Sample(id, build, tiny=True, smooth=True)


_FULL = torch.float32

_REGION = [
    _smooth("smooth", _region(P=2, S=3, D=2, Dv=2)),
    _smooth("smooth-all", _region(B=2, H=1, S=2, Pk=4, Sk=3, K=3, D=3, Dv=2, index=ragged, mask=True, weight=True)),
    _smooth("smooth-counts", _region(P=2, S=2, Pk=3, Sk=4, D=2, Dv=1, index=different, heads=2, counts=True,
                                     scale=0.7, weight=True)),
    Sample("lsnet", _region(P=16, S=64, K=8, D=24, Dv=6)),
    Sample("49", _region(B=2, P=6, S=49, K=4, D=16, Dv=16)),
    Sample("63-per-head", _region(P=5, S=63, K=3, D=24, Dv=6, index=repeated, heads=2)),
    Sample("cross", _region(B=2, H=3, P=7, S=9, Pk=5, Sk=33, K=4, D=20, Dv=12)),
    Sample("crowded", _region(P=40, S=8, Pk=9, Sk=16, K=5, D=8, Dv=8, index=crowded)),
    Sample("crowded-weights", _region(H=3, P=40, S=7, Pk=6, Sk=18, K=3, D=8, Dv=5, index=crowded, weight=True,
                                      heads=3)),
    Sample("wide", _region(H=1, P=3, S=17, K=3, D=128, Dv=64)),
    Sample("odd-dims", _region(P=4, S=21, K=3, D=37, Dv=41, index=repeated, scale=-0.2)),
    Sample("one", _region(H=1, P=1, S=1, Pk=2, Sk=2, K=2, D=1, Dv=1), tiny=True),
    Sample("every-option", _region(B=2, P=6, S=13, Pk=8, Sk=19, K=6, D=12, Dv=7, index=ragged, heads=2, scale=0.4,
                                   counts=True, mask=True, weight=True)),
    Sample("mask", _region(P=6, S=16, Sk=16, K=4, D=16, Dv=16, mask=True)),
    Sample("ragged", _region(B=2, P=6, S=64, Sk=64, K=4, D=8, Dv=4, index=ragged)),
    Sample("large-logits", _region(P=4, S=32, K=3, D=16, Dv=8, large=30.0)),
    Sample("large-logits-weights", _region(P=4, S=32, K=3, D=16, Dv=8, large=30.0, weight=True)),
    Sample("nobody", _region(index=nothing), tiny=True),
    Sample("no-slots", _region(K=0), tiny=True, empty=True),
    Sample("no-batch", _region(B=0), tiny=True, empty=True),
    Sample("no-queries", _region(S=0, Sk=4), tiny=True, empty=True),
    Sample("no-keys", _region(Sk=0), tiny=True, empty=True),
    Sample("no-regions", _region(Pk=0, index=nothing), tiny=True, empty=True),
    Sample("no-values", _region(Dv=0), tiny=True, empty=True),
    Sample("float32-weight", _region(P=2, S=4, weight=True), tiny=True, keep=(("region_weight", _FULL),)),
    Sample("float32-values", _region(P=2, S=4), tiny=True, keep=(("v", _FULL),)),
]  # fmt: skip


def _route(
    B=1, H=2, P=6, S=5, Pk=None, Sk=None, D=4, topk=3, scale: float | None = None, per_head=False, masks=False,
    same=False, logits=False,
) -> Callable[[Generator], dict[str, Any]]:  # fmt: skip
    regions, tokens = P if Pk is None else Pk, S if Sk is None else Sk

    def build(g: Generator) -> dict[str, Any]:
        k = _normal(g, B, H, regions, tokens, D)
        values: dict[str, Any] = {
            "q": _normal(g, B, H, P, S, D),
            "k": torch.ones_like(k) if same else k,
            "grid": None,
            "topk": topk,
            "scale": scale,
            "per_head": per_head,
            "query_mask": torch.rand(B, P, S, generator=g) < 0.7 if masks else None,
            "key_mask": torch.rand(B, regions, tokens, generator=g) < 0.5 if masks else None,
            "return_logits": logits,
        }
        if masks:
            values["key_mask"][:, 1:2] = False
        return values

    return build


_ROUTE = [
    Sample("tiny", _route(), tiny=True),
    Sample("tiny-masks", _route(B=2, P=4, Pk=5, masks=True, per_head=True, logits=True), tiny=True),
    Sample("lsnet", _route(P=64, S=64, D=24, topk=32, logits=True)),
    Sample("per-head", _route(B=2, H=3, P=9, S=49, D=16, topk=4, per_head=True, logits=True)),
    Sample("all", _route(P=7, topk=7, S=63)),
    Sample("cross", _route(P=5, S=4, Pk=11, Sk=9, D=37, topk=6, scale=-0.5, logits=True)),
    Sample("equal", _route(P=20, topk=9, same=True)),
    Sample("no-tokens", _route(S=0), tiny=True, empty=True),
    Sample("no-batch", _route(B=0), tiny=True, empty=True),
    Sample("no-query-regions", _route(P=0, Pk=4), tiny=True, empty=True),
]

# --- token level ------------------------------------------------------------------------------------------------------


def exact(g: Generator, *shape: int) -> Tensor:
    """Multiples of 1/2 in [-1, 1]: logits are exact in every dtype, so all keep the same keys, among many ties."""
    return 0.5 * torch.randint(-2, 3, shape, generator=g).double()


def _float_mask(g: Generator, shape: tuple[int, ...]) -> Tensor:
    """Multiples of 1/8, a fifth of them -inf."""
    added = 0.125 * torch.randint(-8, 9, shape, generator=g).double()
    return added.masked_fill(torch.rand(shape, generator=g) < 0.2, -torch.inf)


def _bool_mask(g: Generator, shape: tuple[int, ...]) -> Tensor:
    """Nothing is allowed in the first row."""
    allowed = torch.rand(shape, generator=g) < 0.6
    allowed[:, :, :1] = False
    return allowed


def _token(
    B=1, H=2, Hkv=None, N=5, M=None, D=4, Dv=3, topk: Any = 2, causal=False, scale: float | None = None,
    straight_through=False, numbers=exact, mask: Callable[[Generator, tuple[int, ...]], Tensor] | None = None,
    mask_shape: tuple[int, ...] | None = None,
) -> Callable[[Generator], dict[str, Any]]:  # fmt: skip
    groups, keys = H if Hkv is None else Hkv, N if M is None else M

    def build(g: Generator) -> dict[str, Any]:
        return {
            "q": numbers(g, B, H, N, D),
            "k": numbers(g, B, groups, keys, D),
            "v": _normal(g, B, groups, keys, Dv),
            "topk": topk,
            "mask": None if mask is None else mask(g, (B, H, N, keys) if mask_shape is None else mask_shape),
            "causal": causal,
            "scale": scale,
            "straight_through": straight_through,
        }

    return build


def _no_near_tie(build: Callable[[Generator], dict[str, Any]]) -> Callable[[Generator], dict[str, Any]]:
    """Draws again until no two logits of a query are within 0.01: small steps then keep the same keys."""

    def again(g: Generator) -> dict[str, Any]:
        while True:
            values = build(g)
            q, k, mask = values["q"], values["k"], values["mask"]
            logits = token_logits(q, k, mask, values["causal"], values["scale"], torch.float64)
            gaps = logits.nan_to_num(neginf=-1e9).sort(-1).values.diff(dim=-1)
            if not ((gaps > 0) & (gaps < 0.01)).any():
                return values

    return again


def _soft(id: str, **options: Any) -> Sample:
    return Sample(id, _no_near_tie(_token(numbers=_normal, **options)), tiny=True, smooth=True)


_TOKEN = [
    _soft("smooth-mask", B=2, N=3, M=4, D=2, Dv=2, mask=_float_mask),
    _soft("smooth", N=3, M=5, D=3, Dv=2, topk=3),
    _soft("smooth-several", H=2, Hkv=1, N=3, M=5, D=2, Dv=2, topk=[1, 4, 2], causal=True, scale=0.7),
    _soft("smooth-shared-mask", B=2, N=2, M=5, D=2, Dv=1, topk=[2], mask=_float_mask, mask_shape=(1, 1, 1, 5)),
    Sample("ties", _token(H=3, N=70, M=600, D=24, Dv=6, topk=37)),
    Sample("most", _token(B=2, N=33, M=300, D=16, Dv=16, topk=250)),
    Sample("all", _token(N=20, M=65, D=8, Dv=40, topk=65)),
    Sample("more-than-all", _token(N=20, M=65, D=8, Dv=33, topk=2**40)),
    Sample("one-kept", _token(N=40, M=200, D=32, Dv=32, topk=1)),
    Sample("several", _token(B=2, H=4, Hkv=2, N=50, M=130, D=20, Dv=12, topk=[8, 100, 1, 65, 65])),
    Sample("groups", _token(B=2, H=6, Hkv=2, N=37, M=90, D=64, Dv=24, topk=11)),
    Sample("one-kv-head", _token(H=5, Hkv=1, N=30, M=70, D=7, Dv=5, topk=9, causal=True)),
    Sample("causal", _token(N=150, M=150, D=8, Dv=16, topk=20, causal=True)),
    Sample("causal-cross", _token(N=40, M=300, D=8, Dv=16, topk=[20, 5], causal=True)),
    Sample("bool-mask", _token(B=2, N=30, M=100, D=8, Dv=8, topk=12, mask=_bool_mask)),
    Sample("bool-mask-shared", _token(B=2, N=30, M=100, D=8, Dv=8, topk=12, mask=_bool_mask, mask_shape=(2, 1, 1, 100),
                                      causal=True)),
    Sample("float-mask", _token(B=2, H=4, Hkv=2, N=40, M=270, D=16, Dv=8, topk=30, scale=0.25, mask=_float_mask)),
    Sample("float-mask-heads", _token(B=3, H=2, N=20, M=40, D=16, Dv=8, topk=[30, 7], scale=0.25, mask=_float_mask,
                                      mask_shape=(1, 2, 20, 40))),
    Sample("float-mask-keys", _token(B=2, N=20, M=40, D=16, Dv=8, topk=9, scale=0.25, mask=_float_mask,
                                     mask_shape=(2, 1, 1, 40), causal=True)),
    Sample("bool-mask-queries", _token(B=2, N=35, M=20, D=16, Dv=8, topk=9, mask=_bool_mask, mask_shape=(1, 2, 35, 1))),
    Sample("straight-through", _token(B=2, H=4, Hkv=2, N=37, M=290, D=16, Dv=12, topk=20, straight_through=True)),
    Sample("straight-through-masks", _token(N=30, M=60, D=4, Dv=4, topk=[6], straight_through=True, scale=0.25,
                                            causal=True, mask=_float_mask), tiny=True),
    Sample("float32-values", _token(), tiny=True, keep=(("v", _FULL),)),
    Sample("float32-mask", _token(mask=_float_mask, scale=-0.25), tiny=True, keep=(("mask", _FULL),)),
    Sample("one", _token(H=1, N=1, M=1, D=1, Dv=1, topk=1), tiny=True),
    Sample("no-batch", _token(B=0), tiny=True, empty=True),
    Sample("no-heads", _token(H=0), tiny=True, empty=True),
    Sample("no-queries", _token(N=0, M=3), tiny=True, empty=True),
    Sample("no-keys", _token(M=0), tiny=True, empty=True),
    Sample("no-depth", _token(D=0), tiny=True, empty=True),
    Sample("no-values", _token(N=2, M=4, Dv=0, topk=[1, 3]), tiny=True, empty=True),
]  # fmt: skip

SAMPLES = {"region_attention": _REGION, "route_regions": _ROUTE, "topk_attention": _TOKEN}
