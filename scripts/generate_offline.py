"""Answers a file of prompts, line by line, and goes on where it stopped: `loongjax generate`.

python scripts/generate_offline.py --model demo --input in.jsonl --output out.jsonl
"""

from __future__ import annotations

import sys

from loongjax.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
