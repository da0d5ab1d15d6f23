"""What the cluster did: a picture, a trace for Perfetto, a few lines of text. Imports no jax."""

from loongjax.timeline.timeline import Timeline

__all__ = ["Timeline"]
