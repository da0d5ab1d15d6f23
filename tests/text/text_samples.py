"""Texts that are hard on tokenizers, and a writer of small GGUF files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Four score and seven years ago our fathers brought forth a new nation.",
    "We choose to go to the moon, not because it is easy, but because it is hard.",
    "She said: 'It's 12345 o'clock, isn't it?' and they'll agree.",
    "def area(r): return 3.14159 * r ** 2  # in square metres",
    "Le cœur a ses raisons que la raison ne connaît point.",
]

TEXTS = [
    "Hello world! 123",
    "",
    " ",
    "\n",
    "   leading, and trailing   ",
    "two  spaces\n\n\tand a tab\r\nand more \n \n",
    "naïve café — “quotes”… e\u0301",
    "日本語のテキスト。中文,測試。한국어 텍스트",
    "Привет, мир! Ελληνικά עברית العربية हिन्दी",
    "def f(x):\n    return x**2 + 3.14e-10  # comment\n",
    "😀👩‍👩‍👧‍👦🇩🇪 emoji",
    "1234567890 3.14 ½ ٣  5   66",
    "I'll we've they're IT'S don't 'S",
    "\u00a0no-break\u3000ideographic",
    "$%^&*()[]{}<>?/|\\~`@#",
    "https://example.org/a?b=c&d=%20",
    *SENTENCES,
]


def write_gguf(path: Path, metadata: Mapping[str, Any]) -> None:
    """Writes a GGUF file that holds nothing but metadata."""
    writer = gguf.GGUFWriter(path, arch="llama")
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
