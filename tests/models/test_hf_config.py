"""`config.json` from our description, and back."""

from __future__ import annotations

import dataclasses

import pytest
import transformers

from loongjax.errors import ModelError
from loongjax.models.families import config_from_hf
from loongjax.models.hf_config import config_to_hf
from loongjax.models.random_weights import random_config
from tests.models.hf_reference import CASES, hf_config


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_says_the_same_to_us_and_to_transformers(name):
    config = config_from_hf(hf_config(name).to_dict())
    written = config_to_hf(config)
    assert config_from_hf(written) == config
    theirs = transformers.AutoConfig.for_model(**written)
    assert config_from_hf(theirs.to_dict() | {"architectures": written["architectures"]}) == config


def test_ends_and_beginnings_are_kept():
    config = dataclasses.replace(random_config("tiny"), bos_id=1, eos_ids=(2, 3))
    assert config_from_hf(config_to_hf(config)) == config


@pytest.mark.parametrize("change", [{"windows": (4, 8)}, {"qkv_bias": True}])
def test_what_no_file_can_say_is_refused(change):
    config = dataclasses.replace(random_config("tiny"), **change)
    with pytest.raises(ModelError, match=r"no config.json describes this llama model"):
        config_to_hf(config)
