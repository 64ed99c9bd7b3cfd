"""Gradient: what training feels of a router - through its weights, through its losses, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from moerouters import Assignment, limit_capacity
from moerouters_conformance.case import Case, warm_up_logits
from moerouters_conformance.forall import forall
from moerouters_conformance.profile import Profile
from moerouters_conformance.readings import experts_by_token, shown
from moerouters_conformance.requirements import LOSSES, NO_NOISE, STATE
from moerouters_conformance.rule import Group, Requirement, RuleBook
from moerouters_conformance.strategies import EXTREME, cases, distinct_cases, gatings
from moerouters_conformance.subject import Subject, blame
from moerouters_conformance.violation import Violation

book = RuleBook(Group.GRADIENT)
BALANCED_LOSSES = Requirement(
    text="declared balanced_losses", holds=lambda subject: bool(subject.capabilities.balanced_losses)
)
Reading = Callable[[Assignment], Tensor]


@book.rule(
    "G01",
    "The gradient of the combine weights with respect to the logits is their slope.",
    why="The gate learns from the weights alone; where they are detached, or scaled in backward, it learns nothing.",
    bug="The loss is correct, only the router's gradient is wrong: transformers#48687, torchtitan PR 2416 (T34, T35).",
)
@forall(lambda subject: distinct_cases(subject))
def weights_have_their_slope(subject: Subject, case: Case) -> None:
    _expect_slope(subject, case, _readout, "a weighted sum of the combine weights")


@book.rule(
    "G02",
    "The gradient of each loss with respect to the logits is its slope, while the routes stay.",
    why="A loss without its gradient looks right in every log and balances nothing.",
    bug="The aux loss is computed and its gradient never flows: Automodel#1408 (T14).",
    requires=(LOSSES,),
)
@forall(lambda subject: distinct_cases(subject, training=True))
def losses_have_their_slope(subject: Subject, case: Case) -> None:
    names = sorted(subject.run(case).losses)
    try:  # one pass for all of them, and one each only to name the wrong one
        _expect_slope(subject, case, _sum_of(names), "the sum of the losses")
    except Violation:
        for name in names:
            _expect_slope(subject, case, _sum_of([name]), f"losses[{name!r}]")
        raise


def _sum_of(names: Sequence[str]) -> Reading:
    return lambda assignment: _added([assignment.losses[name] for name in names])


@book.rule(
    "G03",
    "By its gradient, a chosen expert's weight rises with that expert's own logit, unless the weight is constant.",
    why="An expert that is used, and whose logit nothing moves, is neither learned nor unlearned.",
    bug="A plain gather detaches the router: torchtitan PR 2416, Automodel PR 2995 (T35).",
)
@forall(lambda subject: distinct_cases(subject))
def weights_rise_with_their_logits(subject: Subject, case: Case) -> None:
    logits_TE, assignment = _differentiable(subject, case)
    ids_TK, weights_TK = assignment.with_slots()
    chosen = experts_by_token(assignment)
    # Weights that are divided by their sum are constant where a token has one expert only.
    shared = case.settings.renormalize or case.settings.softmax_after_topk
    for slot, (ids_T, weights_T) in enumerate(zip(ids_TK.unbind(1), weights_TK.unbind(1), strict=True)):
        # Tokens do not share logits, so one backward serves the slot of all of them.
        grads = _gradient(weights_T.sum(), logits_TE).tolist()
        for token, expert in enumerate(ids_T.tolist()):
            if expert == assignment.num_experts or (shared and len(chosen[token]) == 1):
                continue
            if not grads[token][expert] > 0:
                raise Violation(
                    f"token {token} goes to expert {expert} by slot {slot} with weight {weights_T[token].item():.6g}, "
                    f"whose gradient with respect to logits_TE[{token}, {expert}] is {grads[token][expert]:.6g}"
                )


@book.rule(
    "G04",
    "State takes no part in autograd: it holds no parameters, weights pass it no gradient, and stats carry no graph.",
    why="A bias that backward reaches is trained by the language loss; a graph in the stats keeps a step's memory.",
    bug="The correction bias is a parameter that optimizers decay: DeepSeek-V3#761, THUDM/slime PR 1010 (T22, T36).",
    requires=(STATE,),
)
@forall(lambda subject: cases(subject, min_tokens=1, training=True))
def state_gets_no_gradient(subject: Subject, case: Case) -> None:
    router, batch = subject.prepared(case), case.batch(subject)
    trained = {name for name, _ in router.named_parameters()}
    state = {name: getattr(router, name) for name in router.state_names()}
    for name, value in state.items():
        if name in trained or value.requires_grad:
            raise Violation(f"the state {name} is a parameter, or requires a gradient")
    asked = {name: value.requires_grad_() for name, value in state.items() if value.is_floating_point()}
    logits_TE = batch.logits_TE.clone().requires_grad_()
    assignment = subject.route(router, batch.with_logits(logits_TE))
    # Losses may well hold state as a factor, which no optimizer steps; weights come from unadjusted scores.
    for name, value in asked.items():
        if bool(_gradient(_readout(assignment), value).any()):
            raise Violation(f"combine weights pass a gradient to the state {name}")
    for name, stat in assignment.stats.items():
        if stat.requires_grad:
            raise Violation(f"stats[{name!r}] carries a graph ({stat.grad_fn})")


@book.rule(
    "G05",
    "No gradient comes from an empty or dropped place, and all gradients are finite there.",
    why="Work that was never done would train the gate; 0 times infinity in backward makes NaN of a whole step.",
    bug="Padding and sentinel places reach the router's gradient: transformers PR 48205, torchtitan PR 4594 (T34).",
)
@forall(lambda subject: cases(subject, values=EXTREME, masks=True))
def empty_places_give_no_gradient(subject: Subject, case: Case) -> None:
    logits_TE, routed = _differentiable(subject, case)
    versions = {"as routed": routed, "after limit_capacity(assignment, 1)": limit_capacity(routed, 1)}
    for when, assignment in versions.items():
        empty = assignment.expert_ids == assignment.num_experts
        leaked_TE = _gradient(assignment.weights[empty].sum(), logits_TE)
        if bool((leaked_TE != 0).any()):  # true of NaN as well
            raise Violation(f"{when} the weights of empty places give logits_TE the gradient {shown(leaked_TE)}")
        _expect_finite(_gradient(_readout(assignment), logits_TE), f"{when} the combine weights give logits_TE")


@book.rule(
    "G06",
    "The router has parameters of its own if and only if it declares them, and each gets a gradient in training.",
    why="Undeclared ones are missed by whoever freezes or shards the router; one without a gradient stalls DDP.",
    bug="Router weights that freezing and LoRA miss: peft#3009, Megatron-Bridge PR 1834 (T42).",
)
def parameters_are_trained(subject: Subject, profile: Profile) -> None:
    case = Case(settings=subject.settings(num_experts=4, top_k=2), logits=_as_rows(warm_up_logits(0, 4)))
    router, batch = subject.prepared(case), case.batch(subject)
    named = dict(router.named_parameters())
    if bool(named) is not subject.capabilities.parameters:
        raise Violation(f"declared is parameters={subject.capabilities.parameters}; its parameters are {sorted(named)}")
    assignment = subject.route(router, batch.with_logits(batch.logits_TE.requires_grad_()))
    total = _added([_readout(assignment), *assignment.losses.values()])
    for name, parameter in named.items():
        if not parameter.requires_grad:
            continue
        grad = _gradient_or_none(total, parameter)
        if grad is None:
            raise Violation(f"the parameter {name} gets no gradient from the weights and losses of a training forward")
        _expect_finite(grad, f"weights and losses give the parameter {name}")


@book.rule(
    "G07",
    "Losses pull towards balance: where all tokens favour the same experts, descent lowers those experts' logits.",
    why="A loss of the wrong sign, or of another expert's load, makes the imbalance worse, step by step.",
    bug="The sign of the correction flips: Megatron-LM PR 7081, PR 6802 review (T17, T43).",
    requires=(LOSSES, NO_NOISE),
)
@forall(lambda subject: _crowded(subject, spare=1), share=0.5)
def losses_pull_towards_balance(subject: Subject, case: Case) -> None:
    router, batch = subject.prepared(case), case.batch(subject)
    # A loss may take its load from the last step; then that was this same batch.
    subject.update(router, dict(subject.route(router, batch).stats))
    offset_E = torch.zeros(case.settings.num_experts, dtype=torch.float64, requires_grad=True)
    assignment = subject.route(router, batch.with_logits(batch.logits_TE + offset_E))
    declared = router.capabilities.balanced_losses
    # Beside a declared balance loss there may be others (a z-loss); without a declaration only the sum must pull.
    parts = {f"losses[{name!r}]": assignment.losses[name] for name in declared if name in assignment.losses}
    parts = parts or {"the sum of the losses": _added(assignment.losses.values())}
    excess_E = assignment.load_E.double() - assignment.load_E.double().mean()
    for name, loss in parts.items():
        grad_E = _gradient(loss, offset_E)
        if bool(excess_E @ grad_E < -1e-9 * excess_E.norm() * grad_E.norm()):
            raise Violation(
                f"descent on {name} feeds the experts that have too many tokens: load_E is "
                f"{assignment.load_E.tolist()}, and the gradient of the experts' logits {shown(grad_E)}"
            )


@book.rule(
    "G08",
    "Declared balance losses have their declared value at perfect balance, and E times it at collapse with K = 1.",
    why="Coefficients of papers are given for this scale; K-fold or T-fold losses are another training run.",
    bug="Double softmax: a collapsed router looks balanced to its loss, transformers#45120, DBRX #39055 (T13).",
    requires=(BALANCED_LOSSES,),
)
@forall(lambda subject: _balanced(subject) | _collapsed(subject), share=0.5)
def losses_have_their_scale(subject: Subject, case: Case) -> None:
    router = subject.prepared(case)
    assignment = subject.route(router, case.batch(subject))
    E, load = case.settings.num_experts, assignment.load_E.tolist()
    if len(set(load)) > 1 and sorted(load)[-2] != 0:
        return  # the router spread what the logits had put together
    for name, value in router.capabilities.balanced_losses.items():
        if name not in assignment.losses:
            raise Violation(f"balanced_losses declares {name!r}; its losses are {sorted(assignment.losses)}")
        expected = value if len(set(load)) == 1 else value * E
        # One rounding of a load's share in float32 is allowed; the probabilities are exact to 1e-10.
        seen = assignment.losses[name].item()
        if abs(seen - expected) > 1e-6 * abs(expected):
            raise Violation(
                f"losses[{name!r}] is {seen:.8g} with load_E = {load}, every token alike up "
                f"to the names of experts; {expected:.8g} was expected, by balanced_losses = {value:.8g}"
            )


@book.rule(
    "G09",
    "Gradients are finite: at perfect balance, at zero logits, at collapse, at extreme logits.",
    why="One NaN in a gate's gradient ends the run, and a zero-initialised gate starts at the worst point.",
    bug="Squared coefficients of variation through std: NaN gradient at perfect balance, vmoe PR 218 (T45).",
)
@forall(lambda subject: _special(subject))
def gradients_are_finite(subject: Subject, case: Case) -> None:
    logits_TE, assignment = _differentiable(subject, case)
    _expect_finite(_gradient(_readout(assignment), logits_TE), "the combine weights give logits_TE")
    for name, loss in assignment.losses.items():
        _expect_finite(_gradient(loss, logits_TE), f"losses[{name!r}], which is {loss.item():.4g}, gives logits_TE")


def _differentiable(subject: Subject, case: Case) -> tuple[Tensor, Assignment]:
    """The case's logits as a leaf, and what the router makes of them."""
    batch = case.batch(subject)
    logits_TE = batch.logits_TE.clone().requires_grad_()
    return logits_TE, subject.route(subject.prepared(case), batch.with_logits(logits_TE))


