"""A `GenerateRequest` of `vllm.grpc.engine` as a `Call`: the one place that knows its fields.

proto3 has no "unset" for plain fields: their zero means that the client said nothing, and so do
values that change nothing (`top_p` 1). Everything else is honoured, or refused by name.

Without effect here, whatever they say: `skip_special_tokens`, `spaces_between_special_tokens` and
`include_stop_str_in_output` (answers are token ids; the client makes text of them), and
`grammar_from_first_token` (grammars are refused).
"""

from __future__ import annotations

from smg_grpc_proto import vllm_engine_pb2 as pb

from loongjax.errors import RequestError
from loongjax.sampling.params import SamplingParams
from serving.errors import UnsupportedError
from serving.service import Call

# Fields without presence, and the values that ask for nothing.
_NEUTRAL: dict[str, tuple[float, ...]] = {
    "top_p": (0.0, 1.0),
    "top_k": (0,),
    "min_p": (0.0,),
    "frequency_penalty": (0.0,),
    "presence_penalty": (0.0,),
    "repetition_penalty": (0.0, 1.0),
    "min_tokens": (0,),
}
# Fields that ask for something as soon as they are there.
_REPEATED = ("stop", "logit_bias")
_OPTIONAL = ("logprobs", "prompt_logprobs", "truncate_prompt_tokens")
_OTHER_INPUTS = ("kv_transfer_params", "kv_transfer_params_json", "mm_inputs", "media_refs")


def to_call(
    request: pb.GenerateRequest,
    *,
    name: str,
    client: str,
    priority: int = 0,
    time_left_s: float | None = None,
) -> Call:
    """The call that a message describes, in the name of a client.

    Raises:
      RequestError: A field has a value that cannot be served; the message names it.
      UnsupportedError: It asks for a grammar, for other inputs than tokens, or for KV transfer.
    """
    _refuse_other_inputs(request)
    return Call(
        name=name,
        client=client,
        protocol="vllm",
        prompt=_prompt(request),
        params=to_sampling_params(request.sampling_params),
        priority=priority,
        time_left_s=time_left_s,
    )


def to_sampling_params(params: pb.SamplingParams) -> SamplingParams:
    """The sampling parameters that a message describes.

    Raises:
      RequestError, UnsupportedError: As `to_call`.
    """
    constraint = params.WhichOneof("constraint")
    if constraint is not None:
        raise UnsupportedError(
            f"sampling_params.{constraint}: answers cannot be held to a grammar; leave it out"
        )
    for field, neutral in _NEUTRAL.items():
        value = getattr(params, field)
        if value not in neutral:
            raise _not_honoured(field, f"{value:g}", f"{neutral[-1]:g} is the same as unset")
    for field in _REPEATED:
        if entries := getattr(params, field):
            raise _not_honoured(field, f"{len(entries)} of it", "leave it empty")
    for field in _OPTIONAL:
        if params.HasField(field):
            raise _not_honoured(field, f"{getattr(params, field)}", "leave it unset")
    return SamplingParams(
        temperature=params.temperature if params.HasField("temperature") else 1.0,
        n=params.n or 1,
        seed=params.seed if params.HasField("seed") else None,
        max_tokens=params.max_tokens if params.HasField("max_tokens") else None,
        stop_token_ids=tuple(params.stop_token_ids),
        ignore_eos=params.ignore_eos,
    )


def _prompt(request: pb.GenerateRequest) -> str | tuple[int, ...]:
    kind = request.WhichOneof("input")
    if kind is None:
        raise RequestError("the request has no input; give text, or tokenized.input_ids")
    return request.text if kind == "text" else tuple(request.tokenized.input_ids)


def _refuse_other_inputs(request: pb.GenerateRequest) -> None:
    for field in _OTHER_INPUTS:
        if request.HasField(field):
            raise UnsupportedError(f"{field} is not supported by this server; leave it out")
    if request.extra_mm_inputs:
        raise UnsupportedError("extra_mm_inputs is not supported by this server; leave it out")
    if request.data_parallel_rank:
        raise RequestError(
            f"data_parallel_rank must be 0 or unset, not {request.data_parallel_rank}: this server "
            "spreads requests over its instances by itself"
        )


def _not_honoured(field: str, value: str, way_out: str) -> RequestError:
    return RequestError(
        f"sampling_params.{field} is not supported yet, and {value} was asked for; {way_out}"
    )
