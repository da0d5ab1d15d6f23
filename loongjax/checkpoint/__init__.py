"""Checkpoints of other layouts, written from any model that can be resolved.

convert("demo", Path("demo-orbax"), to="orbax")
"""

from loongjax.checkpoint.convert import Conversion, convert

__all__ = ["Conversion", "convert"]
