"""`moerouters bench balance`: what balancers add to a layer's step, and BIP's dual over torch's order statistics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from moerouters.bench.case import Build, Case, Request, Run, Unavailable
from moerouters.bench.routing import context, router_of
from moerouters.bench.timing import Ratio, median_of
from moerouters.bench.weights import normal
from moerouters.errors import MoeroutersError
from moerouters.kernels.dual import dual_update
from moerouters.kernels.overshoot import overshoot

STEP, DUAL = "step", "dual"
LAYER = "layer"
ITERATIONS = 4
_SMALL = 8
"""Width of the layers in which routers are compared: all of a step but the experts' work."""


def balance_cases(request: Request) -> Iterator[Case]:
    """Both tables."""
    for shape in request.shapes:
        if not shape.gate_only:
            yield StepCase(request, shape)
        yield DualCase(request, shape)


class StepCase(Case):
    """The extra time of a balancer as a share of a layer's step: forward, backward, and `attach`'s update.

    A few percent drown in the noise of whole layers. So each balancer runs in a layer of width 8, which has the same
    tokens, experts and bookkeeping, and what it takes longer there than `topk` is divided by the step of the real
    layer, both of the same round. Optimizers hold the gate alone: the step of a real one would make shares smaller.
    """

    baselines = (LAYER, "topk")
    passes = STEP

    def builds(self) -> Mapping[str, Build]:
        from moerouters import available

        whole: dict[str, Build] = {LAYER: partial(self._step, "topk", self.shape.D, self.shape.F)}
        return whole | {
            name: partial(self._step, name, _SMALL, _SMALL) for name in sorted(available(), key=lambda n: n != "topk")
        }

    def over(self, name: str, samples: Mapping[str, Sequence[float]]) -> dict[str, Ratio]:
        if name in self.baselines:
            return {}
        rounds = zip(samples[name], samples["topk"], samples[LAYER], strict=True)
        return {"layer_step": median_of([(mine - plain) / layer for mine, plain, layer in rounds])}

    def _step(self, name: str, width: int, expert_size: int) -> Run:
        from moerouters import MoELayer, attach

        dtype = self.request.torch_dtype
        torch.manual_seed(0)
        try:
            layer = MoELayer(router_of(name, self.shape), hidden_size=width, expert_size=expert_size).to(
                self.device, dtype
            )
            optimizer = torch.optim.SGD([layer.gate.weight], lr=0.0)
            attach(optimizer, layer)
        except MoeroutersError as error:
            raise Unavailable(str(error).splitlines()[0]) from error
        x_TD = normal(self.shape.T, width, device=self.device, dtype=dtype).requires_grad_()
        grad_TD = normal(self.shape.T, width, device=self.device, dtype=dtype, seed=2)

        ctx = replace(context(self.shape, device=self.device), hidden_TD=x_TD.detach())

        def run() -> None:
            hidden, assignment = layer(x_TD, ctx)
            losses = list(assignment.losses.values())
            torch.autograd.backward([hidden, *losses], [grad_TD, *(torch.ones_like(loss) for loss in losses)])
            optimizer.step()
            for tensor in (x_TD, *layer.parameters()):
                tensor.grad = None

        return run


class DualCase(Case):
    """q of BIP after 4 iterations, from softmax scores and q = 0: core's operation, over torch.topk and kthvalue."""

    baselines = ("topk_kthvalue",)
    passes = DUAL
    dtype = "float32"

    def builds(self) -> Mapping[str, Build]:
        return {"topk_kthvalue": self._plain, "dual_update": self._ours}

    def _scores(self) -> Tensor:
        return torch.softmax(normal(self.shape.T, self.shape.E, device=self.device), dim=-1)

    def _expect_ranks(self) -> None:
        """Raise Unavailable where an order statistic of `plain_dual` would lie outside the tokens."""
        T, E, K = self.shape.T, self.shape.E, self.shape.K
        if K >= E or not 1 <= (2 * T * K + E) // (2 * E) < T:
            raise Unavailable("too few tokens, or K = E: there is nothing to solve")

    def _plain(self) -> Run:
        self._expect_ranks()
        return partial(plain_dual, self._scores(), top_k=self.shape.K, iterations=ITERATIONS)

    def _ours(self) -> Run:
        self._expect_ranks()
        scores_TE = self._scores()
        start_E = torch.zeros(self.shape.E, device=self.device)

        def run() -> Tensor:
            return dual_update(scores_TE, start_E, top_k=self.shape.K, iterations=ITERATIONS, centred=True)

        expected = plain_dual(scores_TE, top_k=self.shape.K, iterations=ITERATIONS)
        if not torch.equal(run(), expected):
            raise Unavailable("its q has other bits than that of topk and kthvalue")
        return run


def plain_dual(scores_TE: Tensor, *, top_k: int, iterations: int) -> Tensor:
    """q_E of BIP (arXiv:2502.15451), thresholds halfway between neighbours and steps that go further near balance, with
    torch's order statistics. K < E."""
    T, E = scores_TE.shape
    doubled = 2 * T * top_k + E
    rank, fraction = doubled // (2 * E), torch.tensor(doubled % (2 * E)).to(scores_TE) / (2 * E)
    q_E = scores_TE.new_zeros(E)
    tokens = torch.tensor(T, device=scores_TE.device)
    for n in range(iterations):
        top_TK = (scores_TE - q_E).topk(top_k + 1, dim=-1).values
        p_T = (top_TK[:, -2] + top_TK[:, -1]) / 2
        excess_ET = (scores_TE - p_T.unsqueeze(1)).t().contiguous()
        upper_E = excess_ET.kthvalue(T - rank + 1, dim=1).values
        lower_E = excess_ET.kthvalue(T - rank, dim=1).values
        new_E = upper_E + (lower_E - upper_E) * fraction
        if n:
            wanted_E = (excess_ET > q_E.unsqueeze(1)).sum(dim=1)
            new_E = new_E + overshoot(wanted_E, tokens, top_k).to(new_E.dtype) * (new_E - q_E)
        q_E = new_E - new_E.mean()
    return q_E
