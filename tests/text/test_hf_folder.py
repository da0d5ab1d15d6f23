"""Tokenizers from Hugging Face folders, against transformers."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import transformers
from tokenizers import Tokenizer as NativeTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from loongjax.errors import ModelError
from loongjax.text.hf_folder import load_hf_tokenizer
from tests.text.text_samples import SENTENCES, TEXTS

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHAT = [
    {"role": "system", "content": "Be brief. "},
    {"role": "user", "content": "What's 12 + 30? 😀"},
]


def trained() -> NativeTokenizer:
    native = NativeTokenizer(models.BPE())
    native.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    native.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    native.train_from_iterator(SENTENCES, trainer)
    native.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return native


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A chat model's folder as transformers writes it."""
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained(), bos_token="<s>", eos_token="<|im_end|>", pad_token="</s>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), "utf-8")


def oracle_of(folder: Path) -> Any:
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def test_ids_are_those_of_transformers(folder: Path) -> None:
    tokenizer, oracle = load_hf_tokenizer(folder), oracle_of(folder)
    for text in [*TEXTS, "raw <|im_end|> marks", "<s>twice"]:
        ids = tokenizer.encode(text, add_special=True)
        assert ids == oracle.encode(text)
        assert tokenizer.encode(text, add_special=False) == oracle.encode(
            text, add_special_tokens=False
        )
        assert tokenizer.decode(ids) == oracle.decode(ids, skip_special_tokens=True)
        assert tokenizer.decode(ids, skip_special=False) == oracle.decode(ids)


def test_the_folders_facts_are_known(folder: Path) -> None:
    tokenizer, oracle = load_hf_tokenizer(folder), oracle_of(folder)
    assert tokenizer.backend == "tokenizers"
    assert tokenizer.vocab_size == len(oracle)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (0, (3,))


@pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json", "named"])
def test_chats_are_those_of_transformers(folder: Path, where: str) -> None:
    oracle = oracle_of(folder)
    if where != "chat_template.jinja":
        (folder / "chat_template.jinja").unlink()
        named = [{"name": "rag", "template": "no"}, {"name": "default", "template": TEMPLATE}]
        template = named if where == "named" else TEMPLATE
        edit(folder / "tokenizer_config.json", lambda c: c.update(chat_template=template))
    tokenizer = load_hf_tokenizer(folder)
    for prompt in (True, False):
        assert tokenizer.apply_chat_template(CHAT, prompt) == oracle.apply_chat_template(
            CHAT, tokenize=False, add_generation_prompt=prompt
        )
    ids = tokenizer.encode_chat(CHAT)
    assert ids == oracle.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    assert ids.count(0) == 1  # one BOS, though a raw prompt gets one added


