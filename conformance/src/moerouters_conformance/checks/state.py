"""State: what a router has learned survives saving, casting, copying and moving, and changes by updates alone."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path

import torch
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from moerouters import MoELayer, Router, attach, load_router_state, save_router_state
from moerouters.state import StatefulModule
from moerouters_conformance.case import Batch, Case, make_batch, warm_up_logits
from moerouters_conformance.forall import forall
from moerouters_conformance.profile import Profile
from moerouters_conformance.readings import expect_same_bits, state_of, tensors_of
from moerouters_conformance.requirements import STATE, STATELESS
from moerouters_conformance.resume import resume_machine
from moerouters_conformance.rule import Group, RuleBook
from moerouters_conformance.snapshots import generators_kept, snapshot
from moerouters_conformance.strategies import EXTREME, cases
from moerouters_conformance.subject import Subject, blame
from moerouters_conformance.violation import Violation

book = RuleBook(Group.STATE)
STATE_DTYPES = (torch.float32, torch.float64, torch.int64)


def learned(subject: Subject) -> SearchStrategy[Case]:
    """Training cases with some tokens."""
    return cases(subject, min_tokens=1, training=True)


@book.rule(
    "S01",
    "A fresh router that loads the state_dict is the old one: same routes, and the same state after the next update.",
    why="What is not in the checkpoint starts over at every restart, and nobody sees it.",
    bug="Where is the bias? Checkpoints without it route otherwise: DeepSeek-V3#761, EfficientMoE#3 (T22).",
    requires=(STATE,),
)
@forall(learned, share=0.4)
def state_dict_is_all(subject: Subject, case: Case) -> None:
    router = subject.prepared(case)
    loaded = subject.build(case.settings).train()
    loaded.load_state_dict(state_of(router))
    _expect_alike(subject, loaded, router, case, when="after load_state_dict into a fresh router")


@book.rule(
    "S02",
    "save_router_state and load_router_state carry the whole state.",
    why="They write what register_state knows of; a buffer made otherwise stays behind.",
    bug="Expert biases lost between trainer and server: ScienceOne-AI/DeepSeek-671B-SFT-Guide#9 (T22).",
    requires=(STATE,),
)
@forall(learned, share=0.3)
def saved_file_is_all(subject: Subject, case: Case) -> None:
    router = subject.prepared(case)
    loaded = _twin(subject, router)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "router.safetensors"
        save_router_state(router, path)
        load_router_state(loaded, path)
    _expect_alike(subject, loaded, router, case, when="after load_router_state into a fresh router")


@book.rule(
    "S03",
    "reset_state makes a router that has learned the same as a fresh one.",
    why="It is how a run starts over, and what fills the buffers after initialisation on the meta device.",
    requires=(STATE,),
)
@forall(learned, share=0.4)
def reset_is_fresh(subject: Subject, case: Case) -> None:
    router = subject.prepared(case)
    fresh = _twin(subject, router)
    subject.warm_up(router, 2)
    with torch.no_grad():
        router.reset_state()
    _expect_alike(subject, router, fresh, case, when="after reset_state")


@book.rule(
    "S04",
    "Every tensor that the router keeps moves with it to another device.",
    why="A tensor in a plain attribute stays on the CPU: the first forward on a GPU fails, or waits for a copy.",
    bug="Buffers that a wrapper does not move or materialise: prime-rl PR 3411, Automodel PR 532 (T36).",
)
@forall(lambda subject: cases(subject, training=True), share=0.3)
def tensors_move(subject: Subject, case: Case) -> None:
    router = subject.prepared(case)
    subject.route(router, case.batch(subject))
    try:
        router.to("meta")
    except Exception as error:
        raise Violation(f"router.to('meta') raised {blame(error)}") from error
    for name, value in snapshot(router).items():
        if isinstance(value, Tensor) and not value.is_meta:
            raise Violation(f"{name} is on {value.device} after router.to('meta'); register it as a buffer")


@book.rule(
    "S05",
    "Built on the meta device, then given memory and reset, it is a fresh router.",
    why="Large models are built that way; values computed in __init__ are lost there, and memory holds garbage.",
    bug="A bias left uninitialised by deferred initialisation: OLMo-core#227, prime-rl PR 2953 (T21).",
)
@forall(learned, share=0.4)
def built_on_meta_is_fresh(subject: Subject, case: Case) -> None:
    fresh = subject.build(case.settings).train()
    try:
        with torch.device("meta"):
            router = subject.make(case.settings).train()
        router.to_empty(device="cpu")
        _poison(router)
        for module in router.modules():
            if isinstance(module, StatefulModule):
                module.reset_state()
    except Exception as error:
        raise Violation(f"building it on the meta device and resetting its state raised {blame(error)}") from error
    _copy_parameters(fresh, router)
    _expect_alike(subject, router, fresh, case, when="built on the meta device")


@book.rule(
    "S06",
    "Casting the model to another dtype leaves every bit of the state, and what is learned next.",
    why="A bias in bfloat16 has 8 bits of mantissa: steps of 0.001 vanish, and many experts share a few values.",
    bug="expert_bias silently in bfloat16, 238 biases collapse to 8 values: Megatron-LM#1482 (T18).",
    requires=(STATE,),
)
@forall(learned, share=0.4)
def casts_leave_state(subject: Subject, case: Case) -> None:
    casts: dict[str, Callable[[Router], Router]] = {
        ".half()": lambda router: router.half(),
        ".bfloat16()": lambda router: router.bfloat16(),
        ".double()": lambda router: router.double(),
        ".to(torch.bfloat16).float()": lambda router: router.to(torch.bfloat16).float(),
    }
    router = subject.prepared(case)
    before = _state(router)
    for name, cast in casts.items():
        router = cast(router)
        expect_same_bits(_state(router), before, when=f"after router{name}")


@book.rule(
    "S07",
    "Loading a checkpoint leaves the state in its own dtype, whatever the model or the checkpoint was cast to.",
    why="With assign=True the loaded tensor becomes the buffer; one in bfloat16 would then learn in 8 bits.",
    bug="The bias comes back in the model's dtype: transformers PR 42580, sglang PR 8729, vllm PR 50761 (T18).",
    requires=(STATE,),
)
@forall(learned, share=0.5)
def loading_keeps_dtypes(subject: Subject, case: Case) -> None:
    router = subject.prepared(case)
    saved, before = state_of(router), _state(router)
    narrow = {name: value.bfloat16() if value.is_floating_point() else value for name, value in saved.items()}
    for assign in (False, True):
        loaded = subject.build(case.settings).bfloat16()
        loaded.load_state_dict(dict(saved), assign=assign)
        expect_same_bits(_state(loaded), before, when=f"loaded into a bfloat16 router with assign={assign}")
        loaded.load_state_dict(dict(narrow), assign=assign)
        for name, value in _state(loaded).items():
            if value.dtype != before[name].dtype:
                raise Violation(
                    f"{name} is {value.dtype} after a bfloat16 checkpoint was loaded with assign={assign}; it was "
                    f"{before[name].dtype}"
                )


@book.rule(
    "S08",
    "A deep copy and a pickle are the same router, and learn apart from it.",
    why="Averaged models, evaluation copies and spawned workers are made that way.",
    requires=(STATE,),
)
@forall(learned, share=0.3)
def copies_are_independent(subject: Subject, case: Case) -> None:
    router = subject.prepared(case)
    ways: dict[str, Callable[[Router], Router]] = {"a deep copy": deepcopy}
    if "<locals>" not in type(router).__qualname__:  # no class of a function's body can be pickled
        ways["a pickle"] = lambda given: pickle.loads(pickle.dumps(given))
    for name, make in ways.items():
        before = _state(router)
        try:
            copy = make(router)
        except Exception as error:
            raise Violation(f"making {name} raised {blame(error)}") from error
        _expect_alike(subject, copy, deepcopy(router), case, when=f"as {name}")
        subject.warm_up(copy, 2)
        expect_same_bits(_state(router), before, when=f"once {name} of it has learned")


@book.rule(
    "S09",
    "A run that saves, resumes, evaluates, casts and copies in between learns what an uninterrupted one learns.",
    why="Whatever lives outside the state_dict restarts with the job, and two runs that should agree part.",
    bug="Balancer state missing or stale after a resume: OLMo-core#227, maxtext#2494 (T21).",
    requires=(STATE,),
)
def resuming_changes_nothing(subject: Subject, profile: Profile) -> None:
    resume_machine(subject, profile)


@book.rule(
    "S10",
    "Evaluation between optimizer steps changes nothing that the router learns.",
    why="Runs that evaluate more often would train another model.",
    bug="The observation hook also ran in eval and changed the next training step: torchtitan PR 4412 (T43).",
    requires=(STATE,),
)
def evaluation_teaches_nothing(subject: Subject, profile: Profile) -> None:
    plain, evaluated = (_trained_layer(subject, evaluations=count) for count in (0, 2))
    expect_same_bits(evaluated, plain, when="with evaluations before and between the optimizer steps")


@book.rule(
    "S11",
    "What is counted is counted in int64 or float64.",
    why="float32 stops counting at 2**24 tokens, which a global batch exceeds; bfloat16 at 256.",
    bug="bfloat16 counters flip the sign of the bias update: Megatron-LM PR 7081 (T17).",
    requires=(STATE,),
)
def counters_are_exact(subject: Subject, profile: Profile) -> None:
    settings = subject.settings(num_experts=4, top_k=2)
    router = subject.build(settings).train()
    whole: dict[str, bool] = {}
    some: dict[str, Tensor] = {}
    for step in range(4):
        batch = make_batch(warm_up_logits(step, 4, tokens=13 + 2 * step), hidden_size=subject.hidden_size)
        stats = dict(subject.route(router, batch).stats)
        for name, value in stats.items():
            whole[name] = whole.get(name, True) and bool((value == value.round()).all())
            some[name] = value if name not in some or bool(value.any()) else some[name]
        subject.update(router, stats)
    for name, value in some.items():
        # What is whole in four batches of different sizes, and not always 0, is a count.
        if whole[name] and bool(value.any()) and value.dtype not in (torch.int64, torch.float64):
            raise Violation(f"stats[{name!r}] holds whole numbers, as {value.dtype}: {value.flatten()[:8].tolist()}")


@book.rule(
    "S12",
    "update follows from the state and the stats: not from the last forward, nor from global random generators.",
    why="Stats are sums over micro-batches and ranks; what a rank saw last is another rank's something else.",
    bug="A gradient-accumulation step learns from its last micro-batch: torchtitan PR 1593, PR 1304 (T28).",
    requires=(STATE,),
)
@forall(learned, share=0.4)
def update_reads_its_stats(subject: Subject, case: Case) -> None:
    router, other = subject.prepared(case), subject.prepared(case)
    batch = case.batch(subject)
    stats = dict(subject.route(router, batch).stats)
    subject.route(other, batch)
    E = case.settings.num_experts
    subject.route(other, make_batch(warm_up_logits(9, E).flip(1), hidden_size=subject.hidden_size))
    with generators_kept():
        for seed, each in ((1, router), (2, other)):
            torch.manual_seed(seed)
            subject.update(each, _copied(stats))
    expect_same_bits(_state(other), _state(router), when="updated after another forward and another global seed")


@book.rule(
    "S13",
    "update changes none of its stats, and keeps none of them.",
    why="The sums are cleared in place after the step; other readers, metrics and the log, read them as well.",
    bug="Aliased counters: buffers and accumulators that overwrite each other, Automodel#3325, PR 3247 (T30).",
    requires=(STATE,),
)
@forall(learned, share=0.4)
def update_leaves_its_stats(subject: Subject, case: Case) -> None:
    router = subject.prepared(case)
    stats = dict(subject.route(router, case.batch(subject)).stats)
    before = _copied(stats)
    subject.update(router, stats)
    expect_same_bits(stats, before, when="after update was given them")
    kept, cleared = deepcopy(router), router
    for value in stats.values():
        value.zero_()
    expect_same_bits(_state(cleared), _state(kept), when="once the stats of the last update are cleared")
    _expect_alike(subject, cleared, kept, case, when="once the stats of the last update are cleared")


@book.rule(
    "S14",
    "State stands in register_state's buffers, float32 or int64, keeps its shape and stays finite.",
    why="Casts, checkpoints and reset know the buffers by that list; one NaN in them stays for the rest of the run.",
    bug="A bias buffer outside the usual ways is lost or narrowed: prime-rl PR 3429, maxtext#2494 (T21).",
    requires=(STATE,),
)
@forall(lambda subject: cases(subject, values=EXTREME, masks=True, training=True))
def state_is_registered_and_finite(subject: Subject, case: Case) -> None:
    router = subject.prepared(case)
    fresh = _state(subject.build(case.settings))
    for _ in range(2):
        subject.update(router, dict(subject.route(router, case.batch(subject)).stats))
    known = set(router.state_names())
    buffers = set(router.state_dict()) - {name for name, _ in router.named_parameters()}
    unknown = {name for name in buffers - known if not name.startswith("gating.")}
    if unknown:
        raise Violation(f"state_dict holds {sorted(unknown)}, and state_names() are {sorted(known)}")
    for name, value in _state(router).items():
        if value.dtype not in STATE_DTYPES:
            raise Violation(f"{name} is {value.dtype}")
        if value.shape != fresh[name].shape:
            raise Violation(f"{name} has shape {list(value.shape)} after updates, {list(fresh[name].shape)} before")
        if not bool(torch.isfinite(value).all()):
            raise Violation(f"{name} is {value.tolist()} after updates from these logits")


@book.rule(
    "S15",
    "A router that declares state=stateless keeps none and observes nothing.",
    why="attach calls no update for it: what it would have learned is lost without a word.",
    bug="A bias buffer that is allocated and never updated: OLMo-core#227, DeepSeek-V3#761 (T21, T22).",
    requires=(STATELESS,),
)
@forall(lambda subject: cases(subject, training=True), share=0.3)
def stateless_keeps_nothing(subject: Subject, case: Case) -> None:
    router = subject.prepared(case)
    stats = subject.route(router, case.batch(subject)).stats
    if router.state_names() or stats:
        raise Violation(f"declared is state=stateless; state: {sorted(router.state_names())}, stats: {sorted(stats)}")


@book.rule(
    "S16",
    "A router that declares state learns: updates from crowded batches change it.",
    why="A balancer whose update never arrives looks like one in every log but the load's.",
    bug="People train DeepSeek code whose bias nobody updates: EfficientMoE#3, maxtext#2494 (T21, T22).",
    requires=(STATE,),
)
def state_learns(subject: Subject, profile: Profile) -> None:
    router = subject.build(subject.settings(num_experts=4, top_k=2))
    before = _state(router)
    if not before:
        raise Violation(f"declared is state={router.capabilities.state}; state_names() is empty")
    subject.warm_up(router, 3)
    after = _state(router)
    if all(torch.equal(after[name], value) for name, value in before.items()):
        raise Violation(f"three updates, from batches that favour the early experts, left {sorted(before)} as it was")


def _state(router: Router) -> dict[str, Tensor]:
    """A copy of the router's own state."""
    return {name: getattr(router, name).detach().clone() for name in router.state_names()}


