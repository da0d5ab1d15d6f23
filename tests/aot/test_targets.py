"""Targets, the packages of their compilers, and what is said where one is missing."""

from __future__ import annotations

import threading
import time
from importlib import metadata, resources

import pytest

from loongjax.aot import compilers
from loongjax.aot.compilers import install, is_installed, packages_of, start
from loongjax.aot.targets import TARGETS, target_of
from loongjax.costmodel.hardware import load_hardware
from loongjax.errors import ConfigError


def test_every_target_has_a_hardware_description():
    for target in TARGETS:
        assert load_hardware(target.chip).platform == ("tpu" if target.compiler == "tpu" else "gpu")
        assert target_of(target.name) is target


def test_an_unknown_target_is_refused():
    with pytest.raises(ConfigError, match=r"one of v5e:2x4, .*h100x8, not 'h200'"):
        target_of("h200")


def test_gpu_targets_agree_with_their_hardware_description():
    for chip in ("a100", "h100"):
        text = (resources.files("loongjax.aot") / "gpu_targets" / f"{chip}.txt").read_text()
        bandwidth = float(text.split("memory_bandwidth: ")[1].split()[0])
        assert bandwidth == pytest.approx(load_hardware(chip).hbm_bytes_per_s, rel=0.01)


def test_compilers_are_those_of_the_jax_that_runs():
    version = metadata.version("jax")
    assert f"jax-cuda13-plugin=={version}" in packages_of("cuda")
    (libtpu,) = packages_of("tpu")
    assert libtpu.startswith("libtpu==")


def test_a_missing_compiler_is_said_with_its_remedy(tmp_path):
    assert not is_installed("tpu", tmp_path)
    with pytest.raises(ConfigError, match=r"install_compilers\.py --folder"):
        start("tpu", tmp_path, ["-c", ""])


def test_a_failed_installation_shows_pips_last_words(tmp_path, monkeypatch):
    monkeypatch.setattr("loongjax.aot.compilers.packages_of", lambda _: ("no==such==version",))
    with pytest.raises(ConfigError, match=r"(?s)install .* failed:.*no==such==version"):
        install("tpu", tmp_path)
    assert not is_installed("tpu", tmp_path)


def test_two_that_install_at_once_do_it_once(tmp_path, monkeypatch):
    """As two processes of a test run do."""
    done = []

    def slow(compiler, folder):
        done.append(compiler)
        time.sleep(0.1)
        (folder / compiler).mkdir()
        (folder / compiler / "installed.txt").write_text("\n".join(packages_of(compiler)) + "\n")

    monkeypatch.setattr(compilers, "_install", slow)
    both = [threading.Thread(target=compilers.install, args=("tpu", tmp_path)) for _ in range(2)]
    for each in both:
        each.start()
    for each in both:
        each.join()
    assert done == ["tpu"]
