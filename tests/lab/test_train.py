import math

import pytest
import torch

from moerouters import RouterSpec, registry
from moerouters.errors import MoeroutersError, NonFiniteLogits
from moerouters.lab.batches import validation_windows
from moerouters.lab.corpus import Corpus
from moerouters.lab.determinism import deterministic
from moerouters.lab.history import History
from moerouters.lab.train import Trainer, learning_rate
from moerouters.metrics import max_violation
from support.balanced import Balanced
from support.lab import SMALL, trainer


def trained(trainer: Trainer, steps: int = 4) -> History:
    for _ in range(steps):
        trainer.train_step()
    return trainer.history


def same(first: History, second: History) -> bool:
    one, two = first.tensors(), second.tensors()
    return all(torch.equal(one[name], two[name]) for name in ("loads", "micro_max_vio", "train_loss"))


def test_same_seed_same_bits(corpus: Corpus, balanced: None) -> None:
    first, second, other = (trainer(corpus, "balanced", seed=seed) for seed in (3, 3, 4))
    torch.rand(5)  # the global generator has no part in it
    assert same(trained(first), trained(second))
    assert not same(first.history, trained(other))
    assert first.validation_loss() == second.validation_loss()


def test_every_router_starts_from_the_same_weights(corpus: Corpus) -> None:
    def greedy(gating: object, config: object) -> Balanced:
        torch.rand(100)  # draws from the generator that weights are drawn from
        return Balanced(gating)  # type: ignore[arg-type]

    with registry.temporary(RouterSpec(name="greedy", summary="Draws.", factory=greedy, api="0.1")):
        one, two = trainer(corpus), trainer(corpus, "greedy")
    weights = dict(two.model.named_parameters())
    assert all(torch.equal(weights[name], weight) for name, weight in one.model.named_parameters())


def test_loads_are_those_of_the_whole_batch(corpus: Corpus) -> None:
    history = trained(trainer(corpus), steps=2)
    loads_SLE = history.tensors()["loads"]
    assert loads_SLE.dtype == torch.int64
    assert loads_SLE.shape == (2, SMALL.num_layers, SMALL.num_experts)
    assert loads_SLE.sum(-1).unique().tolist() == [SMALL.batch_tokens * SMALL.top_k]


def test_micro_batches_are_measured_apart(corpus: Corpus) -> None:
    accumulated = trained(trainer(corpus), steps=1).tensors()
    assert accumulated["micro_max_vio"].shape == (1, 2, SMALL.num_layers)
    whole = SMALL.override({"accumulation_steps": 1})
    single = trained(trainer(corpus, settings=whole), steps=1).tensors()
    torch.testing.assert_close(single["micro_max_vio"][0, 0], max_violation(single["loads"][0]))


def test_accumulation_is_the_mean_gradient(corpus: Corpus, balanced: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against one backward pass over the sum of both micro-batches' losses."""
    run, reference = trainer(corpus, "balanced"), trainer(corpus, "balanced")
    monkeypatch.setattr(run.optimizer, "step", lambda: None)  # keeps the gradients, and the weights, as they are
    monkeypatch.setattr(run, "_remember", lambda *args: None)
    run.settings = run.settings.model_copy(update={"clip_norm": 1e9})
    run.train_step()
    total = torch.zeros(())
    for index in range(2):
        windows = _windows(reference, index)
        cross_entropy_N, output = reference._forward(windows, torch.tensor([0, 0, index]))
        total = total + (cross_entropy_N.mean() + output.aux_loss()) / 2
    total.backward()
    gradients = dict(reference.model.named_parameters())
    for name, parameter in run.model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-5, atol=1e-7)


def _windows(run: Trainer, index: int) -> torch.Tensor:
    from moerouters.lab.batches import training_windows

    s = run.settings
    return training_windows(
        run.corpus.train, seed=0, step=0, micro_batch=index, count=s.micro_batch_size, length=s.sequence_length
    )


def test_it_learns(corpus: Corpus) -> None:
    run = trainer(corpus, settings=SMALL.override({"steps": 60}))
    before = run.validation_loss()
    trained(run, steps=60)
    assert before == pytest.approx(math.log(256), abs=0.2)
    assert run.validation_loss() < 3