def test_the_templates_own_file_wins(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", lambda c: c.update(chat_template="from the config"))
    assert load_hf_tokenizer(folder).apply_chat_template(CHAT).startswith("<s><|im_start|>system")


@pytest.mark.parametrize("flags", [{}, {"add_bos_token": False}, {"add_eos_token": True}])
@pytest.mark.parametrize("adds", [True, False])
def test_tokenizer_json_alone_says_what_is_added_to_a_raw_prompt(
    folder: Path, flags: dict[str, bool], adds: bool
) -> None:
    if not adds:
        edit(folder / "tokenizer.json", lambda c: c.update(post_processor=None))
    edit(folder / "tokenizer_config.json", lambda c: c.update(flags))
    ids = load_hf_tokenizer(folder).encode("g", add_special=True)
    assert ids == oracle_of(folder).encode("g")
    assert ids.count(0) == adds


def test_tokens_that_only_the_config_lists_are_added(folder: Path) -> None:
    new = {"content": "<|new|>", "special": True, "lstrip": False, "rstrip": False}
    end = oracle_of(folder).vocab_size
    edit(
        folder / "tokenizer_config.json",
        lambda c: c.update(added_tokens_decoder={str(end): new}, eos_token="<|new|>"),
    )
    tokenizer = load_hf_tokenizer(folder)
    assert tokenizer.eos_ids == (end,)
    assert tokenizer.vocab_size == end + 1
    assert tokenizer.encode("<|new|>", add_special=False) == [end]
    assert tokenizer.decode([end]) == ""


def test_a_token_with_a_role_is_special_even_if_it_is_an_ordinary_one(folder: Path) -> None:
    token = oracle_of(folder).convert_tokens_to_ids("h")
    edit(folder / "tokenizer_config.json", lambda c: c.update(eos_token="h"))
    tokenizer = load_hf_tokenizer(folder)
    assert tokenizer.eos_ids == (token,)
    assert tokenizer.decode([token]) == ""


def test_truncation_and_padding_of_the_file_are_not_for_prompts(folder: Path) -> None:
    native = NativeTokenizer.from_file(str(folder / "tokenizer.json"))
    native.enable_truncation(max_length=4)
    native.enable_padding(length=8)
    native.save(str(folder / "tokenizer.json"))
    tokenizer = load_hf_tokenizer(folder)
    assert tokenizer.encode("g", add_special=True) == [0, *tokenizer.encode("g", add_special=False)]
    text = "g h " * 100
    assert tokenizer.decode(tokenizer.encode(text, add_special=True)) == text


def test_a_special_token_as_an_object_is_read(folder: Path) -> None:
    entry = {"__type": "AddedToken", "content": "</s>", "special": True}
    edit(folder / "tokenizer_config.json", lambda c: c.update(eos_token=entry))
    assert load_hf_tokenizer(folder).eos_ids == (1,)


def test_older_folders_keep_special_tokens_in_a_file_of_their_own(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", lambda c: c.pop("eos_token"))
    (folder / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    assert load_hf_tokenizer(folder).eos_ids == (1,)


def test_a_special_token_outside_the_vocabulary_is_said_and_left_out(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit(folder / "tokenizer_config.json", lambda c: c.update(eos_token="<|nowhere|>"))
    with caplog.at_level(logging.WARNING, logger="loongjax.text"):
        tokenizer = load_hf_tokenizer(folder)
    assert tokenizer.eos_ids == ()
    assert "eos_token '<|nowhere|>' is not in the vocabulary" in caplog.text


def test_a_lone_tokenizer_json_is_enough(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    (folder / "chat_template.jinja").unlink()
    tokenizer = load_hf_tokenizer(folder)
    assert tokenizer.encode("g", add_special=True)[0] == 0
    assert (tokenizer.eos_ids, tokenizer.has_chat_template) == ((), False)


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": 3}')


def broken_config(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{")


def config_of_another_type(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("[]")


def foreign_token(folder: Path) -> None:
    listed = {"added_tokens_decoder": {"9999": {"content": "<|x|>"}}}
    edit(folder / "tokenizer_config.json", lambda c: c.update(listed))


def no_default_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    named = {"chat_template": [{"name": "rag", "template": ""}]}
    edit(folder / "tokenizer_config.json", lambda c: c.update(named))


def word_pieces(folder: Path) -> None:
    edit(
        folder / "tokenizer.json",
        lambda c: c.update(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}),
    )


def no_decoder(folder: Path) -> None:
    edit(folder / "tokenizer.json", lambda c: c.update(decoder=None))


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (no_tokenizer, "has no tokenizer: neither tokenizer.json nor any of"),
        (broken_tokenizer, r"tokenizer\.json cannot be read as a tokenizer"),
        (broken_config, r"tokenizer_config\.json is not valid JSON"),
        (config_of_another_type, "must hold a JSON object, not a list"),
        (foreign_token, r"gives '<\|x\|>' the id 9999"),
        (no_default_template, r"chat templates named \['rag'\], but none named 'default'"),
        (word_pieces, r"decodes with \['WordPiece'\]; loongjax knows ByteLevel"),
        (no_decoder, r"decodes with \[None\]"),
    ],
)
def test_what_cannot_be_read_is_named(
    folder: Path, spoil: Callable[[Path], None], complaint: str
) -> None:
    spoil(folder)
    with pytest.raises(ModelError, match=complaint):
        load_hf_tokenizer(folder)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no folder .*absent"):
        load_hf_tokenizer(tmp_path / "absent")


# --- folders without tokenizer.json ---------------------------------------------------------


@pytest.fixture
def slow_folder(tmp_path: Path, sentencepiece_model: bytes) -> Path:
    """A folder like Llama 2's: a SentencePiece model and configs."""
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": "{{ bos_token }}[INST] {{ messages[0].content }} [/INST]",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_sentencepiece_folder_is_converted_and_said(
    slow_folder: Path,
    sentencepiece_oracle: sentencepiece.SentencePieceProcessor,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, logger="loongjax.text"):
        tokenizer = load_hf_tokenizer(slow_folder)
    assert "transformers converts its tokenizer" in caplog.text
    assert tokenizer.backend == "transformers"
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2,))
    for text in SENTENCES:
        ids = tokenizer.encode(text, add_special=True)
        assert ids == [1, *sentencepiece_oracle.encode(text)]
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode_chat([{"role": "user", "content": "hi"}]).count(1) == 1


def test_what_transformers_cannot_convert_is_named(slow_folder: Path) -> None:
    (slow_folder / "tokenizer.model").write_bytes(b"no model")
    with pytest.raises(ModelError, match="transformers cannot convert its tokenizer"):
        load_hf_tokenizer(slow_folder)


def test_a_tokenizer_of_python_code_is_named(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"model_type": "byt5"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    with pytest.raises(ModelError, match=r"ByT5Tokenizer\) is Python code of transformers"):
        load_hf_tokenizer(tmp_path)


def test_code_from_the_folder_never_runs(tmp_path: Path) -> None:
    proof = tmp_path / "it_ran"
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "mine.py").write_text(f"open({str(proof)!r}, 'w')\nclass Mine: pass\n")
    (tmp_path / "config.json").write_text('{"model_type": "mine"}')
    (tmp_path / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": ["mine.Mine", null]}}'
    )
    with pytest.raises(ModelError, match="transformers cannot convert its tokenizer"):
        load_hf_tokenizer(tmp_path)
    assert not proof.exists()
