"""Capacity planning: the cheapest hardware and policy that serve a workload well.

For every kind of chip and every policy, the number of chips is doubled until 90 % of requests
in every class of length meet the objective. What could not even keep up with the work at the
fluid bound is not simulated. All runs are kept: they are the curve behind the answer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from loongjax.errors import ConfigError, RequestError
from loongjax.scheduler.policies import create_policy, policy_layout
from loongjax.simulator.bound import fluid_rate
from loongjax.simulator.deployment import Deployment, deploy
from loongjax.simulator.jobs import Job
from loongjax.simulator.metrics import Attainment, Objective, attainment
from loongjax.simulator.run import simulate

_log = logging.getLogger(__name__)

WANTED = 0.9
"""Of the requests in every class, so many are to be served well."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """A kind of chip.

    Attributes:
      chip: Its name.
      most: How many there may be.
      price: Of one, in any unit.
    """

    chip: str
    most: int
    price: float = 1.0

    def __post_init__(self) -> None:
        if self.most < 1 or not self.price > 0.0:
            raise ConfigError(
                f"the budget for {self.chip} is {self.most} chips at a price of {self.price}; "
                "there must be at least 1, at a price above 0"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """Some hardware under a policy, and how well it does.

    Attributes:
      chip, chips: What it runs on.
      policy: Who plans.
      price: Of all chips.
      instances: Elastic instances.
      attained: How well requests were served; None: it was not simulated.
      reason: Why it was not.
    """

    chip: str
    chips: int
    policy: str
    price: float
    instances: int | None = None
    attained: Attainment | None = None
    reason: str | None = None

    @property
    def good(self) -> bool:
        """Whether it meets the objective."""
        return self.attained is not None and self.attained.least >= WANTED


@dataclass(frozen=True, kw_only=True, slots=True)
class CapacityPlan:
    """All that was tried, by price; and the best of it, or None if nothing was good enough."""

    options: tuple[Option, ...]
    best: Option | None


def plan_capacity(
    jobs: Sequence[Job],
    model_shape: str,
    budgets: Sequence[Budget],
    policies: Sequence[str],
    objective: Objective,
) -> CapacityPlan:
    """Finds the cheapest option; of equally cheap ones, the one that serves best.

    Args:
      jobs: The workload, with its arrivals.
      model_shape: One of the named shapes of random models.
      budgets: What there is.
      policies: Those to try; see `create_policy`.
      objective: What is good enough.

    Raises:
      ConfigError: An unknown chip, shape or policy, or nothing to try.
      RequestError: All jobs come at once.
    """
    if not budgets or not policies:
        raise ConfigError("there is nothing to try; name at least one kind of chip and a policy")
    for policy in policies:
        policy_layout(policy)
    span = jobs[-1].arrival - jobs[0].arrival if jobs else 0.0
    if span <= 0.0:
        raise RequestError(f"{len(jobs)} requests that come at once have no rate to plan for")
    rate = (len(jobs) - 1) / span
    options: list[Option] = []
    for budget in budgets:
        for policy in policies:
            for option in _ladder(jobs, rate, model_shape, budget, policy, objective):
                options.append(option)
                _log.info("%s", describe_option(option))
    options.sort(key=lambda option: option.price)
    good = [option for option in options if option.good]
    best = min(good, key=lambda option: (option.price, -_least(option)), default=None)
    return CapacityPlan(options=tuple(options), best=best)


def describe_option(option: Option) -> str:
    """One line."""
    what = f"{option.chips} {option.chip} under {option.policy}"
    if option.attained is None:
        return f"{what}: {option.reason}"
    return (
        f"{what}: {option.attained.total:.1%} served well, "
        f"{option.attained.least:.1%} in the worst class"
    )


def _ladder(
    jobs: Sequence[Job],
    rate: float,
    model_shape: str,
    budget: Budget,
    policy: str,
    objective: Objective,
) -> Iterator[Option]:
    """1, 2, 4, … chips, and all, until they are enough."""
    for chips in _sizes(budget.most):
        price = budget.price * chips
        fixed = {"chip": budget.chip, "chips": chips, "policy": policy, "price": price}
        try:
            deployment = deploy(f"{budget.chip}x{chips}", model_shape, layout=policy_layout(policy))
        except ConfigError as error:
            if chips == budget.most:
                raise
            yield _refused(fixed, str(error))
            continue
        option = _try(jobs, rate, deployment, policy, objective, fixed)
        yield option
        if option.good:
            return


def _try(
    jobs: Sequence[Job],
    rate: float,
    deployment: Deployment,
    policy: str,
    objective: Objective,
    fixed: Mapping[str, object],
) -> Option:
    if policy.startswith("disaggregated") and deployment.instances < 2:
        return _refused(fixed, "one instance cannot have prefill and decode apart")
    bound = fluid_rate(jobs, deployment)
    if bound < rate:
        return _refused(fixed, f"{rate:.3g} requests/s come, {bound:.3g} are the fluid bound")
    run = simulate(jobs, deployment, create_policy(policy, deployment.cost))
    return Option(
        **fixed,  # type: ignore[arg-type]
        instances=deployment.instances,
        attained=attainment(run, deployment, objective),
    )


def _refused(fixed: Mapping[str, object], reason: str) -> Option:
    return Option(**fixed, reason=reason)  # type: ignore[arg-type]


def _sizes(most: int) -> list[int]:
    """Powers of two below `most`, and that."""
    return [*(2**i for i in range(most.bit_length()) if 2**i < most), most]


def _least(option: Option) -> float:
    return 0.0 if option.attained is None else option.attained.least