def test_global_balance_is_of_all_held_out_text_together(corpus: Corpus) -> None:
    run = trainer(corpus)
    s = run.settings
    windows = validation_windows(corpus.validation, count=s.validation_sequences, length=s.sequence_length)
    run.model.eval()
    with torch.no_grad():
        at_once = run.model(windows[:, :-1])
    loads_LE = torch.stack([assignment.load_E for assignment in at_once.assignments])
    assert len(windows) > s.micro_batch_size
    assert run.validate().max_vio == pytest.approx(float(max_violation(loads_LE).mean()))


def test_state_continues_to_the_same_bits(corpus: Corpus, balanced: None) -> None:
    whole, first, second = (trainer(corpus, "balanced") for _ in range(3))
    trained(whole, 5)
    trained(first, 2)
    second.load_state(first.state())
    assert second.step == 2
    trained(second, 3)
    assert same(whole.history, second.history)
    assert whole.validation_loss() == second.validation_loss()
    states = [dict(run.model.state_dict()) for run in (whole, second)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert any(name.endswith("b_E") and bool(value.any()) for name, value in states[0].items())


def test_evaluation_leaves_the_run_alone(corpus: Corpus, balanced: None) -> None:
    quiet, asked = trainer(corpus, "balanced"), trainer(corpus, "balanced")
    for run in (quiet, asked):
        trained(run, 2)
        if run is asked:
            run.validation_loss()
        trained(run, 2)
    assert same(quiet.history, asked.history)


def test_one_token(corpus: Corpus) -> None:
    one = SMALL.override({"sequence_length": 1, "micro_batch_size": 1, "accumulation_steps": 1})
    run = trainer(corpus, settings=one)
    loads_SLE = trained(run, 2).tensors()["loads"]
    assert loads_SLE.sum(-1).unique().tolist() == [SMALL.top_k]
    assert math.isfinite(run.validation_loss())


def test_every_expert_for_every_token(corpus: Corpus) -> None:
    run = trainer(corpus, settings=SMALL.override({"top_k": 4}))
    loads_SLE = trained(run, 2).tensors()["loads"]
    assert loads_SLE.unique().tolist() == [SMALL.batch_tokens]


def test_nan_logits_name_the_layer(corpus: Corpus) -> None:
    run = trainer(corpus)
    trained(run, 1)
    with torch.no_grad():
        run.model.blocks[1].moe.gate.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteLogits, match=r"layer 'blocks\.1\.moe'"):
        run.train_step()
    assert run.step == 1


def test_nan_loss_without_nan_logits(corpus: Corpus) -> None:
    run = trainer(corpus, settings=SMALL.override({"tied_head": False}))
    with torch.no_grad():
        run.model.head.weight[0, 0] = float("nan")
    with pytest.raises(MoeroutersError, match="the training loss of step 1 is nan"):
        run.train_step()


def test_learning_rate() -> None:
    s = SMALL.override({"steps": 100, "warmup_steps": 10, "learning_rate": 1.0, "final_rate": 0.1})
    assert [learning_rate(s, step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert learning_rate(s, 55) == pytest.approx(0.55)
    assert learning_rate(s, 100) == pytest.approx(0.1)
    rates = [learning_rate(s, step) for step in range(10, 101)]
    assert rates == sorted(rates, reverse=True)
    assert learning_rate(SMALL.override({"steps": 1, "warmup_steps": 1}), 1) == SMALL.learning_rate


def test_matrices_alone_decay(corpus: Corpus) -> None:
    run = trainer(corpus)
    decaying = [p for group in run.optimizer.param_groups for p in group["params"] if group["weight_decay"] > 0]
    assert decaying
    assert all(parameter.dim() > 1 for parameter in decaying)
    assert sum(len(group["params"]) for group in run.optimizer.param_groups) == len(list(run.model.parameters()))


@pytest.mark.parametrize("enabled", [False, True])
def test_deterministic_mode_is_restored(enabled: bool) -> None:
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(enabled, warn_only=enabled)
    try:
        with pytest.raises(KeyError), deterministic():
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
            raise KeyError
        assert torch.are_deterministic_algorithms_enabled() is enabled
        assert torch.is_deterministic_algorithms_warn_only_enabled() is enabled
        assert torch.utils.deterministic.fill_uninitialized_memory is before
    finally:
        torch.use_deterministic_algorithms(False)


def test_router_time_is_a_part_of_step_time(corpus: Corpus, balanced: None) -> None:
    tensors = trained(trainer(corpus, "balanced"), 3).tensors()
    assert bool((tensors["router_ms"] > 0).all())
    assert bool((tensors["router_ms"] < tensors["step_ms"]).all())
