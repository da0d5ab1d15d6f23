"""Who is let in."""

from __future__ import annotations

import os

import pytest

from loongjax.errors import ConfigError
from serving.auth import Guard, Scope, TokenFile
from serving.errors import ForbiddenError, UnknownClientError

ALICE, BOB = "a" * 20, "b" * 20


def write(path, text):
    path.write_text(text)
    os.utime(path, ns=(write.time, write.time))
    write.time += 1_000_000


write.time = 10**18


@pytest.fixture
def path(tmp_path):
    write(tmp_path / "tokens", f"# who may\nalice {ALICE}\n\nbob {BOB}\n")
    return tmp_path / "tokens"


def test_names_of_tokens(path):
    tokens = TokenFile(path)
    assert tokens.name_of(ALICE) == "alice"
    assert tokens.name_of(BOB) == "bob"
    assert tokens.name_of(ALICE[:-1]) is None
    assert tokens.name_of("\udc80") is None


def test_a_changed_file_is_read_again(path, caplog):
    now = 0.0
    tokens = TokenFile(path, clock=lambda: now)
    write(path, f"carol {BOB}")
    assert tokens.name_of(BOB) == "bob"
    now = 2.0
    assert tokens.name_of(BOB) == "carol"
    assert tokens.name_of(ALICE) is None
    for wrong in ("carol short", "# nobody", "x"):
        write(path, wrong)
        now += 2.0
        assert tokens.name_of(BOB) == "carol"
    path.unlink()
    now += 2.0
    assert tokens.name_of(BOB) == "carol"
    assert caplog.text.count("the tokens stay as they were") == 4
    assert BOB not in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alice", "line 1 of the token file"),
        ("# x\nalice 123", "line 2 .* at least 16 characters"),
        ("", "has no token"),
    ],
)
def test_wrong_files(tmp_path, text, message):
    (tmp_path / "tokens").write_text(text)
    with pytest.raises(ConfigError, match=message):
        TokenFile(tmp_path / "tokens")


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        Guard.of_files(tmp_path / "absent", None)


def test_without_tokens_everybody_is_let_in():
    guard = Guard.of_files(None, None)
    for scope in Scope:
        assert guard.admit(scope, None, "10.0.0.1") == "10.0.0.1"
        assert guard.admit(scope, "Bearer whatever", "10.0.0.1") == "10.0.0.1"


def test_scopes_are_separate(path, tmp_path):
    write(tmp_path / "cluster", f"root {'r' * 20}")
    guard = Guard.of_files(path, tmp_path / "cluster")
    assert guard.admit(Scope.INFERENCE, f"Bearer {ALICE}", "peer") == "alice"
    assert guard.admit(Scope.CLUSTER, f"bearer  {'r' * 20} ", "peer") == "root"
    with pytest.raises(ForbiddenError, match="not for cluster"):
        guard.admit(Scope.CLUSTER, f"Bearer {ALICE}", "peer")
    with pytest.raises(ForbiddenError, match="not for inference"):
        guard.admit(Scope.INFERENCE, f"Bearer {'r' * 20}", "peer")
    for wrong in (None, "", "Bearer", "Basic abc", ALICE):
        with pytest.raises(UnknownClientError, match="a token is needed"):
            guard.admit(Scope.INFERENCE, wrong, "peer")
    with pytest.raises(UnknownClientError, match="nobody has this token"):
        guard.admit(Scope.INFERENCE, "Bearer nobody", "peer")


def test_the_cluster_is_closed_where_only_inference_has_tokens(path):
    guard = Guard.of_files(path, None)
    for authorization in (None, f"Bearer {ALICE}"):
        with pytest.raises(ForbiddenError, match="cluster is closed"):
            guard.admit(Scope.CLUSTER, authorization, "peer")


def test_the_cluster_may_be_guarded_alone(path):
    guard = Guard.of_files(None, path)
    assert guard.admit(Scope.INFERENCE, None, "peer") == "peer"
    assert guard.admit(Scope.CLUSTER, f"Bearer {ALICE}", "peer") == "alice"
