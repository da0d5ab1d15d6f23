"""`loongjax profile` on emulated devices: a file that serves here, and nowhere else."""

from __future__ import annotations

import json

import pytest

from loongjax.cli.main import main
from loongjax.costmodel import ScalingInformationBase
from loongjax.simulator import deploy

ENGINE = ["--model", "random:tiny", "--instances", "2", "--pool-slots", "4096"]
SMALL = ["--max-model-len", "1024", "--max-chunk-tokens", "128"]


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("profile")


@pytest.mark.usefixtures("without_shape_checks")
def test_a_profile_is_written_and_serves(folder, capsys):
    path = folder / "cost.json"
    assert main(["profile", *ENGINE, *SMALL, "--out", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert set(report) == {
        "out",
        "fingerprint",
        "degrees",
        "points",
        "resumed",
        "held_out",
        "crowding",
        "host",
        "wall_s",
    }
    assert report["degrees"] == [1, 2]
    assert report["held_out"].keys() == {"prefill", "decode", "migrate"}
    assert all(seconds >= 0.0 for seconds in report["host"].values())
    assert not list(folder.glob("*.part"))
    sib = ScalingInformationBase.load(path)
    assert sib.padding is not None
    assert (sib.padding.chunks, sib.pool_slots) == ((128,), 4096)
    assert deploy(str(path), "tiny", instances=2).limits.max_chunk_tokens == 128

    serve = ["generate", *ENGINE, "--prompt", "abc", "--max-tokens", "3", "--json"]
    policy = ["--policy", "loongserve", "--cost-model", str(path)]
    assert main([*serve, *SMALL, *policy]) == 0
    assert json.loads(capsys.readouterr().out)["completion_tokens"] == 3
    assert main([*serve, *policy]) == 2, "steps of another size"
    assert "Measure here with `loongjax profile`" in capsys.readouterr().err


def test_a_folder_that_does_not_exist_is_a_users_mistake(capsys):
    assert main(["profile", *ENGINE, "--out", "/no/such/folder/cost.json"]) == 2
    assert "there is no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--cost-model", "--policy"])
def test_nobody_plans_while_it_measures(capsys, option):
    with pytest.raises(SystemExit) as stopped:
        main(["profile", *ENGINE, "--out", "cost.json", option, "x"])
    assert stopped.value.code == 2
    assert f"unrecognized arguments: {option} x" in capsys.readouterr().err
