"""What can be compiled for without having it. Imports jax only to make devices."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Literal

from loongjax.cluster.emulation import GPU_MEMORY_SHARE
from loongjax.errors import ConfigError

if TYPE_CHECKING:
    import jax

Compiler = Literal["tpu", "cuda"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Some chips of one kind, linked to each other.

    Attributes:
      name: What users call it.
      chip: Its hardware description (`loongjax.costmodel.hardware`).
      compiler: The environment that compiles for it.
      topology: How jax names the arrangement of the chips.
      chips: How many there are.
      memory_share: The part of a chip's memory that jax hands out.
    """

    name: str
    chip: str
    compiler: Compiler
    topology: str
    chips: int = 8
    memory_share: float = 1.0

    def devices(self) -> list[jax.Device]:
        """The chips as the compiler sees them; only inside that compiler's environment.

        Whoever calls it sets `JAX_PLATFORMS=cpu` before jax starts, so that jax does not look
        for the hardware.
        """
        from jax.experimental import topologies

        if self.compiler == "tpu":
            found = topologies.get_topology_desc(platform="tpu", topology_name=self.topology)
        else:
            description = resources.files(__package__) / "gpu_targets" / f"{self.chip}.txt"
            found = topologies.get_topology_desc(
                platform="cuda", target_config=description.read_text(), topology=self.topology
            )
        return list(found.devices)


TARGETS = (
    Target(name="v5e:2x4", chip="v5e", compiler="tpu", topology="v5e:2x4"),
    Target(name="v6e:2x4", chip="v6e", compiler="tpu", topology="v6e:2x4"),
    Target(name="v5p:2x2x2", chip="v5p", compiler="tpu", topology="v5p:2x2x2"),
    Target(
        name="a100x8", chip="a100", compiler="cuda", topology="1x1x8", memory_share=GPU_MEMORY_SHARE
    ),
    Target(
        name="h100x8", chip="h100", compiler="cuda", topology="1x1x8", memory_share=GPU_MEMORY_SHARE
    ),
)


def target_of(name: str) -> Target:
    """A target by its name. Raises ConfigError, naming those that exist."""
    for target in TARGETS:
        if target.name == name:
            return target
    known = ", ".join(target.name for target in TARGETS)
    raise ConfigError(f"target must be one of {known}, not {name!r}")
