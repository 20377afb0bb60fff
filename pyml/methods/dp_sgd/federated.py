"""Federated averaging with privacy of clients: each client trains on its own records, the server adds noise to the sum.

What a client sends takes the place of a record's gradient, so clip, noise and accounting are those of the other arms,
with clients for records. Here updates are clipped where they are added up. That gives the sums of clients which clip
their own; those would need the scale beside the weights. Either way the server that adds the noise is trusted.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pyml.methods._engine import epoch_generator
from pyml.methods.dp_sgd.data import Records
from pyml.optim import PoissonBatches

Round = list[int]


class Clients:
    """The private records in equal parts, drawn by a seed.

    Args:
        rate, size, passes: of each client's SGD: learning rate, records a step, passes over its records.
    """

    def __init__(self, records: Records, count: int, split_seed: int, *, rate: float, size: int, passes: int) -> None:
        order = torch.randperm(len(records), generator=torch.Generator().manual_seed(split_seed))
        self.parts = [records.take(part) for part in order.tensor_split(count)]
        self.rate, self.size, self.passes = rate, size, passes

    def __len__(self) -> int:
        return len(self.parts)

    def update(self, net: nn.Module, client: int) -> tuple[list[Tensor], Tensor]:
        """What the client's training took away from each parameter, and its loss before (a 0-d tensor)."""
        start = {name: p.detach() for name, p in net.named_parameters()}
        part = self.parts[client]
        own, first = start, torch.zeros((), device=part.images.device)
        for number in range(self.passes):
            for step, batch in enumerate(part.parts(self.size)):
                own = {name: p.requires_grad_() for name, p in own.items()}
                loss = nn.functional.cross_entropy(functional_call(net, own, (batch.images,)), batch.labels)
                grads = torch.autograd.grad(loss, list(own.values()))
                own = {name: p.detach() - self.rate * g for (name, p), g in zip(own.items(), grads)}
                if number == step == 0:
                    first = loss.detach()
        return [start[name].detach() - own[name] for name in start], first

    def loss(self, net: nn.Module, chosen: Round) -> tuple[Tensor, dict[str, Tensor]]:
        """As `fit` wants it, with the updates left in ``grad_sample``, and their mean as the gradient without privacy.

        The updates are no gradients of one scalar, so what is returned has a gradient of 0.
        """
        params = list(net.parameters())
        found = [self.update(net, client) for client in chosen]
        for i, p in enumerate(params):
            sent = [update[i] for update, _ in found]
            p.grad_sample = torch.stack(sent) if sent else p.new_zeros((0, *p.shape))  # type: ignore[attr-defined]
            p.grad = p.grad_sample.sum(0) / max(len(sent), 1)  # type: ignore[attr-defined]
        total = sum((first for _, first in found), params[0].new_zeros(()))
        count = params[0].new_tensor(float(len(chosen)))
        zero = torch.stack([(p * 0).sum() for p in params]).sum()
        return zero, {"loss": total, "count": count}


def rounds(clients: int, share: float, seed: int) -> Callable[[int], Iterable[Round]]:
    """Rounds of an epoch for training without privacy: each client takes part with the same chance."""

    def of(epoch: int) -> Iterator[Round]:
        generator = epoch_generator(seed, epoch)
        for _ in range(steps_an_epoch(share)):
            drawn = torch.rand(clients, generator=generator) < share
            yield drawn.nonzero().flatten().tolist()

    return of


def steps_an_epoch(share: float) -> int:
    """As many as there are Poisson batches."""
    return len(PoissonBatches(1, share))
