"""Cost models that ship with loongjax, made from published measurements.

`scripts/fit_a800.py` makes those of the A800.
"""

from __future__ import annotations

import json
from importlib import resources

from loongjax.costmodel.sib import ScalingInformationBase

_FOLDER = "measured"


def calibrated_sib(
    hardware: str, model: str, tensor_parallel: int
) -> ScalingInformationBase | None:
    """The shipped cost model of instances of so many chips, or None if there is none."""
    name = f"{hardware}-{model}-tp{tensor_parallel}.json"
    file = resources.files("loongjax.costmodel").joinpath(_FOLDER, name)
    if not file.is_file():
        return None
    return ScalingInformationBase.from_json(json.loads(file.read_text("utf-8")), where=name)
