"""Every error that loongjax raises on purpose.

    LoongJaxError
    ├── UserError                 the caller can mend it; commands exit 2
    │   ├── ConfigError           an engine, cluster or pool setting
    │   ├── RequestError          a prompt or a sampling parameter
    │   │   └── CapacityError     a request that can never fit the KV pool
    │   ├── ModelError            a model folder, file, architecture or dtype
    │   └── BackendStartedError   jax started before loongjax could set it up
    ├── PlanError                 a policy produced a plan that breaks a rule
    ├── StepError                 a step failed on the devices
    ├── IntegrityError            the pool's books do not add up
    ├── EngineClosedError         the engine was closed or its loop died
    ├── LinesError                a job is done, and some of its lines are errors; exit 3
    └── BenchError                a measurement failed, or would not be worth printing

A message names the value, the limit, and the way out.
"""

from __future__ import annotations


class LoongJaxError(Exception):
    """Base of all errors of this library."""


class UserError(LoongJaxError, ValueError):
    """Something that the caller asked for cannot be done; asking differently helps."""


class ConfigError(UserError):
    """A setting of the engine, the cluster or the pool is out of range."""


class RequestError(UserError):
    """A prompt or a sampling parameter is not acceptable."""


class CapacityError(RequestError):
    """A request needs more KV slots than the largest group has."""


class ModelError(UserError):
    """A model cannot be read: its folder, a file, its architecture, or a dtype."""


class BackendStartedError(UserError):
    """The jax backend started before loongjax could configure it."""


class PlanError(LoongJaxError):
    """A plan breaks a rule of `loongjax.scheduler.validate`."""


class StepError(LoongJaxError):
    """A step failed while it ran."""


class IntegrityError(LoongJaxError):
    """The books of the KV pool contradict each other."""


class EngineClosedError(LoongJaxError):
    """The engine takes no more requests."""


class LinesError(LoongJaxError):
    """A job over a file is done, and some of its lines cannot be answered."""


class BenchError(LoongJaxError):
    """A benchmark cannot give a figure that means what it says."""
