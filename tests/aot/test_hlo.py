"""Reading the compilers' text: loops, transfers and what runs beside them, copies."""

from __future__ import annotations

import pytest

from loongjax.aot.hlo import Program, hops, moves_of, parse, traffic

TEXT = """\
HloModule jit_on_rank, is_scheduled=true

%fold.1 (p: f32[8]) -> f32[8] {
  %p = f32[8]{0:T(128)} parameter(0)
  ROOT %k.1 = f32[8]{0:T(128)} custom-call(%p), custom_call_target="t", metadata={op_name="a/fold"}
}

%body (c: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %c = (s32[], bf16[4,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %x = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%c), index=1, metadata={op_name="fold"}
  %go = (bf16[4,8]{1,0}, bf16[4,8]{1,0}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=1
  %work = f32[8]{0} call(%x), to_apply=%fold.1
  %end = bf16[4,8]{1,0} collective-permute-done(%go), metadata={op_name="ring"}
  %go.1 = (bf16[4,8]{1,0}, bf16[4,8]{1,0}) collective-permute-start(%end), channel_id=2
  %end.1 = bf16[4,8]{1,0} collective-permute-done(%go.1)
  ROOT %t = (s32[], bf16[4,8]{1,0}) tuple(%x, %end.1)
}

%cond (c.1: (s32[], bf16[4,8])) -> pred[] {
  ROOT %true = pred[] constant(true)
}

ENTRY %main (a: bf16[4,8]) -> bf16[4,8] {
  %a = bf16[4,8]{1,0} parameter(0)
  %copied = bf16[4,8]{1,0} copy(%a)
  %loop = (s32[], /*index=1*/bf16[4,8]{1,0}) while(%copied), condition=%cond, body=%body, TRIPS
  %sum = f32[16]{0} all-reduce(%loop), to_apply=%cond
  ROOT %r = bf16[4,8]{1,0} get-tuple-element(%loop), index=1
}
"""
KNOWN = TEXT.replace("TRIPS", 'backend_config={"known_trip_count":{"n":"3"}}')
LAYERS = TEXT.replace("TRIPS", 'metadata={op_name="jit(f)/Decoder._scan/while" id=1}')


@pytest.fixture(params=["counted", "layers"])
def program(request) -> Program:
    return parse(KNOWN) if request.param == "counted" else parse(LAYERS, layers=3)


def test_a_hop_is_known_with_what_runs_beside_it(program):
    first, second = hops(program)
    assert (first.bytes, first.runs) == (second.bytes, second.runs) == (64, 3)
    assert [each.name for each in first.between] == ["work"]
    assert second.between == ()
    assert [program.kernel_calls(each, "fold") for each in first.between] == [1]


def test_only_kernels_count_and_not_what_is_named_after_them(program):
    named = next(each for each in program.computations["body"] if each.name == "x")
    assert program.kernel_calls(named, "fold") == 0
    loop = next(each for each in program.computations["main"] if each.op == "while")
    assert program.kernel_calls(loop, "fold") == 3


def test_traffic_counts_every_run_and_each_transfer_once(program):
    found = traffic(program)
    assert found.counts == {"collective-permute": 6, "all-reduce": 1}
    assert found.result_bytes == {"collective-permute": 6 * 64, "all-reduce": 64}


def test_a_loop_of_unknown_trips_counts_once():
    assert traffic(parse(TEXT)).counts["collective-permute"] == 2


def test_a_transfer_that_is_waited_for_hides_nothing():
    (hop,) = hops(parse("ENTRY %m (a: s8[2]) -> s8[2] {\n %p = s8[2] collective-permute(%a)\n}"))
    assert (hop.bytes, hop.between) == (2, ())


def test_copies_are_seen(program):
    assert "%copied" in [text.split()[0] for text in moves_of(32, program)]
    assert moves_of(33, program) == []


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        parse("%f (a: f32[]) -> f32[] {\n}\n")
