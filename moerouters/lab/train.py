"""Training one model under one router, one optimizer step at a time."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moerouters.errors import MoeroutersError
from moerouters.handle import Handle, attach
from moerouters.lab.batches import training_windows, validation_windows
from moerouters.lab.clock import RouterClock
from moerouters.lab.corpus import Corpus
from moerouters.lab.expert_ranks import local
from moerouters.lab.expert_state import with_experts
from moerouters.lab.history import History
from moerouters.lab.model import LanguageModel, ModelOutput
from moerouters.lab.ranks import Ranks
from moerouters.lab.roster import Entrant
from moerouters.lab.settings import Settings
from moerouters.layer import MoELayer
from moerouters.losses import LossMode
from moerouters.metrics import max_violation


@dataclass(frozen=True)
class Validation:
    """What the fixed held-out windows show, in eval mode."""

    loss: float
    """Mean cross-entropy in nats per byte."""
    max_vio: float
    """MaxVio of the loads of all windows together, mean over layers: MaxVio_global of arXiv:2408.15664. NaN in a dense
    model."""


class Trainer:
    """The model, optimizer and history of one run. `step` counts finished optimizer steps.

    entrant: None for a dense model, which has no `handle`, and a history without loads. num_parameters: of the
    whole model, also where this rank holds only some of its experts.
    """

    loss_mode: ClassVar[LossMode] = "collect"

    def __init__(
        self,
        entrant: Entrant | None,
        *,
        seed: int,
        settings: Settings,
        corpus: Corpus,
        device: torch.device,
        ranks: Ranks = Ranks(),  # noqa: B008  (frozen)
    ) -> None:
        self.settings, self.corpus, self.device, self.ranks, self.seed = settings, corpus, device, ranks, seed
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            routed = [] if entrant is None else [entrant] * settings.num_layers
            routers = [each.build(settings) for each in routed]
            of_attention = [each.build_for_attention(settings) for each in routed if settings.attention_experts > 1]
            torch.manual_seed(seed)  # again: the weights must not hang on what a router drew
            self.model = LanguageModel(settings, routers, of_attention).to(device)
        self.num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        ranks.spread(self.model)
        self.optimizer = _adamw(self.model, settings)
        self.handle: Handle | None = None
        if routers:
            self.handle = attach(self.optimizer, self.model, loss_mode=self.loss_mode, token_group=ranks.token_group)
        self.clock = RouterClock(self.handle.layers.values() if self.handle else (), device)
        self.history = History()

    @property
    def step(self) -> int:
        """Finished optimizer steps."""
        return len(self.history)

    def train_step(self) -> None:
        """One optimizer step. Raises NonFiniteLogits, naming the layer, or MoeroutersError for a loss that is NaN."""
        self.clock.take_ms()
        began = time.perf_counter()
        loss, loads_ALE = self.work(self.step)
        step_ms = (time.perf_counter() - began) * 1e3
        self._remember(loss, self.ranks.sum_over_tokens(loads_ALE), step_ms)

    def work(self, step: int) -> tuple[float, Tensor]:
        """Forward, backward and optimizer on the batches of that step, of which the history hears nothing.

        Returns the cross-entropy, and the loads [A, L, E] of this rank.
        """
        s = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(s, step)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        losses_A, loads_ALE = self._micro_batches(step)
        self.ranks.average_gradients(self.model)
        self.ranks.clip_gradients(self.model, s.clip_norm)
        self._update()
        loss = float(self.ranks.sum_over_tokens(losses_A.mean())) / self.ranks.shards
        if not math.isfinite(loss):
            raise MoeroutersError(
                f"the training loss of step {step + 1} is {loss}.",
                why="the logits of every gate are finite, so it is the model's output or a router's own loss",
                fix="lower the learning rate, or the coefficient of the router's loss",
            )
        return loss, loads_ALE

    def _update(self) -> None:
        """The optimizer's step; attach's hook checks the logits and updates the routers."""
        self.optimizer.step()

    def _micro_batches(self, step: int) -> tuple[Tensor, Tensor]:
        """Forward and backward of all: cross-entropies (float64 [A]) and loads [A, L, E] on this rank."""
        found = [self._micro_batch(step, index) for index in range(self.settings.accumulation_steps)]
        losses, loads = zip(*found, strict=True)
        return torch.stack(losses), torch.stack(loads)

    def _micro_batch(self, step: int, index: int) -> tuple[Tensor, Tensor]:
        """Forward and backward of one micro-batch: its cross-entropy (float64 0-d), its loads [L, E] on this rank."""
        cross_entropy_N, output = self._forward(*self._part_of_batch(step, index))
        cross_entropy = cross_entropy_N.mean()
        ((cross_entropy + output.aux_loss()) / self.settings.accumulation_steps).backward()  # type: ignore[no-untyped-call]
        return cross_entropy.detach().double(), _loads(output)

    def _part_of_batch(self, step: int, index: int) -> tuple[Tensor, Tensor]:
        """This rank's windows of a micro-batch, and the key of their noise."""
        s = self.settings
        windows = training_windows(
            self.corpus.train,
            seed=self.seed,
            step=step,
            micro_batch=index,
            count=s.micro_batch_size,
            length=s.sequence_length,
        )
        # Different tokens of a micro-batch must not get the same noise.
        noise_key = torch.tensor([self.seed, step, index * self.ranks.shards + self.ranks.shard])
        return self.ranks.part(windows), noise_key

    def _forward(self, windows: Tensor, noise_key: Tensor | None) -> tuple[Tensor, ModelOutput]:
        """float32 [N] cross-entropy of every byte, and what the model gave."""
        windows = windows.to(self.device)
        key = None if noise_key is None else noise_key.to(self.device)
        autocast = self.settings.bf16 and self.device.type == "cuda"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=autocast):
            output: ModelOutput = self.model(windows[:, :-1], key)
        logits_NV, targets_N = output.logits_BSV.float().flatten(0, 1), windows[:, 1:].flatten()
        return F.cross_entropy(logits_NV, targets_N, reduction="none"), output

    def _remember(self, loss: float, loads_ALE: Tensor, step_ms: float) -> None:
        history = self.history
        if self.handle is None:
            history.loads.append(loads_ALE.sum(dim=0))
        else:
            history.loads.append(self._loads_of_step().cpu())
        history.micro_max_vio.append(max_violation(loads_ALE).cpu())
        history.train_loss.append(torch.tensor(loss, dtype=torch.float64))
        history.step_ms.append(torch.tensor(step_ms, dtype=torch.float64))
        history.router_ms.append(torch.tensor(self._router_ms(), dtype=torch.float64))

    def _loads_of_step(self) -> Tensor:
        """int64 [L, E] that the latest update saw."""
        assert self.handle is not None
        loads, layers = self.handle.loads, self.handle.layers.items()
        return torch.stack([loads[name] for name, layer in layers if isinstance(layer, MoELayer)])

    def _router_ms(self) -> float:
        """What the latest step spent in routers."""
        return self.clock.take_ms()

    def validation_loss(self) -> float:
        """Mean cross-entropy in nats per byte over the fixed held-out windows."""
        return self.validate().loss

    @torch.no_grad()
    def validate(self) -> Validation:
        """Loss and balance over the fixed held-out windows."""
        s = self.settings
        self.model.eval()
        windows = validation_windows(self.corpus.validation, count=s.validation_sequences, length=s.sequence_length)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        layers = 0 if self.handle is None else s.num_layers
        loads_LE = torch.zeros(layers, s.num_experts, dtype=torch.float64, device=self.device)
        # Every rank makes the same number of forward passes, some with nothing in it: a router may talk to the others.
        for batch in torch.split(windows, s.micro_batch_size):
            cross_entropy_N, output = self._forward(self.ranks.part(batch), None)
            total += cross_entropy_N.double().sum()
            loads_LE += _loads(output)
        return Validation(
            loss=float(self.ranks.sum_over_tokens(total)) / (len(windows) * s.sequence_length),
            max_vio=float(max_violation(self.ranks.sum_over_tokens(loads_LE)).mean()),
        )

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on, and the history; loadable with weights_only=True.

        The same on every rank: a collective where experts are spread.
        """
        weights, moments = self.model.state_dict(), self.optimizer.state_dict()  # the routers' state is in the model's
        if self.ranks.experts is not None:
            change = self.ranks.experts.gathered
            weights, moments = with_experts(weights, moments, change, model=self.model, optimizer=self.optimizer)
        return {"model": weights, "optimizer": moments, "history": self.history.tensors()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned in a run of the same settings."""
        weights, moments = state["model"], state["optimizer"]
        if self.ranks.experts is not None:
            change = self.ranks.experts.cut
            weights, moments = with_experts(weights, moments, change, model=self.model, optimizer=self.optimizer)
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(moments)
        self.history = History.of(state["history"])


def learning_rate(settings: Settings, step: int) -> float:
    """Of the given step, counted from 0: linear warm-up, then a cosine down to `final_rate` of the peak."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return settings.learning_rate * (settings.final_rate + (1 - settings.final_rate) * cosine)


def _loads(output: ModelOutput) -> Tensor:
    """int64 [L, E] of the MoE layers; [0, 1] without one."""
    loads = [assignment.load_E for assignment in output.assignments]
    return torch.stack(loads) if loads else output.logits_BSV.new_zeros(0, 1, dtype=torch.int64)


def _adamw(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [p for p in parameters if p.dim() > 1]
    groups = [
        {"params": [p for p in matrices if local(p) is p], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    cut = [p for p in matrices if local(p) is not p]
    if cut:  # one fused update has either DTensors or none
        groups.append({"params": cut, "weight_decay": settings.weight_decay})
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, fused=True)
