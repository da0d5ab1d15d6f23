"""Measurements: loongjax beside its peers, and what its parts cost. Used by commands alone."""
