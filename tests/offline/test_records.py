"""Inputs: JSONL, CSV and Parquet, templates, and sampling fields by their types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import pytest

from loongjax.errors import ConfigError, RequestError
from loongjax.offline.native import NativeFormat
from loongjax.offline.records import open_records
from loongjax.offline.template import PromptTemplate
from loongjax.offline.values import read_value, with_fields
from loongjax.sampling.params import SamplingParams

NATIVE = NativeFormat(defaults=SamplingParams())


def tasks(path, form=NATIVE):
    """What comes of each record: a task, or the words of what is wrong."""
    found = []
    for record in open_records(path).records():
        try:
            found.append(record.error or form.read(record))
        except RequestError as error:
            found.append(str(error))
    return found


def test_csv(tmp_path):
    path = tmp_path / "in.csv"
    long = "long " * 40_000  # beyond the csv module's own limit of a cell
    path.write_bytes(
        b"\xef\xbb\xbfid,prompt,max_tokens,stop_token_ids,ignore_eos,messages\r\n"
        b'a,"two\nlines, ""quoted""",8,"[1, 2]",true,\r\n'
        b"\r\n"
        b'b,,,,,"[{""role"": ""user"", ""content"": ""hi""}]"\r\n'
        b"c,x,eight,,,\r\n"
        b"d,x\r\n"
        b"e,\xff,,,,\r\n"
        b"7,123,,,," + b"\r\n"
        b"g," + long.encode() + b",,,,\r\n"
    )
    first, chat, wrong, short, broken, number, last = tasks(path)
    assert (first.line, first.name, first.prompt) == (2, "a", 'two\nlines, "quoted"')
    assert first.params == SamplingParams(max_tokens=8, stop_token_ids=(1, 2), ignore_eos=True)
    assert (chat.line, chat.prompt) == (5, [{"role": "user", "content": "hi"}])
    assert wrong == 'max_tokens must be a whole number, not "eight"'
    assert short == "the row has 2 cells and the file 6 columns"
    assert broken == "the row is not UTF-8"
    assert (number.name, number.prompt, number.line) == ("7", "123", 9)
    assert last.prompt == long


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.csv", b"", "must name the columns"),
        ("in.csv", b"id,prompt,id\n", "column 'id' is there twice"),
        ("in.txt", b"x", "not '.txt'"),
        ("in.parquet", b"not Parquet", "cannot be read|not installed"),
    ],
)
def test_inputs_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        list(open_records(tmp_path / name).records())
    with pytest.raises(ConfigError, match="cannot be read"):
        open_records(tmp_path / "absent.jsonl")


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    messages = [{"role": "user", "content": "hi"}]
    table = pyarrow.Table.from_pylist(
        [
            {"id": 1, "prompt": "one", "max_tokens": 8.0, "messages": None, "n": None},
            {"id": 2, "prompt": None, "max_tokens": 2.5, "messages": messages, "n": 2},
            {"id": 3, "prompt": None, "max_tokens": None, "messages": messages, "n": 2},
        ]
        * 200
    )
    parquet.write_table(table, tmp_path / "in.parquet")
    found = tasks(tmp_path / "in.parquet")
    assert len(found) == 600
    assert (found[0].name, found[0].prompt, found[0].params.max_tokens) == (1, "one", 8)
    assert found[1] == "max_tokens must be a whole number, not 2.5"
    assert (found[599].line, found[599].name, found[599].prompt) == (600, 3, messages)
    assert found[599].params.n == 2


def test_a_template_takes_the_columns_of_a_table(tmp_path):
    path = tmp_path / "in.csv"
    path.write_text('title,body,seed\nA,"{b}",3\nB,,\n')
    form = NativeFormat(
        defaults=SamplingParams(), template=PromptTemplate("{{{title}}}: {body}"), chats=True
    )
    filled, empty = tasks(path, form)
    assert filled.prompt == [{"role": "user", "content": "{A}: {b}"}]
    assert filled.params.seed == 3
    assert empty == "the template needs 'body', which is absent or empty here"


@pytest.mark.parametrize("text", ["no column", "{a!r}", "{a:3}", "{", "{}", "{{a}}"])
def test_templates_that_say_something_else(text):
    with pytest.raises(ConfigError, match="the template"):
        PromptTemplate(text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": "8"}, 'max_tokens must be a whole number, not "8"'),
        ({"max_tokens": True}, "max_tokens must be a whole number, not true"),
        ({"temperature": "hot"}, 'temperature must be a number, not "hot"'),
        ({"temperature": float("nan")}, "temperature must be in"),
        ({"temperature": 10**400}, "temperature must be a"),
        ({"max_tokens": float("inf")}, "max_tokens must be a whole number"),
        ({"stop_token_ids": [1, "2"]}, "stop_token_ids must be a list"),
        ({"ignore_eos": 1}, "ignore_eos must be true or false, not 1"),
        ({"top": 1}, "unknown field 'top'"),
    ],
)
def test_values_of_the_wrong_type_are_refused_by_name(fields, message):
    with pytest.raises(RequestError, match=message):
        with_fields(SamplingParams(), fields)


TYPES = {
    "stop": str | tuple[str, ...],
    "bias": Mapping[int, float] | None,
    "mode": Literal["fast", "slow"],
    "cutoff": float | None,
}


@pytest.mark.parametrize(
    ("name", "value", "text", "expected"),
    [
        ("stop", ["a"], '["a"]', ("a",)),
        ("stop", "END", "END", "END"),
        ("bias", {"5": 1}, '{"5": 1}', {5: 1.0}),
        ("mode", "fast", "fast", "fast"),
        ("cutoff", 1, "1", 1.0),
    ],
)
def test_types_that_a_field_may_have(name, value, text, expected):
    assert read_value(name, value, TYPES[name]) == expected
    assert read_value(name, text, TYPES[name], is_text=True) == expected


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("mode", "x", "mode must be 'fast' or 'slow', not \"x\""),
        ("bias", {"five": 1}, "bias must be an object, not"),
        ("bias", {"5": "x"}, "bias must be an object, not"),
        ("stop", 5, "stop must be a text or a list, not 5"),
        ("cutoff", [1], "cutoff must be a number, not"),
    ],
)
def test_types_that_it_may_not(name, value, message):
    with pytest.raises(RequestError, match=message):
        read_value(name, value, TYPES[name])
