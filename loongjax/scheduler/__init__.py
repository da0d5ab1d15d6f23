"""The global manager: pure functions from a snapshot of the cluster to a plan.

Never imports jax: a policy that was evaluated in the simulator is the code that serves.
"""

from loongjax.scheduler.policy import Policy
from loongjax.scheduler.validate import validate

__all__ = ["Policy", "validate"]
