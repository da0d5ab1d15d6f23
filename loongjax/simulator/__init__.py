"""The simulator: what requests would do on some hardware. Imports no jax.

from loongjax.simulator import Objective, deploy, draw_jobs, report, simulate

deployment = deploy("a800x8", "llama2-7b")
policy = create_policy("loongserve", deployment.cost)
run = simulate(draw_jobs("sharegpt", 1000, rate=10.0, seed=0), deployment, policy)
"""

from loongjax.simulator.bound import fluid_rate, fluid_seconds
from loongjax.simulator.deployment import Deployment, deploy
from loongjax.simulator.goodput import Goodput, Probe, find_goodput, work_rate
from loongjax.simulator.jobs import Job, Outcome, at_rate
from loongjax.simulator.metrics import Attainment, Objective, attainment, report
from loongjax.simulator.run import Run, simulate
from loongjax.simulator.traces import read_trace, write_trace
from loongjax.simulator.workloads import draw_jobs, is_workload, workload_names

__all__ = [
    "Attainment",
    "Deployment",
    "Goodput",
    "Job",
    "Objective",
    "Outcome",
    "Probe",
    "Run",
    "at_rate",
    "attainment",
    "deploy",
    "draw_jobs",
    "find_goodput",
    "fluid_rate",
    "fluid_seconds",
    "is_workload",
    "read_trace",
    "report",
    "simulate",
    "work_rate",
    "workload_names",
    "write_trace",
]