def _copied(stats: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in stats.items()}


def _twin(subject: Subject, router: Router) -> Router:
    """A fresh router with the parameters of this one, which may be random."""
    fresh = subject.build(router.gating.settings).train(router.training)
    _copy_parameters(router, fresh)
    return fresh


def _copy_parameters(source: Router, target: Router) -> None:
    with torch.no_grad():
        for theirs, own in zip(source.parameters(), target.parameters(), strict=True):
            own.copy_(theirs)


def _poison(router: Router) -> None:
    """Fill all memory with what nobody would start from: empty memory is often zero by chance."""
    for value in (*router.parameters(), *router.buffers()):
        value.detach().fill_(7)


def _expect_alike(subject: Subject, router: Router, other: Router, case: Case, *, when: str) -> None:
    """Two routers give the same bits in training and eval, and have the same state, now and after an update."""
    batch = case.batch(subject)
    expect_same_bits(_state(router), _state(other), when=when)
    for training in (False, True):
        given, expected = (subject.route(each.train(training), batch) for each in (router, other))
        expect_same_bits(tensors_of(given), tensors_of(expected), when=when)
    for each in (router, other):
        subject.update(each, dict(subject.route(each, batch).stats))
    expect_same_bits(_state(router), _state(other), when=f"{when}, and one more update")


