"""Policies, each in a module of its own."""
