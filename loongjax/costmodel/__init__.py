"""How long steps take: measured, fitted, or estimated. Imports no jax.

The profiler, which measures, is a module of its own, to be imported by name.
"""

from loongjax.costmodel.calibrated import calibrated_sib
from loongjax.costmodel.correction import CorrectedCost
from loongjax.costmodel.protocol import ChunkWork, CostModel, DecodeWork
from loongjax.costmodel.sib import Fingerprint, HostTime, ScalingInformationBase

__all__ = [
    "ChunkWork",
    "CorrectedCost",
    "CostModel",
    "DecodeWork",
    "Fingerprint",
    "HostTime",
    "ScalingInformationBase",
    "calibrated_sib",
]
