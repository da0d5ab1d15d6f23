"""The site builds without a warning, has every page, and documents every public name."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import loongjax
from tests.docs.blocks import ROOT

CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
PAGES = [name for entry in CONFIG["nav"] for name in entry.values()]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_in_the_menu() -> None:
    assert sorted(PAGES) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_every_public_name_is_on_the_page_of_the_api(site: Path) -> None:
    html = (site / "api" / "index.html").read_text("utf-8")
    documented = set(re.findall(r'id="loongjax\.(\w+)"', html))
    assert documented == set(loongjax.__all__) - {"__version__"}
    assert "loongjax.__version__" in html


def test_what_a_name_inherits_is_there_and_what_is_private_is_not(site: Path) -> None:
    html = (site / "api" / "index.html").read_text("utf-8")
    for name in ("LLM.generate", "LLM.timeline", "LLM.close", "RequestOutput.timeline"):
        assert f'id="loongjax.{name}"' in html
    assert not re.search(r'id="loongjax[\w.]*\._', html)


def test_a_reader_fetches_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|link)[^>]*(?:src|href)="(https?:[^"]*)"', page.read_text()
        )
        assert not loaded, page
