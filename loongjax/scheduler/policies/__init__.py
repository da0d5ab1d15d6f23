"""Policies, each in a module of its own, and their names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal, TypeAlias

from loongjax.costmodel.protocol import CostModel
from loongjax.errors import ConfigError
from loongjax.scheduler.policies.disaggregated import Disaggregated
from loongjax.scheduler.policies.elastic import Elastic
from loongjax.scheduler.policies.first_come import FirstCome
from loongjax.scheduler.policies.fixed_groups import FixedGroups
from loongjax.scheduler.policies.loongserve import LoongServe
from loongjax.scheduler.policy import Policy

Layout: TypeAlias = Literal["usual", "one", "halves"]
"""How devices are cut into instances where a policy is at its best: as is usual for the
hardware; all in one instance; in two instances."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """How a policy is made, what may be set, and the layout that it is made for."""

    make: Callable[..., Policy]
    settings: type
    layout: Layout = "usual"


_POLICIES = {
    "chunked_prefill": _Entry(partial(FixedGroups, chunk=2048), FixedGroups, "one"),
    "disaggregated": _Entry(Disaggregated, Disaggregated, "halves"),
    "elastic": _Entry(Elastic, Elastic),
    "first_come": _Entry(lambda cost, **settings: FirstCome(**settings), FirstCome),
    "loongserve": _Entry(LoongServe, LoongServe),
    "replicated": _Entry(partial(FixedGroups, degree="smallest"), FixedGroups),
    "static_sp": _Entry(FixedGroups, FixedGroups),
    "tp": _Entry(FixedGroups, FixedGroups, "one"),
}


def policy_names() -> tuple[str, ...]:
    """What commands may ask for."""
    return tuple(sorted(_POLICIES))


def needs_cost(text: str) -> bool:
    """Whether a policy asks how long steps take; see `create_policy`."""
    return "cost" in {each.name for each in fields(_parse(text)[1].settings)}


def create_policy(text: str, cost: CostModel | None) -> Policy:
    """A policy by its name, and, after a colon, its settings.

    Args:
      text: One of `policy_names`, such as `loongserve`, or with settings that its class
        documents, such as `chunked_prefill:chunk=512,order=slack`.
      cost: What it may ask about time; None only if it does not (`needs_cost`).

    Raises:
      ConfigError: There is no such policy or setting, or a value is out of range.
    """
    name, entry, values = _parse(text)
    try:
        return entry.make(cost=cost, **values)
    except TypeError as error:
        raise ConfigError(f"policy {name!r} cannot be made with {values}: {error}") from error


def policy_layout(text: str) -> Layout:
    """The layout that a policy is made for; see `create_policy`."""
    return _parse(text)[1].layout


def _parse(text: str) -> tuple[str, _Entry, dict[str, Any]]:
    name, _, rest = text.partition(":")
    if name not in _POLICIES:
        raise ConfigError(f"no policy is called {name!r}; known are {', '.join(policy_names())}")
    entry = _POLICIES[name]
    settings = [each for each in fields(entry.settings) if each.init and each.name != "cost"]
    known = {each.name: each.default for each in settings}
    values = {}
    for setting in filter(None, rest.split(",")):
        key, equals, written = setting.partition("=")
        if key not in known or not equals:
            raise ConfigError(
                f"policy {name!r} has no setting {setting!r}; write NAME=VALUE with one of "
                f"{', '.join(sorted(known))}"
            )
        value = _value(written)
        if isinstance(known[key], float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        values[key] = value
        if isinstance(values[key], str) and not isinstance(known[key], str):
            raise ConfigError(
                f"policy {name!r}: {key} must be a number, true, false or none, not {written!r}"
            )
    return name, entry, values


def _value(text: str) -> str | int | float | bool | None:
    named = {"true": True, "false": False, "none": None}
    if text.lower() in named:
        return named[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
