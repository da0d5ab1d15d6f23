"""A tokenizer as files that other programs read, whatever files it came from."""

from __future__ import annotations

import json

from loongjax.text.tokenizer import Tokenizer


def tokenizer_files(tokenizer: Tokenizer, ids: int) -> dict[str, str]:
    """`tokenizer.json` and `tokenizer_config.json` of the Hugging Face layout, by name.

    `ids` is how many ids its model produces.
    """
    config: dict[str, str] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    template = tokenizer.chat_template
    if template is not None:
        config |= template.variables
        config["chat_template"] = template.source
    return {
        "tokenizer.json": tokenizer.vocabulary.to_json(ids),
        "tokenizer_config.json": json.dumps(config, ensure_ascii=False),
    }
