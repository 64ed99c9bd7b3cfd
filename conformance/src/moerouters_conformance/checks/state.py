"""State: what a router has learned survives saving, casting, copying and moving, and changes by updates alone."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from moerouters import Router, load_router_state, save_router_state
from moerouters.state import StatefulModule
from moerouters_conformance.case import Case
from moerouters_conformance.forall import forall
from moerouters_conformance.profile import Profile
from moerouters_conformance.readings import expect_same_bits, state_of, tensors_of
from moerouters_conformance.requirements import STATE
from moerouters_conformance.resume import resume_machine
from moerouters_conformance.rule import Group, RuleBook
from moerouters_conformance.snapshots import snapshot
from moerouters_conformance.strategies import cases
from moerouters_conformance.subject import Subject, blame
from moerouters_conformance.violation import Violation

book = RuleBook(Group.STATE)


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
    expect_alike(subject, loaded, router, case, when="after load_state_dict into a fresh router")


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
    expect_alike(subject, loaded, router, case, when="after load_router_state into a fresh router")


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
    expect_alike(subject, router, fresh, case, when="after reset_state")


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
    expect_alike(subject, router, fresh, case, when="built on the meta device")


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
    before = state_bits(router)
    for name, cast in casts.items():
        router = cast(router)
        expect_same_bits(state_bits(router), before, when=f"after router{name}")


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
    saved, before = state_of(router), state_bits(router)
    narrow = {name: value.bfloat16() if value.is_floating_point() else value for name, value in saved.items()}
    for assign in (False, True):
        loaded = subject.build(case.settings).bfloat16()
        loaded.load_state_dict(dict(saved), assign=assign)
        expect_same_bits(state_bits(loaded), before, when=f"loaded into a bfloat16 router with assign={assign}")
        loaded.load_state_dict(dict(narrow), assign=assign)
        for name, value in state_bits(loaded).items():
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
        before = state_bits(router)
        try:
            copy = make(router)
        except Exception as error:
            raise Violation(f"making {name} raised {blame(error)}") from error
        expect_alike(subject, copy, deepcopy(router), case, when=f"as {name}")
        subject.warm_up(copy, 2)
        expect_same_bits(state_bits(router), before, when=f"once {name} of it has learned")


@book.rule(
    "S09",
    "A run that saves, resumes, evaluates, casts and copies in between learns what an uninterrupted one learns.",
    why="Whatever lives outside the state_dict restarts with the job, and two runs that should agree part.",
    bug="Balancer state missing or stale after a resume: OLMo-core#227, maxtext#2494 (T21).",
    requires=(STATE,),
)
def resuming_changes_nothing(subject: Subject, profile: Profile) -> None:
    resume_machine(subject, profile)


def state_bits(router: Router) -> dict[str, Tensor]:
    """A copy of the router's own state."""
    return {name: getattr(router, name).detach().clone() for name in router.state_names()}


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


def expect_alike(subject: Subject, router: Router, other: Router, case: Case, *, when: str) -> None:
    """Two routers give the same bits in training and eval, and have the same state, now and after an update."""
    batch = case.batch(subject)
    expect_same_bits(state_bits(router), state_bits(other), when=when)
    for training in (False, True):
        given, expected = (subject.route(each.train(training), batch) for each in (router, other))
        expect_same_bits(tensors_of(given), tensors_of(expected), when=when)
    for each in (router, other):
        subject.update(each, dict(subject.route(each, batch).stats))
    expect_same_bits(state_bits(router), state_bits(other), when=f"{when}, and one more update")