def _trained_layer(subject: Subject, *, evaluations: int) -> dict[str, Tensor]:
    """State of a layer's router after two optimizer steps, with some evaluations before each and half-way."""
    settings = subject.settings(num_experts=4, top_k=2)
    with generators_kept():
        torch.manual_seed(0)
        layer = MoELayer(
            subject.build(settings), hidden_size=subject.hidden_size, expert_size=2, loss_mode="inject"
        ).double()
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        handle = attach(optimizer, layer)
        generator = torch.Generator().manual_seed(0)
        try:
            for _ in range(2):
                for _ in range(2):
                    for _ in range(evaluations):
                        layer.eval()
                        layer(*_layer_input(subject, 0, torch.Generator().manual_seed(7)))
                        layer.train()
                    layer(*_layer_input(subject, 3, generator)).hidden.sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        except Exception as error:
            raise Violation(f"training a MoELayer raised {blame(error)}") from error
        finally:
            handle.remove()
        return _state(layer.router)


def _layer_input(subject: Subject, shift: int, generator: torch.Generator) -> tuple[Tensor, object]:
    """Hidden states that crowd on some experts, and their context; the layer adds its own hidden states."""
    x_TD = torch.randn(9, subject.hidden_size, dtype=torch.float64, generator=generator) + shift
    batch: Batch = make_batch(torch.zeros(9, 4), hidden_size=subject.hidden_size)
    return x_TD, batch.with_context(hidden_TD=None).ctx
