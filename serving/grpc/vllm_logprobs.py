"""Log-probabilities as messages of `vllm.grpc.engine` have them."""

from __future__ import annotations

from collections.abc import Sequence

from smg_grpc_proto import vllm_engine_pb2 as pb

from loongjax.plan import TokenLogprobs


def output_logprobs(logprobs: Sequence[TokenLogprobs]) -> pb.OutputLogProbs | None:
    """Of an answer's tokens; None if nobody asked."""
    if not logprobs:
        return None
    return pb.OutputLogProbs(
        token_logprobs=[each.logprob for each in logprobs],
        token_ids=[each.token for each in logprobs],
        top_logprobs=_top(logprobs),
    )


def input_logprobs(logprobs: Sequence[TokenLogprobs], first_token: int) -> pb.InputLogProbs | None:
    """Of a prompt's tokens, of which the first has none; None if nobody asked."""
    if not logprobs:
        return None
    return pb.InputLogProbs(
        token_logprobs=[
            pb.InputTokenLogProb(),
            *(pb.InputTokenLogProb(value=each.logprob) for each in logprobs),
        ],
        token_ids=[first_token, *(each.token for each in logprobs)],
        top_logprobs=[pb.TopLogProbs(), *_top(logprobs)],
    )


def _top(logprobs: Sequence[TokenLogprobs]) -> list[pb.TopLogProbs]:
    return [
        pb.TopLogProbs(
            values=[value for _, value in each.top], token_ids=[token for token, _ in each.top]
        )
        for each in logprobs
    ]
