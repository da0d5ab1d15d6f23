"""The system's bound on mappings, and what a process has."""

from __future__ import annotations

import mmap

import pytest

from loongjax.programs import mappings


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Sets what the system grants, and what the process has."""

    def set_to(most: int | None, count: int) -> None:
        monkeypatch.setattr(mappings, "_MOST", tmp_path / "most")
        monkeypatch.setattr(mappings, "_MAPS", tmp_path / "maps")
        if most is not None:
            (tmp_path / "most").write_text(f"{most}\n")
        (tmp_path / "maps").write_text("00400000-00452000 r-xp\n" * count)

    return set_to


def test_there_is_room_up_to_a_share_of_what_is_granted(system):
    system(100, 69)
    assert mappings.has_room()
    system(100, 70)
    assert not mappings.has_room()


def test_where_nothing_is_said_there_is_room(system):
    system(None, 10**5)
    assert mappings.most_mappings() is None
    assert mappings.has_room()


@pytest.mark.skipif(mappings.most_mappings() is None, reason="this system sets no such bound")
def test_mappings_of_this_process_are_counted():
    before = mappings.count_mappings()
    made = [mmap.mmap(-1, mmap.PAGESIZE, prot=prot) for prot in (mmap.PROT_READ, 3) * 50]
    after = mappings.count_mappings()
    for one in made:
        one.close()
    assert 0 < before < after <= mappings.most_mappings()
