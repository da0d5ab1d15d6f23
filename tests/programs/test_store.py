"""Programs on disk: what comes back, what is not used, and what is refused."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path

import pytest

from loongjax.errors import ConfigError
from loongjax.programs import folder as module
from loongjax.programs.folder import default_folder
from loongjax.programs.store import ProgramStore, StoredProgram

KEY = {"name": "decode-d2-t4-r4", "slots": 256, "spec": {"kind": "decode", "placement": (0, 1)}}
PROGRAM = StoredProgram(
    data=b"\x00machine\ncode\xff" * 100, compiled_for=(0, 1), temporary_bytes=5, code_bytes=None
)
NOTE = {"name": "pool", "platform": "cpu"}


def load(folder: Path, devices: int = 2, trusted: Path | None = None) -> StoredProgram | None:
    return ProgramStore(folder, trusted).load(KEY, devices)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "programs"


@pytest.fixture
def saved(folder: Path) -> Path:
    """The one file of a folder with `PROGRAM` in it."""
    ProgramStore(folder).save(KEY, PROGRAM)
    (path,) = folder.iterdir()
    return path


@pytest.fixture
def somebody_else(monkeypatch):
    """Everything on disk belongs to another user."""
    owner = os.getuid()
    monkeypatch.setattr(module.os, "getuid", lambda: owner + 1)
    return f"belongs to user {owner}, not to {owner + 1}"


def test_a_program_comes_back_as_it_was(folder, saved):
    assert load(folder) == PROGRAM
    assert saved.name.startswith("decode-d2-t4-r4-")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert saved.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("other", [{"slots": 257}, {"name": "other"}, {"more": 1}])
def test_another_key_has_another_file(folder, saved, other):
    store = ProgramStore(folder)
    assert store.load(KEY | other, 2) is None
    store.save(KEY | other, StoredProgram(data=b"other", compiled_for=(3,)))
    assert store.load(KEY, 2) == PROGRAM


def refused_with(folder: Path, caplog, reason: str, devices: int = 2) -> None:
    with caplog.at_level(logging.WARNING):
        assert load(folder, devices) is None
    assert reason in caplog.text
    assert "not using compiled program" in caplog.text


# ---- damage -----------------------------------------------------------------------------


def test_a_flipped_bit_anywhere_is_found(folder, saved, caplog):
    """In the format, the digest, the header, the devices, the program."""
    whole = saved.read_bytes()
    for at in [*range(0, len(whole) - 1, 37), len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[at] ^= 1
        saved.write_bytes(damaged)
        caplog.clear()
        refused_with(folder, caplog, "damaged, or of another format")


@pytest.mark.parametrize("size", [0, 10, 100, 300, -1])
def test_a_truncated_file_is_not_used(folder, saved, caplog, size):
    saved.write_bytes(saved.read_bytes()[:size])
    refused_with(folder, caplog, str(saved))


def test_a_damaged_file_is_replaced_by_the_next_save(folder, saved):
    saved.write_bytes(b"rubbish")
    ProgramStore(folder).save(KEY, PROGRAM)
    assert load(folder) == PROGRAM


def forge(path: Path, **changes: object) -> None:
    """Changes the header and makes the digest fit."""
    _, header, data = path.read_bytes().split(b"\n", 2)
    rest = json.dumps(json.loads(header) | changes).encode() + b"\n" + data
    digest = hashlib.sha256(rest).hexdigest()
    path.write_bytes(f"loongjax-program-2 {digest}\n".encode() + rest)


def test_a_file_of_another_key_is_not_used(folder, saved, caplog):
    forge(saved, key=KEY | {"slots": 512})
    refused_with(folder, caplog, "made for something else")


@pytest.mark.parametrize("devices", [[0], [0, 0], [0, 1, 2], 7, None])
def test_a_program_for_another_number_of_devices_is_not_used(folder, saved, caplog, devices):
    """Loaded onto fewer devices than it has, it would end the process."""
    forge(saved, compiled_for=devices)
    refused_with(folder, caplog, "")


def test_a_header_without_its_fields_is_not_used(folder, saved, caplog):
    rest = b"{}\n"
    digest = hashlib.sha256(rest).hexdigest().encode()
    saved.write_bytes(b"loongjax-program-2 " + digest + b"\n" + rest)
    refused_with(folder, caplog, "'key'")


# ---- files and folders of others ---------------------------------------------------------


@pytest.mark.parametrize("mode", [0o770, 0o702, 0o777])
def test_a_folder_that_others_can_write_is_refused(folder, mode):
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(ConfigError, match=rf"mode {mode:o}.*make it 0700.*program_dir"):
        ProgramStore(folder)


def test_a_folder_that_others_can_write_later_is_not_read(folder, saved, caplog):
    store = ProgramStore(folder)
    folder.chmod(0o777)
    assert store.load(KEY, 2) is None
    assert f"{folder} can be written by others (mode 777)" in caplog.text


def test_a_folder_of_somebody_else_is_refused(folder, somebody_else):
    folder.mkdir(mode=0o700)
    with pytest.raises(ConfigError, match=somebody_else):
        ProgramStore(folder)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot make .*choose another program_dir"):
        ProgramStore(tmp_path / "file" / "programs")


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_file_that_others_can_write_is_not_used(folder, saved, caplog, mode):
    saved.chmod(mode)
    refused_with(folder, caplog, "can be written by others")


def test_a_file_of_somebody_else_is_not_used(folder, saved, caplog, monkeypatch):
    real = os.fstat

    def others(descriptor):
        status = list(real(descriptor))
        status[4] += 1  # st_uid
        return os.stat_result(status)

    monkeypatch.setattr(module.os, "fstat", others)
    refused_with(folder, caplog, f"belongs to user {os.getuid() + 1}")


def test_a_link_is_not_followed(folder, saved, caplog):
    target = saved.rename(folder.parent / "elsewhere")
    saved.symlink_to(target)
    refused_with(folder, caplog, str(saved))


def test_a_pipe_is_not_waited_for(folder, saved, caplog):
    saved.unlink()
    os.mkfifo(saved, 0o600)
    refused_with(folder, caplog, "no plain file")


# ---- a library made elsewhere --------------------------------------------------------------


@pytest.fixture
def library(folder, saved):
    """A folder with `PROGRAM`, that everybody can write."""
    folder.chmod(0o777)
    saved.chmod(0o666)
    return folder


def test_a_library_is_read_only_if_it_is_named(library, tmp_path):
    own = tmp_path / "own"
    assert load(own) is None
    assert load(own, trusted=library) == PROGRAM
    before = list(library.iterdir())
    store = ProgramStore(own, library)
    store.save(KEY, PROGRAM)
    store.save_note(NOTE, {})
    assert list(library.iterdir()) == before
    assert len(list(own.iterdir())) == 2


def test_a_trusted_library_may_belong_to_anybody_and_is_checked_for_damage(
    library, saved, tmp_path, monkeypatch, caplog
):
    store = ProgramStore(tmp_path / "own", library)
    monkeypatch.setattr(module.os, "getuid", lambda: -5)
    assert store.load(KEY, 2) == PROGRAM
    monkeypatch.undo()
    assert store.load(KEY, 3) is None
    saved.write_bytes(saved.read_bytes()[:-1])
    assert store.load(KEY, 2) is None
    assert f"not using compiled program {saved}" in caplog.text


def test_the_own_folder_comes_first(library, tmp_path):
    own, mine = tmp_path / "own", StoredProgram(data=b"mine", compiled_for=(4, 5))
    ProgramStore(own).save(KEY, mine)
    assert load(own, trusted=library) == mine


def test_a_library_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no program library to trust at .*/nowhere"):
        ProgramStore(tmp_path / "own", tmp_path / "nowhere")


# ---- notes ---------------------------------------------------------------------------------


def test_notes_come_back_under_their_key_alone(folder):
    store = ProgramStore(folder)
    assert store.load_note(NOTE) is None
    store.save_note(NOTE, {"slots": 5})
    assert store.load_note(NOTE) == {"slots": 5}
    assert store.load_note(NOTE | {"platform": "gpu"}) is None


@pytest.mark.parametrize("content", [b"", b"[1]", b"{}", b'{"key": 1, "note": {}}', b"\xff"])
def test_a_damaged_note_is_not_used(folder, caplog, content):
    store = ProgramStore(folder)
    store.save_note(NOTE, {"slots": 5})
    (path,) = folder.iterdir()
    path.write_bytes(content)
    assert store.load_note(NOTE) is None
    assert f"not using {path.name}" in caplog.text


# ---- writing -------------------------------------------------------------------------------


def test_a_save_that_fails_leaves_the_old_program_and_no_rubbish(folder, saved, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            ProgramStore(folder).save(KEY, StoredProgram(data=b"new", compiled_for=(0, 1)))
    assert list(folder.iterdir()) == [saved]
    assert load(folder) == PROGRAM


def test_readers_never_see_half_a_file(folder, saved, monkeypatch):
    """Until the very last call the old file stands, whole; then the new one does."""
    store, seen = ProgramStore(folder), []
    replace = os.replace

    def watch(source, target):
        seen.append(store.load(KEY, 2))
        replace(source, target)
        seen.append(store.load(KEY, 2))

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
