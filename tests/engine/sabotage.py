"""Steps of a real executor that fail on purpose, at every moment of a step's life.

launch  the program's call raises before it has taken the pool
donated the call raises after it has taken the pool, which is gone
device  the program is launched and fails on the devices: what it gives, pool and tokens, is
        an error that shows when somebody waits for it
fetch   the program ran, but its tokens cannot be brought to the host
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal, TypeAlias, get_args

import jax
import pytest
from jax._src import dispatch  # alone knows how to forget the token of a failed callback
from jax.sharding import NamedSharding

from loongjax.executor.jax_executor import JaxExecutor

Moment: TypeAlias = Literal["launch", "donated", "device", "fetch"]
MOMENTS: tuple[Moment, ...] = get_args(Moment)

Program: TypeAlias = Callable[..., tuple[Any, Any]]


class Injected(Exception):
    """A failure that a test wanted."""


@contextmanager
def failing(executor: JaxExecutor, moment: Moment) -> Iterator[None]:
    """The programs of steps that are submitted inside fail."""
    with pytest.MonkeyPatch.context() as patch:
        real = executor.programs.get
        patch.setattr(executor.programs, "get", lambda *args: _broken(real(*args), moment))
        yield


def forget_failed_callbacks() -> None:
    """To be called when tests are over: jax would raise their errors once more at exit."""
    dispatch.runtime_tokens.clear()


def _broken(program: Program, moment: Moment) -> Program:
    def call(*args: Any) -> tuple[Any, ...]:
        if moment == "launch":
            raise Injected("no launch")
        pool, said, *scores = program(*args)
        match moment:
            case "donated":
                raise Injected("the pool is gone")
            case "device":
                return _poisoned(pool, said, *scores)
        said.delete()
        return pool, said, *scores

    return call


def _poisoned(*outputs: Any) -> tuple[Any, ...]:
    leaves, tree = jax.tree.flatten(outputs)
    return jax.tree.unflatten(tree, _poison(*(leaf.sharding for leaf in leaves))(*leaves))


@cache
def _poison(*shardings: NamedSharding) -> Callable[..., list[jax.Array]]:
    """A program that takes arrays as a step does, and fails on every device."""

    def fail(x: Any) -> Any:
        raise Injected("a chip fell off")

    def body(*leaves: jax.Array) -> list[jax.Array]:
        return [jax.pure_callback(fail, jax.ShapeDtypeStruct(x.shape, x.dtype), x) for x in leaves]

    specs = [sharding.spec for sharding in shardings]
    mapped = jax.shard_map(
        body, mesh=shardings[0].mesh, in_specs=tuple(specs), out_specs=specs, check_vma=False
    )
    return jax.jit(mapped, donate_argnums=tuple(range(len(specs))))
