"""What is publicly known of accelerators: data files, one for each, with their sources.

Peak numbers are the vendor's; what programs attain of them, and latencies, are this project's
assumptions and say so in the file. No constant of a machine stands in code.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from importlib import resources
from typing import Literal

from loongjax.costmodel.sib import HostTime
from loongjax.errors import ConfigError

_FOLDER = "hardware"


@dataclass(frozen=True, kw_only=True, slots=True)
class Attained:
    """The part of a peak that programs reach, each in (0, 1].

    Attributes:
      compute: Of the peak in dense layers.
      attention: Of the peak in attention over long prompts.
      memory: Of the memory's bandwidth.
      link: Of the links' bandwidth.
    """

    compute: float
    attention: float
    memory: float
    link: float


@dataclass(frozen=True, kw_only=True, slots=True)
class HardwareDescription:
    """One accelerator chip, and the links that it has to others of its kind.

    Attributes:
      name: What `--hardware` calls it.
      title: Its full name.
      platform: What jax calls its kind; it decides which groups exist.
      device_kinds: How the names begin that jax gives to such devices, or to ones like it.
      flops_per_s: Peak of dense bfloat16 products.
      hbm_bytes: Memory.
      hbm_bytes_per_s: Peak bandwidth of it.
      link_bytes_per_s: Peak of all links of the chip together, in one direction.
      neighbour_bytes_per_s: Of these, what it can send to one neighbour.
      layer_overhead_s: What a layer takes at least, however little it has to do.
      hop_s: Latency of one exchange with a neighbour.
      tile_s: What a tile of a kernel's grid costs beside its work, by the whole chip's clock.
      attained: What programs reach.
      tensor_parallel: Chips of an instance by default; None: the fewest that hold the weights.
      host: Time of the engine for a step.
      sources: Where the peaks come from.
      assumptions: Where the other numbers come from.
    """

    name: str
    title: str
    platform: Literal["cpu", "gpu", "tpu"]
    device_kinds: tuple[str, ...]
    flops_per_s: float
    hbm_bytes: float
    hbm_bytes_per_s: float
    link_bytes_per_s: float
    neighbour_bytes_per_s: float
    layer_overhead_s: float
    hop_s: float
    tile_s: float
    attained: Attained
    tensor_parallel: int | None
    host: HostTime
    sources: tuple[str, ...]
    assumptions: tuple[str, ...]


def hardware_names() -> tuple[str, ...]:
    """All accelerators that are described, by name."""
    folder = resources.files("loongjax.costmodel").joinpath(_FOLDER)
    names = (file.name for file in folder.iterdir())
    return tuple(sorted(name.removesuffix(".json") for name in names if name.endswith(".json")))


def load_hardware(name: str) -> HardwareDescription:
    """Reads a description.

    Raises:
      ConfigError: None has this name.
    """
    if name not in hardware_names():
        raise ConfigError(
            f"no hardware is called {name!r}; known are {', '.join(hardware_names())}"
        )
    file = resources.files("loongjax.costmodel").joinpath(_FOLDER, f"{name}.json")
    content = json.loads(file.read_text(encoding="utf-8"))
    content["attained"] = Attained(**content["attained"])
    content["host"] = HostTime(**content["host"])
    content["device_kinds"] = tuple(content["device_kinds"])
    content["sources"] = tuple(content["sources"])
    content["assumptions"] = tuple(content["assumptions"])
    missing = {each.name for each in fields(HardwareDescription)} ^ content.keys()
    if missing:
        raise ConfigError(f"the description of {name} lacks or does not know {sorted(missing)}")
    return HardwareDescription(**content)


def hardware_of(device_kind: str, platform: str) -> HardwareDescription:
    """What is known of a device, or of the first of its platform if it is not known itself.

    Args:
      device_kind: What jax calls it, such as `TPU v5 lite`.
      platform: `cpu`, `gpu` or `tpu`.

    Raises:
      ConfigError: Nothing is known of any device of that platform.
    """
    every = [load_hardware(name) for name in hardware_names()]
    kinds = {kind: hardware for hardware in every for kind in hardware.device_kinds}
    known = [kind for kind in kinds if device_kind.startswith(kind)]
    if known:
        return kinds[max(known, key=len)]  # `TPU v5 lite` is no `TPU v5`
    alike = [hardware for hardware in every if hardware.platform == platform]
    if not alike:
        raise ConfigError(f"nothing is known of devices of platform {platform!r}")
    return alike[0]
