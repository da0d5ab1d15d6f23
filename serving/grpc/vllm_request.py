"""A `GenerateRequest` of `vllm.grpc.engine` as a `Call`: the one place that knows its fields.

proto3 has no "unset" for plain fields: their zero means that the client said nothing. Everything
else is honoured, or refused by name.

Without effect here, whatever they say: `skip_special_tokens` and `spaces_between_special_tokens`
(answers are token ids; the client makes text of them; `include_stop_str_in_output` too, for it),
and `grammar_from_first_token` (grammars are refused).
"""

from __future__ import annotations

from typing import Any

from smg_grpc_proto import vllm_engine_pb2 as pb

from loongjax.errors import RequestError
from loongjax.sampling.params import SamplingParams
from serving.errors import UnsupportedError
from serving.service import Call

# Fields without presence, and what their zero stands for.
_UNSET = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_tokens": 0,
    "n": 1,
}
_OPTIONAL = ("temperature", "seed", "max_tokens", "logprobs", "prompt_logprobs")
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
    if params.HasField("truncate_prompt_tokens"):
        raise RequestError(
            "sampling_params.truncate_prompt_tokens is not supported, and "
            f"{params.truncate_prompt_tokens} was asked for; leave it unset, and send less"
        )
    given: dict[str, Any] = {
        field: getattr(params, field) or unset for field, unset in _UNSET.items()
    }
    given |= {field: getattr(params, field) for field in _OPTIONAL if params.HasField(field)}
    try:
        return SamplingParams(
            **given,
            logit_bias=dict(params.logit_bias),
            stop=tuple(params.stop),
            stop_token_ids=tuple(params.stop_token_ids),
            include_stop_str_in_output=params.include_stop_str_in_output,
            ignore_eos=params.ignore_eos,
        )
    except RequestError as error:
        raise RequestError(f"sampling_params: {error}") from None


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
