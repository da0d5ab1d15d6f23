"""Text in, tokens out, and back: tokenizers, chat templates, incremental detokenizing,
and the texts that end an answer.

Owns everything between a user's string and a request's token ids. Pure host code:
imports no jax and no torch.
"""

from loongjax.models.tokenizer_files import TokenizerFiles
from loongjax.text.answer import AnswerText
from loongjax.text.detokenizer import IncrementalDetokenizer
from loongjax.text.load import load_tokenizer
from loongjax.text.tokenizer import Tokenizer

__all__ = [
    "AnswerText",
    "IncrementalDetokenizer",
    "Tokenizer",
    "TokenizerFiles",
    "load_tokenizer",
]
