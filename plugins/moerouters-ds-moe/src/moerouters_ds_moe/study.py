"""A study: lab models trained densely, each with another coefficient of the loss, and the sweep of each.

python -m moerouters_ds_moe sweep study.json
python -m moerouters_ds_moe render study.json study.svg
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from moerouters.errors import ConfigError
from moerouters.lab.compare import environment
from moerouters.lab.corpus import Corpus, CorpusInfo
from moerouters.lab.determinism import deterministic
from moerouters.lab.files import write_text
from moerouters.lab.presets import preset
from moerouters.lab.ranks import Ranks
from moerouters.lab.results import Environment
from moerouters.lab.roster import named_roster
from moerouters.lab.settings import Settings
from moerouters.lab.train import Trainer
from moerouters_ds_moe.curves import Curve, Rule, sweep
from moerouters_ds_moe.modes import train_dense
from moerouters_ds_moe.peers import Against, Peer, against, train_peer

CHANGES: Mapping[str, Any] = {
    "num_experts": 16,
    "expert_size": 64,
    "renormalize": False,
    "scale": 4.0,
    "validation_sequences": 128,
}
"""What differs from the preset: plain weights, as in the paper, but with a factor: experts that have a small part of
the output each learn slowly at first. 32 experts of width 32 reach a loss of 1.744 without one (240 steps, alpha 0.01),
of 1.657 with 4, of 1.668 with 16."""


class Study(BaseModel):
    """What was trained, where, and a curve per coefficient alpha."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal[1] = 1
    settings: Settings
    seed: int
    corpus: CorpusInfo
    environment: Environment
    curves: dict[str, Curve]
    """By alpha, as it was written."""
    peers: tuple[Peer, ...] = ()
    """Dense models, if some were asked for."""
    against: dict[str, Against] = {}
    """By alpha: the layers' time against the MLPs of a dense model with the same loss, where the peers reach it."""

    @classmethod
    def load(cls, path: Path) -> Study:
        """Raises ConfigError for anything but a study."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise ConfigError(
                f"'{path}' is no study of ds-moe.", why=str(error), fix="pass what `sweep` wrote"
            ) from error

    def save(self, path: Path) -> None:
        """Write it whole, or leave what was there."""
        write_text(path, self.model_dump_json(indent=1) + "\n")


def settings_of(preset_name: str, changes: Mapping[str, Any]) -> Settings:
    """A preset of the lab with CHANGES and those of the caller."""
    return preset(preset_name).override({**CHANGES, **changes})


def run_study(
    settings: Settings,
    alphas: Sequence[str],
    corpus: Corpus,
    *,
    seed: int = 0,
    rules: Sequence[Rule] | None = None,
    peers: Sequence[int] = (),
    told: Callable[[str], None] = lambda line: None,
) -> Study:
    """Train a model per alpha, on the CPU, and sweep it; peers: and a dense model for each of these widths, whose MLPs
    its layers are timed against. told: gets a line now and then."""
    corpus.require(settings.sequence_length)
    curves, timed, dense = {}, {}, []
    with deterministic():
        for width in peers:
            dense.append(train_peer(settings, width, corpus, seed=seed))
            told(f"dense, {width} wide: loss {dense[-1].loss:.4f}")
        for alpha in alphas:
            (entrant,) = named_roster(f"ds-moe:alpha={alpha}", settings)
            trainer = Trainer(entrant, seed=seed, settings=settings, corpus=corpus, device=torch.device("cpu"))
            train_dense(trainer.model)
            while trainer.step < settings.steps:
                trainer.train_step()
                if trainer.step % 40 == 0:
                    told(f"alpha={alpha}, step {trainer.step}: loss {float(trainer.history.train_loss[-1]):.3f}")
            curves[alpha] = _swept(trainer, rules)
            told(summary_of(alpha, curves[alpha]))
            found = against(trainer, curves[alpha], dense)
            if found is not None:
                timed[alpha] = found
                told(against_text(alpha, found))
    where = environment(torch.device("cpu"), settings, Ranks())
    return Study(
        settings=settings,
        seed=seed,
        corpus=corpus.info,
        environment=where,
        curves=curves,
        peers=tuple(dense),
        against=timed,
    )


def _swept(trainer: Trainer, rules: Sequence[Rule] | None) -> Curve:
    return sweep(trainer.model, lambda _: trainer.validation_loss(), rules)


def against_text(alpha: str, found: Against) -> str:
    """One line: the dense model that it is as good as, and how long its layers take."""
    better = found.loss < found.best_peer
    as_good = "better than the best dense model, of width" if better else "as good as a dense model of width"
    return f"alpha={alpha}: {as_good} {found.width}, whose MLPs' time its layers take {found.over_mlps.value:.2f} times"


def summary_of(alpha: str, curve: Curve, *, share: float = 0.4) -> str:
    """One line: how near to its dense perplexity a model stays with this share of its parameters."""
    best = curve.best_within(share)
    if best is None:
        return f"alpha={alpha}: no rule leaves at most {share:.0%} of the parameters active"
    return (
        f"alpha={alpha}: dense loss {curve.dense_loss:.4f}; with {curve.part(best):.0%} of the parameters active, "
        f"{best.expert_share:.0%} of the experts, perplexity is {curve.perplexity_ratio(best):.4f} of that"
    )
