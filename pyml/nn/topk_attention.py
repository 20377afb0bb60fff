"""Attention over selected keys: `BiLevelRoutingAttention` (regions of an image), `TopKAttention` (keys one by one).

Names and shapes of parameters are those of the public codes (BiFormer's module as LSNet uses it;
torch.nn.MultiheadAttention), so checkpoints load with ``strict=True``. A guide: docs/lsnet.md.
"""

from collections.abc import Sequence
from numbers import Integral
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyml import ops
from pyml.ops import _check


class _ProjectionNorm(nn.Module):
    """A 1 x 1 convolution without bias, then BatchNorm, on rows of channels ``[..., in] -> [..., out]``."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.c = nn.Conv2d(in_features, out_features, 1, bias=False)
        self.bn = nn.BatchNorm2d(out_features)

    def forward(self, rows: Tensor) -> Tensor:
        weight = self.c.weight.flatten(1)
        bn = self.bn
        if bn.training or bn.running_mean is None or bn.running_var is None:
            y = F.linear(rows, weight)
            return bn(y.reshape(-1, y.shape[-1], 1, 1)).view(y.shape)
        factor = bn.weight * torch.rsqrt(bn.running_var + bn.eps)  # BatchNorm with fixed statistics is one more matrix
        return F.linear(rows, weight * factor.unsqueeze(1), bn.bias - bn.running_mean * factor)


def _to_regions(x: Tensor, n: int) -> Tensor:
    """``[B, H, W, C]`` -> ``[B, n * n, S, C]``: n x n regions in row order, the S pixels of each in row order."""
    batch, height, width, channels = x.shape
    cut = x.reshape(batch, n, height // n, n, width // n, channels).transpose(2, 3)
    return cut.reshape(batch, n * n, height * width // n**2, channels)


def _to_image(x: Tensor, n: int, height: int, width: int) -> Tensor:
    """``[B, n * n, S, C]`` -> ``[B, C, H, W]``, the way back."""
    batch, channels = x.shape[0], x.shape[-1]
    cut = x.reshape(batch, n, n, height // n, width // n, channels).permute(0, 5, 1, 3, 2, 4)
    return cut.reshape(batch, channels, height, width)


class BiLevelRoutingAttention(nn.Module):
    """Every region of an image attends to the ``topk`` regions that are most like it on average.

    Args:
        dim: channels C.
        num_heads: heads; all share one routing. Divides dim and qk_dim.
        n_win: the image is cut into n_win x n_win regions, whatever its size.
        qk_dim: channels of queries and keys over all heads; None: dim.
        qk_scale: factor on the logits; None: qk_dim ** -0.5 (of all heads together, as in the public code).
        kv_per_win, kv_downsample_ratio, kv_downsample_kernel, kv_downsample_mode: only the mode ``"identity"``, where
            the other three mean nothing.
        topk: regions each region attends to, 1 to n_win ** 2. At n_win ** 2 this is dense attention.
        param_attention: ``"qkv"`` or ``"qkvo"``: no output projection exists here, as in LSNet.
        param_routing: only False.
        diff_routing: with soft_routing, whether the region weights have a gradient.
        soft_routing: multiply keys and values of a region by its weight: the softmax over the chosen regions' logits.
        side_dwconv: kernel size of the depthwise convolution on the values (``lepe``), odd; 0: none.
        auto_pad: sides that n_win does not divide are padded with zeros at the bottom and the right; False: refused.
        mask_padding: what padding does. False, as the public code: padded pixels are projected, are routed to and
            attended to, count in the batch statistics and reach the border pixels through ``lepe``. True: none of this.
        backend: force one backend for this layer, see `pyml.use_backend`.

    Shapes: ``[B, C, H, W] -> [B, C, H, W]`` in the dtype of the parameters, float32, float64, bfloat16 or float16 (the
    routing is in float32 whatever it is). State: ``to_q.c.weight [qk_dim, C, 1, 1]``, ``to_q.bn.*``,
    ``to_kv.c.weight [qk_dim + C, C, 1, 1]``, ``to_kv.bn.*``, ``lepe.weight [C, 1, k, k]``, ``lepe.bias``.
    In evaluation mode BatchNorm is folded into the projections. The routing has no gradient.
    Source: Zhu et al., "BiFormer", arXiv 2303.08810; the form of LSNet, arXiv 2405.16197.

    Raises:
        ValueError: one sentence naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        n_win: int = 7,
        qk_dim: int | None = None,
        qk_scale: float | None = None,
        kv_per_win: int = 4,
        kv_downsample_ratio: int = 4,
        kv_downsample_kernel: int | None = None,
        kv_downsample_mode: str = "identity",
        topk: int = 4,
        param_attention: str = "qkvo",
        param_routing: bool = False,
        diff_routing: bool = False,
        soft_routing: bool = False,
        side_dwconv: int = 3,
        auto_pad: bool = True,
        *,
        mask_padding: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        qk_dim = dim if qk_dim is None else qk_dim
        sizes = {"dim": dim, "num_heads": num_heads, "n_win": n_win, "qk_dim": qk_dim}
        dim, num_heads, n_win, qk_dim = (_check.integer(type(self).__name__, *size, 1) for size in sizes.items())
        for name, value in (("dim", dim), ("qk_dim", qk_dim)):
            if value % num_heads:
                self._fail(name, f"a multiple of num_heads = {num_heads}", value)
        expected = f"an integer from 1 to n_win * n_win = {n_win**2}"
        topk = _check.integer(type(self).__name__, "topk", topk, 1, n_win**2, expected)
        if not isinstance(side_dwconv, int) or side_dwconv < 0 or (side_dwconv and side_dwconv % 2 == 0):
            self._fail("side_dwconv", "0 or an odd integer", side_dwconv)
        _check.backend(type(self).__name__, backend)
        _check.member(type(self).__name__, "kv_downsample_mode", kv_downsample_mode, ("identity",))
        _check.member(type(self).__name__, "param_attention", param_attention, ("qkv", "qkvo"))
        if param_routing:
            self._fail("param_routing", "False", param_routing)
        if diff_routing and not soft_routing:
            self._fail("diff_routing", "soft_routing=True with it: the choice of regions has no gradient", diff_routing)
        self.dim, self.num_heads, self.n_win, self.qk_dim, self.topk = dim, num_heads, n_win, qk_dim, topk
        self.scale = qk_dim**-0.5 if qk_scale is None else qk_scale
        self.diff_routing, self.soft_routing = diff_routing, soft_routing
        self.auto_pad, self.mask_padding, self.backend = auto_pad, mask_padding, backend
        self.lepe = (
            nn.Conv2d(dim, dim, side_dwconv, padding=side_dwconv // 2, groups=dim) if side_dwconv else nn.Identity()
        )
        self.to_q = _ProjectionNorm(dim, qk_dim)
        self.to_kv = _ProjectionNorm(dim, qk_dim + dim)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, num_heads={self.num_heads}, n_win={self.n_win}, qk_dim={self.qk_dim}, topk={self.topk}, "
            f"mask_padding={self.mask_padding}"
        )

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[1] != self.dim:
            self._fail("x", f"[B, {self.dim}, H, W]", list(x.shape) if isinstance(x, Tensor) else type(x).__name__)
        if 0 in x.shape[2:]:
            self._fail("x", "at least one pixel", list(x.shape))
        _check.dtype_of_weights(type(self).__name__, "x", x, self.to_q.c.weight)
        height, width = x.shape[2:]
        n = self.n_win
        bottom, right = -height % n, -width % n
        if (bottom or right) and not self.auto_pad:
            self._fail("x", f"sides that n_win = {n} divides (auto_pad is off)", list(x.shape))
        pixels, margin = x.permute(0, 2, 3, 1), (0, 0, 0, right, 0, bottom)
        valid = None
        if self.mask_padding and (bottom or right):
            q, kv = (_to_regions(F.pad(project(pixels), margin), n) for project in (self.to_q, self.to_kv))
            inside = F.pad(x.new_ones(1, height, width, 1), margin)
            valid = _to_regions(inside, n)[..., 0] > 0  # [1, P, S]
        else:
            rows = _to_regions(F.pad(pixels, margin) if bottom or right else pixels, n)  # [B, P, S, C]
            q, kv = self.to_q(rows), self.to_kv(rows)
        k, v = kv[..., : self.qk_dim], kv[..., self.qk_dim :]
        y = _to_image(self._attend(q, k, v, valid), n, height + bottom, width + right)
        if not isinstance(self.lepe, nn.Identity):
            y = y + self.lepe(_to_image(v, n, height + bottom, width + right))
        return y[:, :, :height, :width]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None) -> Tensor:
        """Rows in regions ``[B, P, S, channels]`` -> ``[B, P, S, C]``; valid ``[1, P, S]`` or None."""
        batch = q.shape[0]
        index, weight = self._route(q, k, valid)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).permute(0, 3, 1, 2, 4) for t in (q, k, v))  # [B, H, P, S, D]
        mask = None if valid is None else valid.expand(batch, -1, -1)
        y = ops.region_attention(
            q, k, v, index, scale=self.scale, key_mask=mask, region_weight=weight, backend=self.backend
        )
        return y.permute(0, 2, 3, 1, 4).flatten(3)

    def _route(self, q: Tensor, k: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The chosen regions ``[B, 1, P, topk]`` and, with soft_routing, their weights."""
        batch, regions = q.shape[:2]
        if self.topk == regions and not self.soft_routing:  # dense: nothing to choose
            return torch.arange(regions, device=q.device).expand(batch, 1, regions, -1), None
        mask = None if valid is None else valid.expand(batch, -1, -1)
        options: dict[str, Any] = {"query_mask": mask, "key_mask": mask, "backend": self.backend}
        with torch.no_grad():
            index, logits = ops.route_regions(
                q.unsqueeze(1), k.unsqueeze(1), None, self.topk, scale=self.scale, return_logits=True, **options
            )
        if not self.soft_routing:
            return index, None
        if self.diff_routing:
            wide = torch.promote_types(q.dtype, torch.float32)
            count = q.shape[2] if valid is None else valid.sum(-1, keepdim=True).clamp(min=1)  # padded rows are 0
            mean_q, mean_k = (t.to(wide).sum(2) / count for t in (q, k))
            similar = (mean_q * self.scale @ mean_k.transpose(1, 2)).unsqueeze(1)
            chosen = similar.gather(3, index)
            logits = chosen if valid is None else chosen.masked_fill(logits == -torch.inf, -torch.inf)
        return index, logits.softmax(-1)

    def flops(self, shape: Sequence[int]) -> tuple[int, int]:
        """Operations for an input of this shape, and those of the two attention products among them.

        A multiply-add counts 2; softmax and normalisation are not counted. Padded pixels work like others.
        """
        batch, _, height, width = shape
        n = self.n_win
        tokens = (height + -height % n) * (width + -width % n)
        keys = tokens // n**2 * self.topk
        attention = 2 * tokens * keys * (self.qk_dim + self.dim)
        projections = 2 * tokens * self.dim * (2 * self.qk_dim + self.dim)
        routing = 0 if self.topk == n**2 else 2 * n**4 * self.qk_dim
        taps = 0 if isinstance(self.lepe, nn.Identity) else self.lepe.kernel_size[0] ** 2
        return batch * (attention + projections + routing + 2 * tokens * self.dim * taps), batch * attention

    def _fail(self, argument: str, expected: str, got: Any) -> NoReturn:
        _check.fail(type(self).__name__, argument, expected, got)


class TopKAttention(nn.Module):
    """Multi-head attention on the ``topk`` largest logits of every query; called as torch.nn.MultiheadAttention is.

    Args:
        embed_dim, num_heads, bias, kdim, vdim, batch_first: as torch.nn.MultiheadAttention, and with its parameters and
            initial values. There is no dropout.
        topk: keys a query keeps; where it has fewer, all. A list computes the attention for each and adds the results
            with learned weights (``mix``), as DRSformer does.
        kv_heads: heads of keys and values (grouped queries); divides num_heads. None: num_heads.
        straight_through: backward as if all keys were kept; one topk only.
        backend: force one backend for this layer, see `pyml.use_backend`.

    State: as torch.nn.MultiheadAttention, so its checkpoints load where kv_heads is None and topk is a number.
    Sources: Zhao et al., "Explicit Sparse Transformer", arXiv 1912.11637; Chen et al., "DRSformer", CVPR 2023.

    Raises:
        ValueError: one sentence naming the argument, what was expected and what came.
    """

    _qkv_same_embed_dim = False  # tells torch's encoder layers not to put dense attention in the place of forward
    in_proj_weight: nn.Parameter | None
    q_proj_weight: nn.Parameter
    k_proj_weight: nn.Parameter
    v_proj_weight: nn.Parameter
    in_proj_bias: nn.Parameter | None
    mix: nn.Parameter | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        topk: int | Sequence[int],
        bias: bool = True,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        *,
        kv_heads: int | None = None,
        straight_through: bool = False,
        backend: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kv_heads = num_heads if kv_heads is None else kv_heads
        sizes = {"embed_dim": embed_dim, "num_heads": num_heads, "kv_heads": kv_heads}
        embed_dim, num_heads, kv_heads = (_check.integer(type(self).__name__, *size, 1) for size in sizes.items())
        _check.backend(type(self).__name__, backend)
        if embed_dim % num_heads:
            self._fail("embed_dim", f"a multiple of num_heads = {num_heads}", embed_dim)
        if num_heads % kv_heads:
            self._fail("kv_heads", f"a divisor of num_heads = {num_heads}", kv_heads)
        several = list(topk) if isinstance(topk, Sequence) else [topk]
        if not several or not all(isinstance(n, Integral) and not isinstance(n, bool) and n >= 1 for n in several):
            self._fail("topk", "an integer >= 1 or a list of them", topk)
        several = [int(n) for n in several]
        if straight_through and isinstance(topk, Sequence):
            self._fail("straight_through", "False with several topk", straight_through)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.embed_dim, self.num_heads, self.kv_heads = embed_dim, num_heads, kv_heads
        self.topk = several if isinstance(topk, Sequence) else several[0]
        self.kdim, self.vdim = embed_dim if kdim is None else kdim, embed_dim if vdim is None else vdim
        self.batch_first, self.straight_through, self.backend = batch_first, straight_through, backend
        width = embed_dim // num_heads * kv_heads
        self.sizes = [embed_dim, width, width]
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        if self.kdim == self.vdim == embed_dim:
            shapes = {"in_proj_weight": (sum(self.sizes), embed_dim)}
        else:
            shapes = dict(zip(names[1:], zip(self.sizes, (embed_dim, self.kdim, self.vdim))))
        for name in names:
            weight = nn.Parameter(torch.empty(shapes[name], **options)) if name in shapes else None
            self.register_parameter(name, weight)
        self.register_parameter("in_proj_bias", nn.Parameter(torch.zeros(sum(self.sizes), **options)) if bias else None)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **options)
        mix = nn.Parameter(torch.full((len(several),), 1 / len(several), **options))
        self.register_parameter("mix", mix if isinstance(topk, Sequence) else None)
        for name in shapes:
            nn.init.xavier_uniform_(getattr(self, name))
        if bias:
            nn.init.zeros_(self.out_proj.bias)

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, kv_heads={self.kv_heads}, topk={self.topk}"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """``(output, None)``, with the arguments of torch.nn.MultiheadAttention.

        Args:
            query, key, value: ``[L, B, E]``, or ``[B, L, E]`` with batch_first, or ``[L, E]``.
            key_padding_mask: ``[B, S]`` (or ``[S]``), bool or floating; True, or -inf, where a key is to be ignored.
            need_weights: only False: the weights are never formed.
            attn_mask: ``[L, S]`` or ``[B * num_heads, L, S]``; bool, True where attending is forbidden, or added.
            average_attn_weights: without effect.
            is_causal: each query sees the keys up to its own position. Needs no attn_mask; with one, both hold. (torch
                takes it as a hint that attn_mask is the causal one, and there the result is the same.)

        All in the dtype of the parameters (float32, float64, bfloat16 or float16), or under autocast; so is the output.

        Raises:
            ValueError, TypeError: one sentence naming the argument, what was expected and what came.
        """
        if need_weights:
            self._fail("need_weights", "False: the attention weights are never formed", need_weights)
        given = {"query": (query, self.embed_dim), "key": (key, self.kdim), "value": (value, self.vdim)}
        for name, (t, width) in given.items():
            if not isinstance(t, Tensor) or t.dim() not in (2, 3) or t.dim() != query.dim() or t.shape[-1] != width:
                got = list(t.shape) if isinstance(t, Tensor) else type(t).__name__
                self._fail(name, f"[..., {width}] with 2 or 3 dimensions, as many as query", got)
            _check.dtype_of_weights(type(self).__name__, name, t, self.out_proj.weight)
        single = query.dim() == 2
        rows = [t.unsqueeze(0) if single else t if self.batch_first else t.transpose(0, 1) for t in (query, key, value)]
        if rows[1].shape[:2] != rows[2].shape[:2] or rows[0].shape[0] != rows[1].shape[0]:
            self._fail("key, value", "one length and the batch of query", [list(t.shape) for t in (key, value)])
        if self.in_proj_weight is None:
            weights: Sequence[Tensor] = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        else:
            weights = torch.split(self.in_proj_weight, self.sizes)
        biases = (None,) * 3 if self.in_proj_bias is None else torch.split(self.in_proj_bias, self.sizes)
        q, k, v = (
            F.linear(t, weight, bias).unflatten(-1, (count, -1)).transpose(1, 2)
            for t, weight, bias, count in zip(rows, weights, biases, (self.num_heads, self.kv_heads, self.kv_heads))
        )  # [B, H, N, D]
        mask = self._mask(key_padding_mask, attn_mask, q.shape, k.shape[2], q.dtype)
        y = ops.topk_attention(
            q, k, v, self.topk, mask=mask, causal=is_causal,
            straight_through=self.straight_through, backend=self.backend,
        )  # fmt: skip
        if self.mix is not None:
            y = torch.einsum("t,t...->...", self.mix.to(y.dtype), y)
        out = self.out_proj(y.transpose(1, 2).flatten(2))
        return (out.squeeze(0) if single else out if self.batch_first else out.transpose(0, 1)), None

    def _mask(
        self, padding: Tensor | None, attention: Tensor | None, shape: Sequence[int], keys: int, dtype: torch.dtype
    ) -> Tensor | None:
        """Both masks as one that broadcasts to ``[B, H, N, M]``: bool with True for allowed, or added to the logits."""
        batch, heads, queries, _ = shape
        found = []
        for name, mask in (("key_padding_mask", padding), ("attn_mask", attention)):
            if mask is not None and not isinstance(mask, Tensor):
                self._fail(name, "None or a tensor", type(mask).__name__)
            if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
                _check.fail(type(self).__name__, name, "a bool or a floating tensor", mask.dtype, TypeError)
        if padding is not None:
            padding = padding.unsqueeze(0) if padding.dim() == 1 else padding
            if padding.shape != (batch, keys):
                self._fail("key_padding_mask", f"[{batch}, {keys}]", list(padding.shape))
            found.append(padding[:, None, None])
        if attention is not None:
            if attention.shape == (queries, keys):
                found.append(attention[None, None])
            elif attention.shape == (batch * heads, queries, keys):
                found.append(attention.unflatten(0, (batch, heads)))
            else:
                self._fail(
                    "attn_mask", f"[{queries}, {keys}] or [{batch * heads}, {queries}, {keys}]", list(attention.shape)
                )
        if not found:
            return None
        if all(m.dtype == torch.bool for m in found):
            forbidden = found[0] if len(found) == 1 else found[0] | found[1]
            return ~forbidden
        added = [
            torch.zeros_like(m, dtype=dtype).masked_fill(m, -torch.inf) if m.dtype == torch.bool else m for m in found
        ]
        return added[0] if len(added) == 1 else added[0] + added[1]

    def _fail(self, argument: str, expected: str, got: Any) -> NoReturn:
        _check.fail(type(self).__name__, argument, expected, got)
