"""Whole files of prompts: a file in, one line of answer for each of its lines out.

`job` runs them, `records` reads them, `output` writes and resumes, `native` says what a line
means; who answers is behind `backend.Backend`. Imports no jax.
"""
