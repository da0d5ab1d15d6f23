"""Policies, each in a module of its own, and their names."""

from __future__ import annotations

from collections.abc import Callable

from loongjax.costmodel.protocol import CostModel
from loongjax.errors import ConfigError
from loongjax.scheduler.policies.first_come import FirstCome
from loongjax.scheduler.policies.loongserve import LoongServe
from loongjax.scheduler.policy import Policy

_MAKERS: dict[str, Callable[[CostModel], Policy]] = {
    "first_come": lambda cost: FirstCome(),
    "loongserve": lambda cost: LoongServe(cost=cost),
}


def policy_names() -> tuple[str, ...]:
    """What commands may ask for."""
    return tuple(sorted(_MAKERS))


def create_policy(name: str, cost: CostModel) -> Policy:
    """A policy by its name, with its default settings.

    Args:
      name: One of `policy_names`.
      cost: What it may ask about time, if it does.

    Raises:
      ConfigError: There is no such policy.
    """
    if name not in _MAKERS:
        raise ConfigError(f"no policy is called {name!r}; known are {', '.join(policy_names())}")
    return _MAKERS[name](cost)
