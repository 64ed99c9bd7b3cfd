"""The tables that a Request asks for, by its subject."""

from __future__ import annotations

from collections.abc import Iterator

from moerouters.bench.balance import balance_cases
from moerouters.bench.case import Case, Request
from moerouters.bench.dispatch import dispatch_cases
from moerouters.bench.layer import layer_cases
from moerouters.bench.router import router_cases

_SUBJECTS = {
    "layer": layer_cases,
    "router": router_cases,
    "dispatch": dispatch_cases,
    "balance": balance_cases,
}


def cases_of(request: Request) -> Iterator[Case]:
    """The tables of a request, each made when its turn comes; it holds nothing yet."""
    return iter(_SUBJECTS[request.subject](request))
