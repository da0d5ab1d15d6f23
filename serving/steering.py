"""What the operators of a server may change while it runs, and see of how it plans."""

from __future__ import annotations

import json
from dataclasses import replace

from loongjax.api.build import BuiltEngine, make_policy
from loongjax.costmodel import ScalingInformationBase
from loongjax.engine import Engine


class Steering:
    """The policy of an engine, by name, and its cost model.

    Attributes:
      engine: The engine.
      policy: The policy in force, as `EngineConfig.policy` writes it.
    """

    def __init__(self, built: BuiltEngine) -> None:
        self.engine: Engine = built.engine
        self.policy = built.config.policy
        self._config = built.config

    def set_policy(self, text: str) -> str:
        """Plans by another policy from now on; gives the one before.

        Raises:
          ConfigError: There is no such policy, or it needs a cost model that is missing.
          EngineClosedError: The engine was closed, or died.
        """
        self.engine.set_policy(make_policy(replace(self._config, policy=text)))
        before, self.policy = self.policy, text
        return before

    def cost_model_json(self) -> str:
        """What the server was told of how long steps take; empty if it was told nothing."""
        if self._config.cost_model is None:
            return ""
        return json.dumps(ScalingInformationBase.load(self._config.cost_model).to_json())
