"""Why a prompt runs where it does, or waits: what `Plan.reasons` says of it.

Without numbers that change from plan to plan, for only changes are kept.
"""

from __future__ import annotations

MEMORY = "waits: it and those who hold KV may need more memory than there is"
BEHIND = "waits: a more urgent prompt waits for memory, which it does not take away"
ALL_BUSY = "waits: all instances are at work"
BUSY = "waits: its instances are not all idle"
DUE = "waits: there is no time before tokens of those who decode there are due"
FULL = "waits: more urgent prompts fill the step on its lane, or its memory"
GOES_ON = "goes on, where its KV lies"
ON_LANE = "begins on "
ALONE_BESIDE = "begins on one instance: its lane is taken, and it is not late there"
ON_ONE = "begins on one instance, which suffices for its length, with the fewest decodes"
JOINS = "begins along with others, where there is time and memory left"
NOWHERE = "waits: no idle instance has time and memory left"
BY_FORCE = "goes on by any means: nothing else can run"
PREEMPTED = "waits: it was preempted, for others ahead of it in line had no room left"
