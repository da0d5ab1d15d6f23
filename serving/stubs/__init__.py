"""Made by `scripts/generate_stubs.py` from `protos/`; never edited."""
