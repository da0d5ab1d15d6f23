"""What the operators of a server may change while it runs, and see of how it plans."""

from __future__ import annotations

import json

from loongjax.api.build import BuiltEngine, make_policy
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
        self._cost = built.cost

    def set_policy(self, text: str) -> str:
        """Plans by another policy from now on; gives the one before.

        Raises:
          ConfigError: There is no such policy or setting.
          EngineClosedError: The engine was closed, or died.
        """
        self.engine.set_policy(make_policy(text, self._cost))
        before, self.policy = self.policy, text
        return before

    def cost_model_json(self) -> str:
        """How long steps take, as it was measured or estimated before the server began."""
        return json.dumps(self._cost.to_json())