def _readout(assignment: Assignment) -> Tensor:
    """0-d: every place's weight times a factor of its (token, expert), so that the order of slots does not matter.

    Uneven, since the sum of renormalised weights is constant.
    """
    token_ids_N, expert_ids_N, weights_N = assignment.pairs()
    return (weights_N * (1.0 + 3.7 * (token_ids_N * assignment.num_experts + expert_ids_N).double()).sin()).sum()


def _added(values: Iterable[Tensor]) -> Tensor:
    """The sum, also of none."""
    return sum(values, start=torch.zeros((), dtype=torch.float64))


def _gradient(output: Tensor, given: Tensor) -> Tensor:
    """d output / d given, zeros where the one does not depend on the other."""
    grad = _gradient_or_none(output, given)
    return torch.zeros_like(given) if grad is None else grad


def _gradient_or_none(output: Tensor, given: Tensor) -> Tensor | None:
    if not output.requires_grad:
        return None
    try:
        grads: tuple[Tensor | None, ...] = torch.autograd.grad(output, given, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        raise Violation(f"backward raised {blame(error)}") from error
    return grads[0]


def _expect_finite(grad: Tensor, what: str) -> None:
    if not bool(torch.isfinite(grad).all()):
        raise Violation(f"{what} the gradient {shown(grad)}")


def _expect_slope(subject: Subject, case: Case, value: Reading, what: str) -> None:
    """Compare the gradient with central differences, where the routes do not change on the way."""
    router, batch = subject.prepared(case), case.batch(subject)
    logits_TE = batch.logits_TE.clone().requires_grad_()
    assignment = subject.route(router, batch.with_logits(logits_TE))
    output, routes = value(assignment), experts_by_token(assignment)
    grad_TE = _gradient(output, logits_TE)
    # The error is about step**2 in truncation and eps / step in rounding; a loss may have been computed in float32.
    exact = output.dtype == logits_TE.dtype == torch.float64
    step, tolerance = (1e-5, 1e-6) if exact else (1e-2, 1e-2)

    def slope(direction_TE: Tensor) -> float | None:
        ends = [subject.route(router, batch.with_logits(batch.logits_TE + s * direction_TE)) for s in (step, -step)]
        if any(experts_by_token(end) != routes for end in ends):
            return None
        return (value(ends[0]).item() - value(ends[1]).item()) / (2 * step)

    def differs(direction_TE: Tensor) -> float | None:
        """The slope along a direction where it is not the gradient's."""
        seen, felt = slope(direction_TE), (grad_TE * direction_TE).sum().item()
        return None if seen is None or abs(seen - felt) <= tolerance * (1 + abs(felt)) else seen

    # One uneven direction sees any wrong entry; single entries are tried only to name one.
    everywhere_TE = (2.0 + 1.3 * torch.arange(logits_TE.numel(), dtype=logits_TE.dtype)).cos().reshape(logits_TE.shape)
    seen = differs(everywhere_TE)
    if seen is None:
        return
    for place in range(logits_TE.numel()):
        single_TE = torch.zeros_like(everywhere_TE)
        single_TE.view(-1)[place] = 1.0
        seen_here = differs(single_TE)
        if seen_here is not None:
            token, expert = divmod(place, logits_TE.shape[1])
            raise Violation(
                f"d({what}) / d(logits_TE[{token}, {expert}]) is {seen_here:.6g} by central differences, and autograd "
                f"says {float(grad_TE[token, expert]):.6g}"
            )
    felt = (grad_TE * everywhere_TE).sum().item()
    raise Violation(f"{what} has slope {seen:.6g} along an uneven direction of logits_TE; autograd says {felt:.6g}")


def _as_rows(logits_TE: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in logits_TE.tolist())


FALLING = (1.7, 0.9, 0.3, -0.2, -0.8, -1.1, -1.6, -2.0)


def _plain(subject: Subject, *, max_k: int = 4, spare: int = 0) -> SearchStrategy[Case]:
    """Training cases of a fresh router, for logits that are put in afterwards."""
    settings = gatings(subject, min_experts=2, max_k=max_k, spare=spare)
    return cases(subject, max_tokens=0, training=True, max_warm_up=0, dtype="float64", settings=settings)


def _balanced(subject: Subject) -> SearchStrategy[Case]:
    """E tokens, each with the same logits turned by one expert: loads and mean probabilities are uniform."""

    def circulant(case: Case) -> Case:
        E = case.settings.num_experts
        return replace(case, logits=tuple(tuple(FALLING[(e - t) % E] for e in range(E)) for t in range(E)))

    return _plain(subject).map(circulant)


def _crowded(subject: Subject, *, spare: int = 0) -> SearchStrategy[Case]:
    """Tokens that all favour the same K experts, by a little."""
    return _plain(subject, spare=spare).map(lambda case: _crowd(case, high=2.0, low=0.0))


def _collapsed(subject: Subject) -> SearchStrategy[Case]:
    """K = 1, and the probability of one expert is 1 up to 1e-10 at every token."""
    return _plain(subject, max_k=1).map(lambda case: _crowd(case, high=50.0, low=-50.0))


def _crowd(case: Case, *, high: float, low: float) -> Case:
    E, K = case.settings.num_experts, case.settings.top_k
    rows = [[(high if e < K else low) + 0.1 * FALLING[(e + t) % E] for e in range(E)] for t in range(2 * E)]
    return replace(case, logits=tuple(tuple(row) for row in rows))


def _special(subject: Subject) -> SearchStrategy[Case]:
    """In float32, where training is: zero logits, perfect balance, collapse, and anything extreme."""

    def zeros(case: Case) -> Case:
        E = case.settings.num_experts
        return replace(case, logits=((0.0,) * E,) * E)

    made = st.one_of(_plain(subject).map(zeros), _balanced(subject), _crowded(subject), _collapsed(subject))
    return made.map(lambda case: replace(case, dtype="float32")) | cases(
        subject, values=EXTREME, masks=True, training=True
    )
