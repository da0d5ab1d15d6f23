"""Programs on disk: what comes back, what is not used, and what is refused."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest

from loongjax.errors import ConfigError
from loongjax.programs import store as module
from loongjax.programs.store import ProgramStore, StoredProgram, default_folder

KEY = {"name": "decode-d2-t4-r4", "slots": 256, "spec": {"kind": "decode", "placement": (0, 1)}}
PROGRAM = StoredProgram(data=b"\x00machine\ncode\xff" * 100, compiled_for=(0, 1))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "programs"


@pytest.fixture
def saved(folder: Path) -> Path:
    """The one file of a folder with `PROGRAM` in it."""
    ProgramStore(folder).save(KEY, PROGRAM)
    (path,) = folder.iterdir()
    return path


def test_a_program_comes_back_as_it_was(folder, saved):
    assert ProgramStore(folder).load(KEY) == PROGRAM
    assert saved.name.startswith("decode-d2-t4-r4-")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert saved.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("other", [{"slots": 257}, {"name": "other"}, {"more": 1}])
def test_another_key_has_another_file(folder, saved, other):
    store = ProgramStore(folder)
    assert store.load(KEY | other) is None
    store.save(KEY | other, StoredProgram(data=b"other", compiled_for=(3,)))
    assert store.load(KEY) == PROGRAM


def refused_with(folder: Path, caplog, reason: str) -> None:
    with caplog.at_level(logging.WARNING):
        assert ProgramStore(folder).load(KEY) is None
    assert reason in caplog.text
    assert "not using compiled program" in caplog.text


def test_damaged_content_is_not_used(folder, saved, caplog):
    data = bytearray(saved.read_bytes())
    data[-7] ^= 1
    saved.write_bytes(data)
    refused_with(folder, caplog, "its content is damaged")


def test_a_file_of_another_key_is_not_used(folder, saved, caplog):
    header, data = saved.read_bytes().split(b"\n", 1)
    changed = json.loads(header)
    changed["key"]["slots"] = 512
    saved.write_bytes(json.dumps(changed).encode() + b"\n" + data)
    refused_with(folder, caplog, "made for something else")


@pytest.mark.parametrize("size", [0, 10, 200, -1])
def test_a_truncated_file_is_not_used(folder, saved, caplog, size):
    saved.write_bytes(saved.read_bytes()[:size])
    refused_with(folder, caplog, str(saved))


def test_a_damaged_file_is_replaced_by_the_next_save(folder, saved):
    saved.write_bytes(b"rubbish")
    ProgramStore(folder).save(KEY, PROGRAM)
    assert ProgramStore(folder).load(KEY) == PROGRAM


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777])
def test_a_folder_that_others_can_write_is_refused(folder, mode):
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(ConfigError, match=rf"mode {mode:o}.*make it 0700.*program_dir"):
        ProgramStore(folder)


def test_a_folder_of_somebody_else_is_refused(folder, monkeypatch):
    folder.mkdir(mode=0o700)
    owner = os.getuid()
    monkeypatch.setattr(module.os, "getuid", lambda: owner + 1)
    with pytest.raises(ConfigError, match=f"belongs to user {owner}, not to {owner + 1}"):
        ProgramStore(folder)


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_file_that_others_can_write_is_not_used(folder, saved, caplog, mode):
    saved.chmod(mode)
    refused_with(folder, caplog, "can be written by others")


def test_a_file_of_somebody_else_is_not_used(folder, saved, caplog, monkeypatch):
    store, owner = ProgramStore(folder), os.getuid()
    monkeypatch.setattr(module.os, "getuid", lambda: owner + 1)
    with caplog.at_level(logging.WARNING):
        assert store.load(KEY) is None
    assert f"belongs to user {owner}" in caplog.text


def test_a_save_that_fails_leaves_the_old_program_and_no_rubbish(folder, saved, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            ProgramStore(folder).save(KEY, StoredProgram(data=b"new", compiled_for=(0, 1)))
    assert list(folder.iterdir()) == [saved]
    assert ProgramStore(folder).load(KEY) == PROGRAM


def test_readers_never_see_half_a_file(folder, saved, monkeypatch):
    """Until the very last call the old file stands, whole; then the new one does."""
    store, seen = ProgramStore(folder), []
    replace = os.replace

    def watch(source, target):
        seen.append(store.load(KEY))
        replace(source, target)
        seen.append(store.load(KEY))

    new = StoredProgram(data=b"new", compiled_for=(0, 1))
    monkeypatch.setattr(module.os, "replace", watch)
    store.save(KEY, new)
    assert seen == [PROGRAM, new]


def test_default_folder_is_the_users_own(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "loongjax" / "programs"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder() == tmp_path / ".cache" / "loongjax" / "programs"
