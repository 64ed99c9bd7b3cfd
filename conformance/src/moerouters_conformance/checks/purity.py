"""Purity: a forward gives the same bits whenever it is repeated, and leaves nothing behind."""

from __future__ import annotations

import random
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from moerouters import Assignment, MoELayer, attach
from moerouters_conformance.case import PER_TOKEN, Batch, Case, make_batch, warm_up_logits
from moerouters_conformance.compiling import BACKEND_BITS, compare_compiled, well_separated_logits
from moerouters_conformance.forall import forall
from moerouters_conformance.profile import Cost, Profile
from moerouters_conformance.readings import expect_close, expect_same_bits, state_of, tensors_of
from moerouters_conformance.requirements import FULLGRAPH
from moerouters_conformance.rule import Group, RuleBook
from moerouters_conformance.snapshots import (
    deterministic_algorithms,
    expect_unchanged,
    generators_kept,
    logits_gradient,
    quiet,
    snapshot,
)
from moerouters_conformance.strategies import cases
from moerouters_conformance.subject import Subject, blame
from moerouters_conformance.violation import Violation

book = RuleBook(Group.PURITY)


@book.rule(
    "U01",
    "The same input gives the same bits, whatever was routed in between.",
    why="Recomputed activations, replayed batches and resumed runs go other ways than the first time.",
    bug="Activation checkpointing re-routes tokens: CheckpointError, Automodel#3325, PR 3156 (T30).",
)
@forall(lambda subject: cases(subject, masks=True))
def same_input_same_bits(subject: Subject, case: Case) -> None:
    router, batch = subject.prepared(case), case.batch(subject)
    first = tensors_of(subject.route(router, batch))
    expect_same_bits(tensors_of(subject.route(router, batch)), first, when="in a second forward")
    larger_TE = warm_up_logits(7, case.settings.num_experts, tokens=9)
    subject.route(router.train(not case.training), make_batch(larger_TE, hidden_size=subject.hidden_size))
    subject.route(router.train(case.training), make_batch(larger_TE, hidden_size=subject.hidden_size))
    expect_same_bits(tensors_of(subject.route(router, batch)), first, when="after another batch was routed")


@book.rule(
    "U02",
    "forward writes nothing: no buffer, no parameter, no attribute of the router.",
    why="What forward writes counts twice under recompute, and is lost under compile and in replicas.",
    bug="Recompute counts tokens twice: torchtitan#1246, Automodel PR 2635, PR 3140 (T28, T30).",
)
@forall(lambda subject: cases(subject, masks=True), share=0.5)
def forward_writes_nothing(subject: Subject, case: Case) -> None:
    router, batch = subject.prepared(case), case.batch(subject)
    before = snapshot(router)
    subject.route(router, batch)
    expect_unchanged(snapshot(router), before, by="a forward in " + ("training" if case.training else "eval"))


@book.rule(
    "U03",
    "forward writes into none of its inputs.",
    why="The logits are saved for the backward pass, and the mask is every other layer's mask too.",
)
@forall(lambda subject: cases(subject, masks=True))
def inputs_stay_as_they_are(subject: Subject, case: Case) -> None:
    router, batch = subject.prepared(case), case.batch(subject)
    given = {"logits_TE": batch.logits_TE} | {
        f"RouteContext.{name}": value
        for name in (*PER_TOKEN, "noise_key")
        if (value := getattr(batch.ctx, name)) is not None
    }
    before = {name: value.clone() for name, value in given.items()}
    versions = {name: value._version for name, value in given.items()}
    subject.route(router, batch)
    expect_same_bits(given, before, when="after forward")
    for name, value in given.items():
        # The version counter also sees a write that happened to leave the same numbers.
        if value._version != versions[name]:
            raise Violation(f"{name} was written in place by forward, with the values it had")


@book.rule(
    "U04",
    "forward neither reads nor advances the global random generators of torch, numpy and Python.",
    why="Draws that a recompute repeats come out otherwise, and dropout after them differs between replicas.",
    bug="Recompute re-routes near-ties, and routers disagree between ranks: Automodel#3325 (T30), T35.",
)
@forall(lambda subject: cases(subject), share=0.5)
def global_generators_are_left_alone(subject: Subject, case: Case) -> None:
    router, batch = subject.prepared(case), case.batch(subject)
    found = []
    for seed in (1, 2):
        with generators_kept():
            torch.manual_seed(seed)
            np.random.seed(seed)
            random.seed(seed)
            before = _generator_states()
            found.append(tensors_of(subject.route(router, batch)))
            for name, state in _generator_states().items():
                if state != before[name]:
                    raise Violation(f"the global generator of {name} was advanced by forward")
    expect_same_bits(found[1], found[0], when="under other global seeds")


def _generator_states() -> dict[str, object]:
    of_numpy: Any = np.random.get_state()
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": (of_numpy[1].tolist(), *of_numpy[2:]),
        "Python's random": random.getstate(),
    }


