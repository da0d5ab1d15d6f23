from __future__ import annotations

import json
import pickle
from dataclasses import replace

import pytest

from loongjax.costmodel import ChunkWork, CostModel, DecodeWork, Fingerprint
from loongjax.costmodel.sib import ScalingInformationBase
from loongjax.errors import ConfigError
from tests.costmodel.sibs import FINGERPRINT, decode_fit, prefill_fit, toy_sib

WORK = DecodeWork(rows=8, kv_tokens=10_000, masters=1)


def test_it_is_a_cost_model_and_can_be_sent_elsewhere():
    sib = toy_sib()
    assert isinstance(sib, CostModel)
    assert pickle.loads(pickle.dumps(sib)) == sib


def test_measured_degrees_are_taken_as_they_are():
    sib = toy_sib()
    for degree in (1, 2, 4):
        assert sib.prefill_fit(degree) == prefill_fit(degree)
        assert sib.decode_fit(degree) == decode_fit(degree)
        chunks = [ChunkWork(3_000, 0), ChunkWork(10, 500)]
        assert sib.prefill(degree, chunks) == prefill_fit(degree).seconds(chunks)
        assert sib.decode(degree, WORK) == decode_fit(degree).seconds(degree, WORK)
    assert sib.migrate(1_000) == pytest.approx(0.002)


@pytest.mark.parametrize("degree", [3, 8])
def test_other_degrees_divide_the_work_and_go_on_with_the_constants(degree):
    sib = toy_sib()
    found, wanted = sib.prefill_fit(degree), prefill_fit(degree)
    for name in wanted.__slots__:
        assert getattr(found, name) == pytest.approx(getattr(wanted, name)), name
    assert sib.decode_fit(degree).constant_s == pytest.approx(0.01 + 0.001 * degree)
    assert sib.decode_fit(degree).kv_token_s == pytest.approx(1e-7)


def test_constants_never_turn_negative():
    falling = {d: replace(prefill_fit(d), constant_s=0.1 / d) for d in (1, 2)}
    sib = replace(toy_sib(), prefill_fits=falling)
    assert sib.prefill_fit(16).constant_s == 0.0


def test_one_degree_serves_for_all():
    sib = toy_sib(degrees=(2,))
    assert sib.prefill_fit(4).token_s == pytest.approx(1e-5 / 4)
    assert sib.decode_fit(4) == decode_fit(2)


def test_a_file_comes_back_as_it_was(tmp_path):
    path = tmp_path / "sib.json"
    toy_sib().save(path)
    assert ScalingInformationBase.load(path, expected=FINGERPRINT) == toy_sib()
    assert ScalingInformationBase.load(path) == toy_sib()


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "sib.json"
    toy_sib().save(path)
    other = Fingerprint(hardware="toy", model="tiny", tensor_parallel=2, dtype="float32")
    with pytest.raises(ConfigError, match=r"tensor_parallel=1.*tensor_parallel=2"):
        ScalingInformationBase.load(path, expected=other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 0}, "version 0; this loongjax reads version 4"),
        ({"version": None}, "version None"),
        ({"prefill": {}}, "prefill fits of at least one degree"),
        ({"decode": {"0": None}}, "damaged"),
        ({"host": {"turn_s": 1.0}}, "damaged"),
        ({"fingerprint": 3}, "damaged"),
        ({"crowding": {"prefill": 0.7, "decode": 0.4}}, "damaged"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, change, message):
    path = tmp_path / "sib.json"
    path.write_text(json.dumps(toy_sib().to_json() | change))
    with pytest.raises(ConfigError, match=message):
        ScalingInformationBase.load(path)


@pytest.mark.parametrize("content", ["", "[1]", "3", "{"])
def test_what_is_no_cost_model_is_refused(tmp_path, content):
    path = tmp_path / "sib.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match="cost model"):
        ScalingInformationBase.load(path)
    with pytest.raises(ConfigError, match="cannot read"):
        ScalingInformationBase.load(tmp_path / "none.json")
