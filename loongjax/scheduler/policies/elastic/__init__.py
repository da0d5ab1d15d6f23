"""The `elastic` policy: prompts in chunks that can be overtaken, on lanes of changing degree."""

from __future__ import annotations

from loongjax.scheduler.policies.elastic.policy import Elastic

__all__ = ["Elastic"]
