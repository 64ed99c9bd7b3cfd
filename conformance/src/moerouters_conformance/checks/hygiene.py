"""Hygiene: a router is a good guest in somebody else's process, config file and log."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from pydantic import ValidationError

from moerouters import Router
from moerouters.errors import ConfigError, ContextError, UnsupportedError
from moerouters.fingerprint import router_identity
from moerouters.gating import GatingSettings
from moerouters.registry import API_VERSION
from moerouters.registry.api import ApiFit, api_fit
from moerouters.registry.configs import make_config
from moerouters_conformance.case import make_batch, warm_up_logits
from moerouters_conformance.neighbours import other_configs
from moerouters_conformance.profile import Cost, Profile
from moerouters_conformance.rule import Group, Requirement, RuleBook
from moerouters_conformance.subject import FACTORY_SUMMARY, FAMILIES, OPTIONAL_CONTEXT, Subject, blame
from moerouters_conformance.violation import NotApplicable, Violation

book = RuleBook(Group.HYGIENE)
SETTINGS = Requirement(text="a config with fields", holds=lambda s: bool(type(s.config).model_fields))
SPEC = Requirement(
    text="a RouterSpec (it was handed in as a factory)",
    holds=lambda s: s.spec.summary != FACTORY_SUMMARY,
)
LOCAL = Requirement(text="forward_collective=False", holds=lambda s: not s.capabilities.forward_collective)
WRONG: tuple[Any, ...] = ("no such value", "", None, True, -1, 0, -0.5, float("nan"), float("inf"), [], {})
"""Tried on every field. Some are legal somewhere; none may end in anything but a working router or a ConfigError."""
PATIENCE = 300
"""Seconds; a cold import of torch on a loaded machine takes up to 30."""
SIZES: dict[str, Any] = {"num_experts": 4, "top_k": 2}


@book.rule(
    "H01",
    "Importing the router's module and building it changes nothing in the process, and prints nothing.",
    why="A seed, a default dtype or a warning filter set in passing changes the user's other code, unseen.",
    cost=Cost.PROCESS,
)
def building_has_no_side_effects(subject: Subject, profile: Profile) -> None:
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        request = _build_request(subject) | {"answer": str(answer)}
        try:
            done = subprocess.run(
                [sys.executable, "-m", "moerouters_conformance.fresh"],
                input=json.dumps(request),
                # Its module may stand where only this process looks.
                env=os.environ | {"PYTHONPATH": os.pathsep.join(entry or "." for entry in sys.path)},
                capture_output=True,
                text=True,
                timeout=PATIENCE,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise Violation(f"a fresh interpreter had not built it after {PATIENCE} seconds") from None
        if not answer.exists():
            last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise Violation(f"building it in a fresh interpreter failed: {last}")
        changed: dict[str, tuple[str, str]] = json.loads(answer.read_text())
    for name, (before, after) in changed.items():
        raise Violation(f"building it changed {name}: {before[:200]} before, {after[:200]} after")


def _build_request(subject: Subject) -> dict[str, object]:
    settings = subject.settings(**SIZES)
    factory, config = subject.spec.factory, type(subject.config)
    module, path = getattr(factory, "__module__", ""), getattr(factory, "__qualname__", "<?>")
    installed = subject.provenance is not None
    if not installed and ("<" in path + config.__qualname__ or module == "__main__"):
        raise NotApplicable("a fresh interpreter cannot import its factory by name")
    return {
        "name": subject.spec.name if installed else None,
        "gating": settings.model_dump(mode="json"),
        "config": subject.config.model_dump(mode="json"),
        "factory": [module, path],
        "config_class": [config.__module__, config.__qualname__] if SPEC.holds(subject) else None,
    }


@book.rule(
    "H02",
    "A setting that does not exist is refused by ConfigError, with the nearest name that does.",
    why="A typo that is passed over trains for a week with the default.",
)
def unknown_settings_are_refused(subject: Subject, profile: Profile) -> None:
    for name in (*type(subject.config).model_fields, "setting"):
        typo = f"{name}x"
        try:
            make_config(subject.spec, {typo: 1})
        except ConfigError as error:
            if name not in str(error) or typo not in str(error):
                raise Violation(f"the ConfigError for the setting {typo!r} does not name it: {error}") from None
        else:
            raise Violation(f"the setting {typo!r}, which does not exist, is taken without a word")


@book.rule(
    "H03",
    "A config record is frozen.",
    why="Manifests and fingerprints are written once; a record that changes later makes them lie.",
    requires=(SETTINGS,),
)
def settings_are_frozen(subject: Subject, profile: Profile) -> None:
    for name in type(subject.config).model_fields:
        with contextlib.suppress(ValidationError):
            setattr(subject.config.model_copy(), name, getattr(subject.config, name))
            raise Violation(f"{type(subject.config).__name__}.{name} can be assigned to")


@book.rule(
    "H04",
    "Every setting has a description and a default.",
    why="`moerouters info` shows them; a router without defaults cannot stand in a comparison.",
    requires=(SETTINGS,),
)
def settings_are_described(subject: Subject, profile: Profile) -> None:
    for name, field in type(subject.config).model_fields.items():
        if not (field.description or "").strip():
            raise Violation(f"{type(subject.config).__name__}.{name} has no description")
        if field.is_required():
            raise Violation(f"{type(subject.config).__name__}.{name} has no default")


@book.rule(
    "H05",
    "A wrong value of a setting gives a ConfigError before anything is routed.",
    why="An error from the depth of a kernel, an hour into the queue, does not say which line of the config is wrong.",
    requires=(SETTINGS,),
)
def wrong_values_are_config_errors(subject: Subject, profile: Profile) -> None:
    for name in type(subject.config).model_fields:
        for value in WRONG:
            shown = f"{name}={value!r}"
            try:
                config = make_config(subject.spec, subject.config.model_dump() | {name: value})
                router = subject.with_config(config).make(subject.settings(**SIZES))
            except (ConfigError, UnsupportedError):
                continue
            except Exception as error:
                raise Violation(f"{shown} raised {blame(error)}\n  a ConfigError was expected") from error
            try:
                _one_step(subject, router)
            except Violation as violation:
                raise Violation(f"{shown} is taken, and then {violation.saw}") from violation


@book.rule(
    "H06",
    "The baselines of the spec are legal settings, and build.",
    why="They run in comparisons of others; one that fails ends a run of hours that was not about this router.",
    requires=(Requirement(text="baselines in the spec", holds=lambda s: bool(s.spec.baselines)),),
)
def baselines_build(subject: Subject, profile: Profile) -> None:
    for baseline in subject.spec.baselines:
        try:
            config = make_config(subject.spec, baseline)
            _one_step(subject, subject.with_config(config).make(subject.settings(**SIZES)))
        except (ConfigError, UnsupportedError) as error:
            raise Violation(f"the baseline {dict(baseline)} is refused: {error}") from error


@book.rule(
    "H07",
    "Every gating is routed with, or refused with ConfigError or UnsupportedError when the router is built.",
    why="A model's gating is not the plugin author's choice; what it cannot do it has to say before training.",
    bug="Expert bias with softmax stops in an assertion: Megatron-LM#1971 (T12).",
)
def gatings_are_taken_or_refused(subject: Subject, profile: Profile) -> None:
    for name, settings in _menu():
        try:
            router = subject.make(settings)
        except (ConfigError, UnsupportedError):
            continue
        except Violation:
            raise
        except Exception as error:
            raise Violation(f"building it with {name} raised {blame(error)}\n  a ConfigError was expected") from error
        try:
            _one_step(subject, router)
        except Violation as violation:
            raise Violation(f"it is built with {name}, and then {violation.saw}") from violation


def _menu() -> Iterator[tuple[str, GatingSettings]]:
    relu: dict[str, dict[str, Any]] = {
        "relu": {"score": "relu", "renormalize": False},
        "relu, renormalised": {"score": "relu"},
    }
    for family, fields in (FAMILIES | relu).items():
        for top_k in (1, 2, 3, 4):
            yield f"{family}, K={top_k} of 4", GatingSettings(num_experts=4, top_k=top_k, **fields)
        for group_score in ("max", "top2_sum"):
            groups: dict[str, Any] = {"num_groups": 4, "kept_groups": 2, "group_score": group_score}
            yield f"{family}, groups by {group_score}", GatingSettings(num_experts=8, top_k=3, **fields, **groups)


@book.rule(
    "H08",
    "What the router misses in its context it says by a ContextError that names the field.",
    why="An AttributeError on None, three layers down, does not tell a trainer's author what to pass.",
)
def missing_context_is_named(subject: Subject, profile: Profile) -> None:
    batch = make_batch(warm_up_logits(0, 4), hidden_size=subject.hidden_size)
    for missing in (*((name,) for name in OPTIONAL_CONTEXT), ("num_sequences",), OPTIONAL_CONTEXT):
        gone = {*missing, "num_sequences"} if "sequence_ids_T" in missing else set(missing)
        less = batch.with_context(**dict.fromkeys(gone))
        for training in (True, False):
            try:
                subject.example.train(training)(less.logits_TE, less.ctx)
            except ContextError as error:
                _names_what_is_missing(subject, str(error), gone)
            except Exception as error:
                fields = ", ".join(sorted(gone))
                raise Violation(f"without {fields} in its context it raised {blame(error)}") from error


def _names_what_is_missing(subject: Subject, text: str, gone: set[str]) -> None:
    if not any(name in text for name in gone):
        raise Violation(f"without {', '.join(sorted(gone))} the ContextError names none of them: {text}")
    if subject.provenance is not None and subject.spec.name not in text:
        raise Violation(f"the ContextError does not name the router {subject.spec.name!r}: {text}")


@book.rule(
    "H09",
    "Logits of a dtype that is not declared are refused with UnsupportedError.",
    why="Integers, or a dtype that it was never tested with, would be routed to something, and nobody would know.",
)
def other_dtypes_are_refused(subject: Subject, profile: Profile) -> None:
    floats = {"float16", "bfloat16", "float32", "float64", "float8_e4m3fn"}
    for name in sorted((floats | {"int64", "bool", "complex64"}) - subject.capabilities.dtypes):
        batch = make_batch(torch.zeros(3, 4, dtype=getattr(torch, name)), hidden_size=subject.hidden_size)
        try:
            subject.example.eval()(batch.logits_TE, batch.ctx)
        except UnsupportedError:
            continue
        except Exception as error:
            raise Violation(f"{name} logits raised {blame(error)}\n  an UnsupportedError was expected") from error
        raise Violation(f"{name} logits were routed; declared are {sorted(subject.capabilities.dtypes)}")


@book.rule(
    "H10",
    "A router with default settings declares what its spec declares.",
    why="Tables and refusals are made from the spec before anything is built; the run goes by the instance.",
    requires=(SPEC,),
)
def spec_declares_the_router(subject: Subject, profile: Profile) -> None:
    default = subject.with_config(make_config(subject.spec, None)).example.capabilities
    declared, built = subject.spec.capabilities.model_dump(), default.model_dump()
    for name, value in declared.items():
        if built[name] != value:
            raise Violation(f"the spec declares {name}={value}, the router {name}={built[name]}")


@book.rule(
    "H11",
    "The router keeps its config as `config`, and other settings give it another identity.",
    why="Ranks compare identities, and manifests hold them; settings that do not show there differ in silence.",
    requires=(SETTINGS,),
)
def settings_tell_routers_apart(subject: Subject, profile: Profile) -> None:
    settings = subject.settings(**SIZES)
    router = subject.make(settings)
    if getattr(router, "config", None) != subject.config:
        raise Violation(f"router.config is {getattr(router, 'config', None)!r}; it was built with {subject.config!r}")
    own = router_identity(router)
    for field, config in other_configs(subject):
        if router_identity(subject.with_config(config).make(settings)) == own:
            raise Violation(
                f"{field}={getattr(config, field)!r} gives the identity of {getattr(subject.config, field)!r}"
            )


@book.rule(
    "H12",
    "Routing and updating print nothing and warn of nothing.",
    why="A line per layer, step and rank buries the line that matters, and a print waits for the device.",
)
def runs_in_silence(subject: Subject, profile: Profile) -> None:
    router = subject.make(subject.settings(**SIZES))
    said = io.StringIO()
    with (
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        # Python hides these two from users, so a library below the router may give them.
        for hidden in (DeprecationWarning, PendingDeprecationWarning):
            warnings.simplefilter("ignore", hidden)
        _one_step(subject, router)
    if said.getvalue():
        raise Violation(f"it prints {said.getvalue()[:200]!r}")
    for warning in caught:
        raise Violation(f"it warns: {warning.category.__name__}: {warning.message}")


@book.rule(
    "H13",
    "The spec reads well in a listing: summary and reference in one line, of at most 120 characters, for this API.",
    why="`moerouters plugins` prints one line a router.",
    requires=(SPEC,),
)
def spec_reads_well(subject: Subject, profile: Profile) -> None:
    for name in ("summary", "reference"):
        text: str = getattr(subject.spec, name)
        if text != " ".join(text.split()):
            raise Violation(f"{name} is {text!r}: more than one line, or blanks at its ends")
        if len(text) > 120:
            raise Violation(f"{name} has {len(text)} characters; 120 are shown")
    if api_fit(subject.api, API_VERSION) is not ApiFit.FITS:
        raise Violation(f"it was written for plugin API {subject.api}; this host offers {API_VERSION}")


@book.rule(
    "H14",
    "A router that does not declare forward_collective touches no process group, in forward or update.",
    why="One rank that skips a layer, or runs out of tokens, leaves the others waiting for ever.",
    requires=(LOCAL,),
)
def local_routers_stay_local(subject: Subject, profile: Profile) -> None:
    router = subject.make(subject.settings(**SIZES))
    called: list[str] = []

    def recorder(name: str) -> Callable[..., None]:
        def record(*args: object, **kwargs: object) -> None:
            called.append(name)

        return record

    patches: dict[str, Any] = {name: recorder(name) for name in _COLLECTIVES if hasattr(dist, name)}
    # As if there were two ranks: many routers ask before they talk.
    patches["is_initialized"] = mock.Mock(return_value=True)
    patches["get_world_size"] = mock.Mock(return_value=2)
    patches["get_rank"] = mock.Mock(return_value=0)
    with mock.patch.multiple(dist, **patches):
        try:
            _one_step(subject, router)
        except Violation:
            if not called:
                raise
    if called:
        raise Violation(f"it calls torch.distributed.{called[0]} and declares forward_collective=False")


_COLLECTIVES = (
    "all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "all_to_all", "all_to_all_single",
    "barrier", "broadcast", "broadcast_object_list", "gather", "reduce", "reduce_scatter", "reduce_scatter_tensor",
    "scatter", "send", "recv", "isend", "irecv", "new_group",
)  # fmt: skip


def _one_step(subject: Subject, router: Router) -> None:
    """Train on one batch, update, and route once more in eval mode."""
    batch = make_batch(warm_up_logits(0, router.gating.num_experts), hidden_size=subject.hidden_size)
    subject.update(router, dict(subject.route(router.train(), batch).stats))
    subject.route(router.eval(), batch)
