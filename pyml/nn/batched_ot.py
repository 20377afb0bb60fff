"""Optimal transport between two sets of features: `OTAlignment`. The op under it: docs/batched_ot.md."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pyml import ops
from pyml.ops import _batched_ot_arguments as arguments
from pyml.ops import _check


class OTAlignment(nn.Module):
    """How well the local features of an image match the text features of each class, by optimal transport.

    For image b and class k the cost is C = 1 - cos(local[b, i], text[j, k]), M x N; all marginals are uniform. The
    similarity is <P, 1 - C> with the plan P of Sinkhorn's iteration.

    Args:
        local_dim: width Dv of local features that are still to be projected, by a linear layer of this module without
            bias; None: they lie in the joint space already.
        joint_dim: width D of the joint space, needed with local_dim.
        eps: regularisation, in units of the cost.
        max_iter: iterations of each problem (exactly, without ``tol``).
        tol: a problem stops when the L1 error of its marginals is at most this.
        plan_grad: ``"detach"``: the plan is a constant, as in PLOT. ``"implicit"``: its exact gradient at convergence.
        as_loss: forward gives a training loss instead, see below.
        weight: lambda, the factor on the transport discrepancy in that loss.
        logit_scale: factor on the similarities where they serve as logits of that loss.
        backend: force one backend, see `pyml.use_backend`.

    Shapes: local ``[B, M, D]`` (or ``[B, M, Dv]``), text ``[N, K, D]``: N features of each of K classes. Neither needs
    unit length. ``forward(local, text)`` -> similarities ``[B, K]``, between -1 and 1. With ``as_loss``
    ``forward(local, text, labels)`` -> a scalar: the mean over the images of cross entropy on ``logits`` (the scaled
    similarities, where none are given) plus ``weight`` times the regularised transport value between the image and its
    own class (`discrepancy`).
    The costs are computed in float32 (float64 if an input has it) under autocast too, by one matrix product, and
    solved where it leaves them.

    Sources: the similarity, eps and the iterations are those of PLOT (Chen et al., arXiv 2210.01253), whose code stops
    early by a mean over the batch, which this does not. Transport as a discrepancy beside the cross entropy follows
    EnLa (Cui et al., arXiv 2407.19674); its constants are not known to us.

    Raises:
        ValueError, TypeError: one sentence naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        local_dim: int | None = None,
        joint_dim: int | None = None,
        *,
        eps: float = 0.1,
        max_iter: int = 100,
        tol: float | None = None,
        plan_grad: str = "detach",
        as_loss: bool = False,
        weight: float = 1.0,
        logit_scale: float = 100.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if local_dim is not None and joint_dim is None:
            _check.fail("OTAlignment", "joint_dim", "the width of the joint space beside local_dim", None)
        for name, width in (("local_dim", local_dim), ("joint_dim", joint_dim)):
            if width is not None and (not isinstance(width, int) or isinstance(width, bool) or width < 1):
                _check.fail("OTAlignment", name, "an integer >= 1", repr(width))
        eps = arguments.positive("OTAlignment", "eps", eps)
        max_iter, tol, _ = arguments.check_options("OTAlignment", max_iter, tol, None)
        weight = arguments.positive("OTAlignment", "weight", weight, zero=True)
        logit_scale = arguments.positive("OTAlignment", "logit_scale", logit_scale)
        _check.member("OTAlignment", "plan_grad", plan_grad, ("detach", "implicit"))
        self.project = None if local_dim is None or joint_dim is None else nn.Linear(local_dim, joint_dim, bias=False)
        self.eps, self.max_iter, self.tol, self.plan_grad = eps, max_iter, tol, plan_grad
        self.as_loss, self.weight, self.logit_scale, self.backend = as_loss, weight, logit_scale, backend

    def forward(
        self,
        local: Tensor,
        text: Tensor,
        labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        logits: Tensor | None = None,
    ) -> Tensor:
        """Similarities, or the loss.

        Args:
            labels: int64 ``[B]``, the class of each image; only with ``as_loss``.
            mask: bool ``[B, M]``, True for the local features that count; others are not read. An image without any has
                similarity and discrepancy 0.
            logits: ``[B, K]``, what the cross entropy of the loss is taken on.
        """
        if not self.as_loss:
            for name, given in (("labels", labels), ("logits", logits)):
                if given is not None:
                    _check.fail("OTAlignment", name, "None without as_loss=True", "a tensor")
            return self.similarity(local, text, mask)
        if labels is None:
            _check.fail("OTAlignment", "labels", "the class of each image, with as_loss=True", None)
        value = self.discrepancy(local, text, labels, mask).mean()
        if logits is not None:
            _check.tensors("OTAlignment", local, first_name="local", logits=logits)
            _check.shape("OTAlignment", "logits", logits, (len(local), text.shape[1]), "[B, K]")
        if logits is None:
            logits = self.logit_scale * self.similarity(local, text, mask)
        return F.cross_entropy(logits, labels) + self.weight * value

    def similarity(self, local: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        """<P, 1 - C> of every image and class, ``[B, K]``: B K problems of M x N in one call."""
        local, text, dtype = self._features(local, text, mask)
        (batch, places, _), (texts, classes, _) = local.shape, text.shape
        cost = _one_minus(local.flatten(0, 1), text.flatten(0, 1))
        cost = cost.view(batch, places, texts, classes).permute(0, 3, 1, 2)  # read where the product left it
        found = self._solve(cost, None if mask is None else mask.unsqueeze(1))
        return (found.row_mass.sum(-1) - found.transport_cost).to(dtype)

    def discrepancy(self, local: Tensor, text: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """The regularised transport value between each image and the texts of its own class, ``[B]``."""
        local, text, dtype = self._features(local, text, mask)
        if not isinstance(labels, Tensor) or labels.shape != local.shape[:1] or labels.dtype != torch.int64:
            got = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
            _check.fail("OTAlignment", "labels", f"int64 [B] = [{len(local)}]", got)
        classes = text.shape[1]
        if arguments.readable(labels) and bool(((labels < 0) | (labels >= classes)).any()):
            _check.fail("OTAlignment", "labels", f"classes from 0 to {classes - 1}", labels.tolist())
        own = text[:, labels].transpose(0, 1)
        return self._solve(_one_minus(local, own), mask).value.to(dtype)

    def _features(self, local: Tensor, text: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, torch.dtype]:
        """Both as unit vectors in full precision, masked places as zeros, and the dtype of the result."""
        _check.tensors("OTAlignment", local, first_name="local", text=text)
        if local.dim() != 3:
            _check.fail("OTAlignment", "local", "[B, M, D]", list(local.shape))
        if text.dim() != 3:
            _check.fail("OTAlignment", "text", "[N, K, D]", list(text.shape))
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != local.shape[:2]:
                got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
                _check.fail("OTAlignment", "mask", f"bool [B, M] = {list(local.shape[:2])}", got)
            local = local.masked_fill(~mask.unsqueeze(-1), 0)  # or a NaN there would reach the gradient of the text
        if self.project is not None:
            if local.shape[-1] != self.project.in_features:
                _check.fail("OTAlignment", "local", f"[B, M, {self.project.in_features}]", list(local.shape))
            local = self.project(local)
        if local.shape[-1] != text.shape[-1]:
            _check.fail("OTAlignment", "text", f"[N, K, {local.shape[-1]}], as wide as local", list(text.shape))
        dtype = torch.promote_types(local.dtype, text.dtype)
        wide = torch.promote_types(dtype, torch.float32)
        return F.normalize(local.to(wide), dim=-1), F.normalize(text.to(wide), dim=-1), dtype

    def _solve(self, cost: Tensor, rows: Tensor | None) -> ops.SinkhornResult:
        return ops.sinkhorn(
            cost, eps=self.eps, max_iter=self.max_iter, tol=self.tol, plan_grad=self.plan_grad, backend=self.backend,
            mask=None if rows is None else (rows, None),
        )  # fmt: skip

    def extra_repr(self) -> str:
        more = f", as_loss=True, weight={self.weight:g}" if self.as_loss else ""
        return f"eps={self.eps:g}, max_iter={self.max_iter}, plan_grad={self.plan_grad!r}{more}"


def _one_minus(x: Tensor, y: Tensor) -> Tensor:
    """1 - x y^T, ``[..., n, m]``, in the dtype of x whatever autocast says; the 1 goes into the product."""
    with torch.autocast(x.device.type, enabled=False):
        if x.dim() == 2:
            return torch.addmm(x.new_ones(()), x, y.T, alpha=-1)
        return torch.baddbmm(x.new_ones(()), x, y.transpose(1, 2), alpha=-1)
