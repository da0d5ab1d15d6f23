"""Chat templates: what they can use, and how they and bad messages are refused."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from loongjax.errors import ModelError, RequestError
from loongjax.text import Tokenizer
from loongjax.text.chat_template import ChatTemplate

USER = {"role": "user", "content": "hi"}


def render(source: str, messages: Any = (USER,), *, prompt: bool = True) -> str:
    template = ChatTemplate(source, variables={"bos_token": "<s>"}, origin="test")
    return template.render(messages, add_generation_prompt=prompt)


def test_messages_special_tokens_and_prompt_are_there() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert render(source) == "<s>[user] hi\n[assistant]"
    assert render(source, prompt=False) == "<s>[user] hi\n"


def test_blocks_leave_no_blank_lines_behind() -> None:
    assert render("  {% if true %}\nx\n  {% endif %}\ny") == "x\ny"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ {'a': '<é>'} | tojson }}", '{"a": "<é>"}'),
        ("{{ [1, 2] | tojson(indent=1) }}", "[\n 1,\n 2\n]"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "hi!"),
        ("{{ tools is none and documents is none }}", "True"),
        ("{% set ns = namespace(n=1) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}", "2"),
    ],
)
def test_what_templates_of_real_models_use_works(source: str, expected: str) -> None:
    assert render(source) == expected


def test_the_date_is_todays() -> None:
    before, after = datetime.now(), datetime.now()
    shown = render("{{ strftime_now('%d %b %Y') }}")
    assert shown in {before.strftime("%d %b %Y"), after.strftime("%d %b %Y")}


def test_further_keys_of_a_message_reach_the_template() -> None:
    assert render("{{ messages[0].name }}", [USER | {"name": "Ann"}]) == "Ann"


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "at least one message"),
        ([{"content": "hi"}], r"messages\[0\] lacks 'role'"),
        ([USER, {"role": "user"}], r"messages\[1\] lacks 'content'"),
        ([{"role": "user", "content": None}], r"\['content'\] must be a string, not NoneType"),
        ([{"role": 3, "content": "hi"}], r"\['role'\] must be a string, not int"),
        (["hi"], r"messages\[0\] must be an object .* not str"),
    ],
)
def test_bad_messages_are_refused_by_place(messages: Any, complaint: str) -> None:
    with pytest.raises(RequestError, match=complaint):
        render("{{ messages }}", messages)


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[7].content }}", "refused the chat"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "not safely callable|unsafe"),
    ],
)
def test_what_the_template_or_its_sandbox_refuses_is_the_requests_fault(
    source: str, complaint: str
) -> None:
    with pytest.raises(RequestError, match=complaint):
        render(source)


def test_a_template_that_does_not_compile_is_the_models_fault() -> None:
    with pytest.raises(ModelError, match="chat template of test does not compile: line 2"):
        render("\n{% if %}")


def test_a_model_without_a_template_cannot_chat(byte_tokens: Tokenizer) -> None:
    assert not byte_tokens.has_chat_template
    with pytest.raises(RequestError, match=r"no chat template.*plain prompt"):
        byte_tokens.encode_chat([USER])