@book.rule(
    "U05",
    "Routers of one class do not touch each other: what one routes or learns changes nothing at the next.",
    why="A model has one router per layer; state that they share mixes layers, and grows with every forward.",
    bug="A global list of losses: wrong counts and a memory leak, megablocks#64, #82, #85 (T29).",
)
def routers_share_nothing(subject: Subject, profile: Profile) -> None:
    settings = subject.settings(num_experts=4, top_k=2)
    batch = make_batch(warm_up_logits(0, 4, tokens=5), hidden_size=subject.hidden_size)
    larger = make_batch(warm_up_logits(1, 4, tokens=12).flip(1), hidden_size=subject.hidden_size)
    for training in (True, False):
        router, neighbour = subject.build(settings), subject.build(settings)
        alone = tensors_of(subject.route(router.train(training), batch))
        before = snapshot(router)
        subject.update(neighbour, dict(subject.route(neighbour.train(), larger).stats))
        subject.route(neighbour.train(training), larger)
        after = tensors_of(subject.route(router, batch))
        expect_same_bits(after, alone, when="once another router of its class has routed a batch and learned from it")
        expect_unchanged(snapshot(router), before, by="what another router of its class did")


@book.rule(
    "U06",
    "Inside an activation checkpoint each token counts once: loads, state and gradients are as without.",
    why="A recompute repeats the forward; what counts or learns there sees every token twice.",
    bug="Counters double count under activation checkpointing: Automodel PR 2635, PR 3247, RL#1203 (T30).",
)
def a_recompute_counts_once(subject: Subject, profile: Profile) -> None:
    expected = _after_one_step(subject, reentrant=None)
    for reentrant in (False, True):
        # The same operations on the same numbers; only sums of gradients may be added up in another order.
        expect_close(
            _after_one_step(subject, reentrant=reentrant),
            expected,
            when=f"inside torch.utils.checkpoint(use_reentrant={reentrant})",
            rtol=1e-9,
            atol=1e-12,
        )


def _after_one_step(subject: Subject, *, reentrant: bool | None) -> dict[str, Tensor]:
    """Loads, router state and gradients of a layer after one optimizer step on 11 tokens, one of them padding."""
    T = 11
    with generators_kept(), quiet():
        torch.manual_seed(0)
        router = subject.build(subject.settings(num_experts=4, top_k=2))
        layer = MoELayer(router, hidden_size=subject.hidden_size, expert_size=3, loss_mode="inject").to(subject.precise)
        x_TD = torch.randn(T, subject.hidden_size, dtype=subject.precise, requires_grad=True)
        batch = make_batch(torch.zeros(T, 4), hidden_size=subject.hidden_size, valid_T=torch.arange(T) != 4)
        ctx = replace(batch.ctx, hidden_TD=None)  # the layer puts its own input there

        def hidden(x_TD: Tensor) -> Tensor:
            y_TD: Tensor = layer(x_TD, ctx).hidden
            return y_TD

        optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
        handle = attach(optimizer, layer)
        try:
            y_TD = hidden(x_TD) if reentrant is None else checkpoint(hidden, x_TD, use_reentrant=reentrant)
            assert isinstance(y_TD, Tensor)
            y_TD.square().mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        except Exception as error:
            where = "" if reentrant is None else f" inside torch.utils.checkpoint(use_reentrant={reentrant})"
            raise Violation(f"a training step of a MoELayer{where} raised {blame(error)}") from error
        finally:
            handle.remove()
    gradients = {f"gradient of {n}": p.grad for n, p in layer.named_parameters() if p.grad is not None}
    return {"handle.loads": handle.loads[""]} | state_of(router) | gradients


@book.rule(
    "U07",
    "torch.compile(fullgraph=True) traces forward and backward, and the graph gives what eager gives.",
    why="A graph break in every layer costs more than the router; another result under compile is another model.",
    bug="Compiled routing differs from eager: torchtitan PR 3600, PR 3146 (T31).",
    requires=(FULLGRAPH,),
    cost=Cost.CODEGEN,
)
def compiles_as_one_graph(subject: Subject, profile: Profile) -> None:
    logits_TE = warm_up_logits(5, 4, tokens=11).to(subject.precise)
    batch = make_batch(logits_TE, hidden_size=subject.hidden_size, valid_T=torch.arange(11) != 5)
    tolerance = BACKEND_BITS if subject.precise == torch.float64 else 1e-6
    for training in (True, False):
        compare_compiled(subject, batch, training=training, backend="aot_eager", tolerance=tolerance, may_differ=0.0)


