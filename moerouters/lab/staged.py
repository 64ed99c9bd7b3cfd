"""Training one model whose layers lie on several ranks, in a pipeline."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moerouters.errors import ConfigError, MoeroutersError
from moerouters.lab.attention import MixtureOfAttention
from moerouters.lab.batches import validation_windows
from moerouters.lab.corpus import Corpus
from moerouters.lab.ranks import Ranks
from moerouters.lab.roster import Entrant
from moerouters.lab.settings import Settings
from moerouters.lab.stage import NOISE, TARGET, TOKENS, Stage, stage_graph
from moerouters.lab.train import Trainer, Validation
from moerouters.losses import LossMode
from moerouters.metrics import max_violation
from moerouters.pipeline import Pipeline


class StagedTrainer(Trainer):
    """A Trainer on ranks with a pipeline: `model` is empty where other ranks have it.

    A micro-batch of the settings is a microbatch of the schedule. Histories are those of the whole model on every rank;
    time in routers is the mean over ranks.
    """

    loss_mode: ClassVar[LossMode] = "inject"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        pipeline, s = self.ranks.pipeline, self.settings
        assert pipeline is not None
        if self.handle is None:
            raise ConfigError("a dense model is not trained in a pipeline.", where="--pipeline", fix="take a router")
        self._layers = pipeline.layers_here(s.num_layers)
        self._stages = {stage: Stage(self.model, layers) for stage, layers in self._layers.items()}
        last = pipeline.schedule.num_stages - 1
        self.pipeline = Pipeline(
            pipeline.schedule,
            self._stages.__getitem__,
            _cross_entropy,
            group=pipeline.pipeline,
            graph=stage_graph(pipeline.schedule.num_stages),
            loss_takes=TARGET,
            shared={"embedding": [(0, "embedding.weight"), (last, "head.weight")]} if s.tied_head else None,
        )

    def _micro_batches(self, step: int) -> tuple[Tensor, Tensor]:
        M = self.settings.accumulation_steps
        windows, keys = zip(*(self._part_of_batch(step, index) for index in range(M)), strict=True)
        assert self.handle is not None
        self.handle.scale_losses(accumulation_steps=M)
        for layer in self.handle.layers.values():
            if isinstance(layer, MixtureOfAttention):
                layer.running.loss_scale.mul_(self.model.attention_loss)
        self.pipeline.stages.train()
        losses = self._run(torch.cat(windows), torch.stack(keys))
        return losses, self._take_loads(M)

    def _update(self) -> None:
        failure = None
        try:
            super()._update()
        except MoeroutersError as error:
            failure = error
        self.ranks.raise_together(failure)

    def _run(self, windows: Tensor, keys_Mn: Tensor, *, trains: bool = True) -> Tensor:
        """Cross-entropies of the microbatches, float64 [M]; zeros where another rank knows them."""
        windows, keys_Mn = windows.to(self.device), keys_Mn.to(self.device)
        parts = {TOKENS: windows[:, :-1], TARGET: windows[:, 1:], NOISE: keys_Mn}
        M = len(keys_Mn)
        autocast = self.settings.bf16 and self.device.type == "cuda"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=autocast):
            losses_M = self.pipeline.step(**parts) if trains else self.pipeline.evaluate(M, **parts)
        return torch.zeros(M, dtype=torch.float64, device=self.device) if losses_M is None else losses_M.double()

    def _take_loads(self, passes: int) -> Tensor:
        """int64 [passes, L, E] since the last call; zeros for the layers of other ranks."""
        s = self.settings
        loads = torch.zeros(passes, s.num_layers, s.num_experts, dtype=torch.int64, device=self.device)
        for stage, layers in self._layers.items():
            loads[:, layers.start : layers.stop] = self._stages[stage].take_loads()
        return loads

    def _loads_of_step(self) -> Tensor:
        assert self.handle is not None and self.ranks.pipeline is not None
        s = self.settings
        loads_LE = torch.zeros(s.num_layers, s.num_experts, dtype=torch.int64, device=self.device)
        for layers in self._layers.values():
            for layer in layers:
                loads_LE[layer] = self.handle.loads[f"blocks.{layer}.moe"]
        dist.all_reduce(loads_LE, group=self.ranks.pipeline.pipeline)
        return loads_LE

    def _router_ms(self) -> float:
        return float(self.ranks.sum(torch.tensor(super()._router_ms(), dtype=torch.float64))) / self.ranks.size

    @torch.no_grad()
    def validate(self) -> Validation:
        s = self.settings
        self.model.eval()
        self.pipeline.stages.eval()
        windows = validation_windows(self.corpus.validation, count=s.validation_sequences, length=s.sequence_length)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        loads_LE = torch.zeros(s.num_layers, s.num_experts, dtype=torch.float64, device=self.device)
        batches = list(torch.split(windows, s.micro_batch_size))
        while batches:  # as many at once as the schedule takes, of one size
            rows = len(batches[0])
            M = sum(len(batch) == rows for batch in batches[: s.accumulation_steps])
            parts = [self.ranks.part(batch) for batch in batches[:M]]
            losses_M = self._run(torch.cat(parts), torch.arange(M).unsqueeze(1), trains=False)
            total += losses_M.sum() * parts[0].shape[0] * s.sequence_length
            loads_LE += self._take_loads(M).sum(dim=0)
            batches = batches[M:]
        return Validation(
            loss=float(self.ranks.sum_over_tokens(total)) / (len(windows) * s.sequence_length),
            max_vio=float(max_violation(self.ranks.sum_over_tokens(loads_LE)).mean()),
        )

    def state(self) -> dict[str, Any]:
        """As a Trainer's; the optimizer's is a list, by rank of the pipeline."""
        own = super().state()
        assert self.ranks.pipeline is not None
        found: list[Any] = [None] * self.ranks.pipeline.size
        dist.all_gather_object(found, (own["model"], own["optimizer"]), group=self.ranks.pipeline.pipeline)
        weights = {name: value for model, _ in found for name, value in model.items()}
        return own | {"model": weights, "optimizer": [optimizer for _, optimizer in found]}

    def load_state(self, state: dict[str, Any]) -> None:
        assert self.ranks.pipeline is not None
        own = self.model.state_dict().keys()
        weights = {name: value for name, value in state["model"].items() if name in own}
        moments = state["optimizer"][self.ranks.pipeline.pipeline.rank()]
        super().load_state(state | {"model": weights, "optimizer": moments})


def make_trainer(
    entrant: Entrant | None,
    *,
    seed: int,
    settings: Settings,
    corpus: Corpus,
    device: torch.device,
    ranks: Ranks = Ranks(),  # noqa: B008  (frozen)
) -> Trainer:
    """The Trainer for these ranks."""
    kind = Trainer if ranks.pipeline is None else StagedTrainer
    return kind(entrant, seed=seed, settings=settings, corpus=corpus, device=device, ranks=ranks)


def _cross_entropy(logits_BSV: Tensor, target_BS: Tensor) -> Tensor:
    return F.cross_entropy(logits_BSV.float().flatten(0, 1), target_BS.flatten())
