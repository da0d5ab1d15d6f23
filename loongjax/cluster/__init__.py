"""Devices as elastic instances: topology, emulation, meshes, and zero-copy group views.

`topology` is pure Python and safe to import without jax; the rest is not.
"""
