"""The demo model through the whole engine says what transformers says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from loongjax import LLM, SamplingParams
from loongjax.models.resolve import resolve
from loongjax.models.weights import iter_specs, weight_specs

TOKENS = 64


@pytest.fixture(scope="module")
def oracle():
    """transformers' own Llama, with the demo's weights."""
    resolved = resolve("demo")
    c = resolved.config
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.width,
            num_hidden_layers=c.layers,
            num_attention_heads=c.heads,
            num_key_value_heads=c.kv_heads,
            head_dim=c.head_dim,
            intermediate_size=c.ffn,
            rms_norm_eps=c.norm_eps,
            max_position_embeddings=c.max_positions,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope.base},
            tie_word_embeddings=c.tied_embeddings,
        )
    )
    state = {}
    for spec in iter_specs(weight_specs(c)):
        whole = tuple(slice(0, size) for size in spec.stored_shape)
        tensor = np.array(resolved.source.read(spec, whole), np.float32)
        state[spec.hf_name] = torch.from_numpy(tensor)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    return model.eval()


def test_same_greedy_tokens_as_transformers(oracle):
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    with LLM("demo", instances=2, degrees=(2,), pool_slots=1024, max_model_len=1024) as llm:
        output = llm.chat([{"role": "user", "content": "Tell me how rain is made."}], params)
        assert sum(instance.used for instance in llm.stats().instances) == 0
    prompt = torch.tensor([output.prompt_token_ids])
    with torch.no_grad():
        expected = oracle.generate(
            prompt, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False
        )
    assert list(output.token_ids) == expected[0, prompt.shape[1] :].tolist()
    assert {run.degree for run in output.steps} == {2}
