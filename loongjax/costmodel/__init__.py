"""How long steps take: measured (`loongjax.profiler`) or estimated. Imports no jax."""

from loongjax.costmodel.calibrated import calibrated_sib
from loongjax.costmodel.correction import CorrectedCost
from loongjax.costmodel.protocol import ChunkWork, CostModel, DecodeWork
from loongjax.costmodel.sib import Crowding, Fingerprint, HostTime, ScalingInformationBase

__all__ = [
    "ChunkWork",
    "CorrectedCost",
    "CostModel",
    "Crowding",
    "DecodeWork",
    "Fingerprint",
    "HostTime",
    "ScalingInformationBase",
    "calibrated_sib",
]
