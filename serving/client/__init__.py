"""A client of `loongjax serve`, for programs that wait and for asyncio.

    with Client("127.0.0.1:50051") as client:
        for piece in client.stream("Once upon a time", SamplingParams(max_tokens=50)):
            print(piece.text, end="")

Imports no jax.
"""

from serving.client.aio import AsyncClient
from serving.client.blocking import Client
from serving.client.connection import ClientTls, RetryPolicy, ServerError
from serving.client.messages import Answer, BatchAnswer, Completion, Piece

__all__ = [
    "Answer",
    "AsyncClient",
    "BatchAnswer",
    "Client",
    "ClientTls",
    "Completion",
    "Piece",
    "RetryPolicy",
    "ServerError",
]
