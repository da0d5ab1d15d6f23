"""`loongjax plan`: what it finds, and how it refuses."""

from __future__ import annotations

import json

import pytest

from loongjax.cli.main import main

FEW = ["plan", "--workload", "leval", "--requests", "12", "--seed", "3"]


def plan_json(capsys, *arguments: str) -> dict:
    assert main([*FEW, *arguments, "--json"]) == 0
    (line,) = capsys.readouterr().out.strip().splitlines()
    return json.loads(line)


def test_the_cheapest_that_is_good_enough(capsys):
    policies = ["--policy", "loongserve", "--policy", "tp", "--policy", "disaggregated"]
    found = plan_json(capsys, "--rate", "0.4", *policies)
    prices = [option["price"] for option in found["options"]]
    assert prices == sorted(prices)
    assert found["best"]["good"]
    assert found["best"]["price"] == min(o["price"] for o in found["options"] if o["good"])
    alone = [o for o in found["options"] if o["policy"] == "disaggregated" and o["price"] == 1]
    assert alone[0]["reason"] == "one instance cannot have prefill and decode apart"


def test_prices_decide_between_kinds_of_chips(capsys):
    kinds = ["--rate", "0.2", "--hardware", "a800x8", "--hardware", "h100x8"]
    dear = plan_json(capsys, *kinds, "--price", "h100=50")["best"]
    assert dear["hardware"].startswith("a800")
    cheap = plan_json(capsys, *kinds, "--price", "h100=0.02")["best"]
    assert cheap["hardware"].startswith("h100")


def test_what_cannot_keep_up_is_not_simulated(capsys):
    found = plan_json(capsys, "--rate", "500", "--hardware", "a800x2")
    assert found["best"] is None
    assert {option["slo_attainment"] for option in found["options"]} == {None}
    assert all("are the fluid bound" in option["reason"] for option in found["options"])


def test_lines_for_people(capsys):
    assert main([*FEW, "--rate", "500", "--hardware", "a800x1"]) == 0
    assert "nothing within the budget" in capsys.readouterr().out
    assert main([*FEW, "--rate", "0.1"]) == 0
    assert "cheapest: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rate", "1", "--hardware", "a800"], "--hardware is NAMExN"),
        (["--rate", "1", "--hardware", "b300x8"], "no hardware is called 'b300'"),
        (["--rate", "1", "--hardware", "a800x0"], "0 chips"),
        (["--rate", "1", "--price", "a800"], "--price is NAME=P"),
        (["--rate", "1", "--price", "a800=0"], "a price above 0"),
        (["--rate", "1", "--price", "tpu=2"], "--price names tpu"),
        (["--rate", "1", "--hardware", "a800x2", "--hardware", "a800x4"], "names a800 twice"),
        (["--rate", "1", "--policy", "magic"], "no policy is called 'magic'"),
        (["--rate", "1", "--tpot-s", "0"], "tpot_s must be finite and above 0"),
        (["--rate", "1", "--ttft-factor", "nan"], "ttft_factor must be finite"),
        ([], "--rate"),
        (["--rate", "1", "--requests", "1"], "no rate to plan for"),
    ],
)
def test_a_users_mistake_exits_2(capsys, arguments, message):
    assert main([*FEW, *arguments]) == 2
    assert message in capsys.readouterr().err