@book.rule(
    "U08",
    "Compiled by inductor it chooses as in eager, but for 0.1% of tokens at most, whose scores are nearly equal.",
    why="Inductor fuses and reorders; a router that hangs on the last bit trains another model than it serves.",
    bug="Routers disagree between engines in 10% of choices: Megatron-LM#4168, vllm PR 28284 (T32).",
    requires=(FULLGRAPH,),
    cost=Cost.CODEGEN,
)
def inductor_chooses_as_eager(subject: Subject, profile: Profile) -> None:
    T = 2000
    logits_TE = well_separated_logits(T, 8)
    batch = make_batch(logits_TE, hidden_size=subject.hidden_size, valid_T=torch.arange(T) % 7 != 3)
    for training in (True, False):
        # float32 with 24 bits: sums over 2000 tokens in another order agree to about 1e-5.
        compare_compiled(subject, batch, training=training, backend="inductor", tolerance=1e-4, may_differ=1e-3)


@book.rule(
    "U09",
    "forward never waits for the device: no .item(), no branch on data, no shape that follows from data.",
    why="Every wait stalls the queue of kernels, once per layer and forward, and breaks graphs.",
    bug="MoE slower than an equal dense model: megablocks#166, DeepSeek-MoE#5 (T38).",
)
def no_host_synchronisation(subject: Subject, profile: Profile) -> None:
    T = 11
    # Tensors without data: whatever wants to see a number raises, with the line that asked for it.
    with FakeTensorMode():
        router = subject.build(subject.settings(num_experts=4, top_k=2))
        batch = make_batch(torch.randn(T, 4), hidden_size=subject.hidden_size, valid_T=torch.arange(T) != 4)
        for training in (True, False):
            logits_TE = batch.logits_TE.clone().requires_grad_()
            try:
                logits_gradient(router.train(training)(logits_TE, batch.ctx), logits_TE)
            except Exception as error:
                mode = "training" if training else "eval"
                raise Violation(
                    f"forward in {mode}, on tensors whose values are not known, raised {blame(error)}"
                ) from error


@book.rule(
    "U10",
    "Forward and backward run under torch.use_deterministic_algorithms(True), and repeat bit by bit.",
    why="Runs that are to be compared or resumed bit by bit run in that mode, where other operations raise.",
    bug="Routing that differs from run to run: torchtitan PR 3600, Megatron-Bridge#2171 (T31).",
)
@forall(lambda subject: cases(subject, min_tokens=1, masks=True), share=0.3)
def runs_deterministically(subject: Subject, case: Case) -> None:
    router, batch = subject.prepared(case), case.batch(subject)
    found = []
    with deterministic_algorithms():
        for _ in "ab":
            logits_TE = batch.logits_TE.clone().requires_grad_()
            assignment = subject.route(router, batch.with_logits(logits_TE))
            found.append(tensors_of(assignment) | {"gradient of logits_TE": _gradient(assignment, logits_TE)})
    expect_same_bits(found[1], found[0], when="in a second pass under deterministic algorithms")
    plain = tensors_of(subject.route(router, batch))
    expect_same_bits({n: found[0][n] for n in plain}, plain, when="under deterministic algorithms")


def _gradient(assignment: Assignment, logits_TE: Tensor) -> Tensor:
    try:
        return logits_gradient(assignment, logits_TE)
    except RuntimeError as error:
        raise Violation(f"the backward pass under deterministic algorithms raised {blame(error)}") from error


@book.rule(
    "U11",
    "On another thread it gives the same bits.",
    why="Autograd recomputes checkpoints of a device on threads of its own, where context variables are empty.",
    bug="Re-routed recomputes end in CheckpointError: Automodel#3325, PR 3156 (T30).",
)
@forall(lambda subject: cases(subject), share=0.3)
def same_on_every_thread(subject: Subject, case: Case) -> None:
    router, batch = subject.prepared(case), case.batch(subject)
    expected = tensors_of(subject.route(router, batch))
    found: list[Assignment | Violation] = []
    thread = threading.Thread(target=lambda: found.append(_route_or_violation(subject, router, batch)))
    thread.start()
    thread.join()
    (outcome,) = found
    if isinstance(outcome, Violation):
        raise Violation(f"on another thread {outcome.saw}")
    expect_same_bits(tensors_of(outcome), expected, when="on another thread")


def _route_or_violation(subject: Subject, router: torch.nn.Module, batch: Batch) -> Assignment | Violation:
    try:
        return subject.route(router, batch)  # type: ignore[arg-type]
    except Violation as violation:
        return violation


@book.rule(
    "U12",
    "Whether the logits want a gradient changes no bit of the assignment.",
    why="The first pass of a reentrant checkpoint runs under no_grad, and its recompute does not.",
    bug="Recompute re-routes: Automodel#3325, RL PR 3108 (T30).",
)
@forall(lambda subject: cases(subject, masks=True), share=0.5)
def gradients_change_no_bit(subject: Subject, case: Case) -> None:
    router, batch = subject.prepared(case), case.batch(subject)
    with_graph = subject.route(router, batch.with_logits(batch.logits_TE.clone().requires_grad_()))
    with torch.no_grad():
        without = subject.route(router, batch)
    expect_same_bits(tensors_of(without), tensors_of(with_graph), when="under no_grad")
