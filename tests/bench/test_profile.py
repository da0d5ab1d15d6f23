"""Instructions sorted into groups, and their times summed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from loongjax.bench.profile import (
    GROUPS,
    Span,
    group_of,
    instruction_groups,
    read_spans,
    seconds_by_group,
)

HLO = """
HloModule jit_on_rank
%body (p: f32[4]) -> f32[4] {
  %dot.1 = f32[4,8]{1,0} dot(%a, %b), metadata={op_name="jit(on_rank)/Layer/mlp/dot_general"}
  ROOT %fusion.2 = (f32[4]{0}, s32[]) fusion(%dot.1), metadata={op_name="x/attention/exp"}
}
  %copy.3 = f32[4]{0:T(8)} copy(f32[4]{0} %a)
  all-gather.4 = f32[8]{0} all-gather(%a), dimensions={0}
"""


def test_instructions_are_read_from_the_text_of_a_program():
    assert instruction_groups(HLO) == {
        "dot.1": "matmul",
        "fusion.2": "attention",
        "copy.3": "copy",
        "all-gather.4": "collective",
    }


@pytest.mark.parametrize(
    ("opcode", "op_name", "group"),
    [
        ("dot", "jit(f)/DecoderLayer/attention/attention._heads/dot_general", "matmul"),
        ("dot", "jit(f)/DecoderLayer/attention/while/body/dot_general", "attention"),
        ("fusion", "jit(f)/while/body/Decoder.logits/dot_general", "matmul"),
        ("fusion", "jit(f)/while/body/cond/branch_1_fun/add", "sampling"),
        ("scatter", "jit(f)/DecoderLayer/attention/scatter", "copy"),
        ("fusion", "jit(f)/DecoderLayer/rsqrt", "other"),
        ("collective-permute", "jit(f)/DecoderLayer/attention/ppermute", "collective"),
    ],
)
def test_groups(opcode, op_name, group):
    assert group_of(opcode, op_name) == group


def test_nested_time_counts_once_and_the_rest_is_the_host():
    def span(thread, start, end, instruction):
        return Span(
            thread=thread, start=start * 1e9, end=end * 1e9, program=1, instruction=instruction
        )

    groups = {(1, "while"): "attention", (1, "dot"): "matmul"}
    spans = [span(0, 0, 10, "while"), span(0, 2, 5, "dot"), span(0, 5, 6, "x"), span(1, 9, 12, "x")]
    found = seconds_by_group(spans, groups, wall_s=20.0)
    assert tuple(found) == GROUPS
    assert {group: seconds for group, seconds in found.items() if seconds} == {
        "attention": 6.0,
        "matmul": 3.0,
        "other": 4.0,
        "host": 8.0,
    }


def test_a_real_trace_has_spans(tmp_path):
    product = jax.jit(lambda x: x @ x + 1)
    x = jnp.ones((64, 64))
    product(x).block_until_ready()
    with jax.profiler.trace(str(tmp_path)):
        product(x).block_until_ready()
    assert any(span.end > span.start for span in read_spans(tmp_path))
