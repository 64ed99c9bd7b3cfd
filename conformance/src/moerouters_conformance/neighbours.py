"""Other legal settings of a router: one field changed at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import torch

from moerouters import RouterConfig
from moerouters.errors import ConfigError, UnsupportedError
from moerouters_conformance.case import make_batch
from moerouters_conformance.subject import Subject


def other_configs(subject: Subject) -> Iterator[tuple[str, RouterConfig]]:
    """(field, config) for every field with another legal value: other numbers, flipped flags, literals.

    Legal is what builds, and routes the suite's batches: a width has to fit the hidden states that a router looks at.
    """
    batch = make_batch(torch.zeros(3, 4), hidden_size=subject.hidden_size)
    given = subject.config.model_dump()
    for name, field in type(subject.config).model_fields.items():
        for value in _others(given[name], field.annotation):
            try:
                config = type(subject.config).model_validate(given | {name: value})
                router = subject.with_config(config).make(subject.settings(num_experts=4, top_k=2))
                with torch.no_grad():
                    router.train()(batch.logits_TE, batch.ctx)
            except (ValueError, ConfigError, UnsupportedError):
                continue
            yield name, config
            break


def _others(value: Any, annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Literal:
        yield from (choice for choice in get_args(annotation) if choice != value)
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (2 * value + 1, value + 1, value - 1, value // 2)
    elif isinstance(value, float):
        yield from (2 * value + 0.125, value / 2, value + 0.25)
    elif isinstance(value, str):
        yield value + "x"
