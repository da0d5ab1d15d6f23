"""The gRPC server: its options, health, and reflection.

Health has two meanings: "" is SERVING as long as the process lives, a service's full name while
it takes requests.
"""

from __future__ import annotations

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_reflection.v1alpha import reflection
from smg_grpc_proto import vllm_engine_pb2, vllm_engine_pb2_grpc

from loongjax.errors import ConfigError
from serving.config import ServeConfig, join_address
from serving.grpc.vllm_engine import VllmEngineServicer
from serving.service import Service

MAX_MESSAGE_BYTES = 256 * 2**20
_PING_INTERVAL_MS = 10_000  # gateways ping so often, also while no call is open

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Half of it: a ping that was held up by the network must not follow the next too soon.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", _PING_INTERVAL_MS // 2),
    ("grpc.keepalive_permit_without_calls", 1),
    (
        "grpc.so_reuseport",
        0,
    ),  # a second server on the port fails, and does not take every other call
)
_SERVICES = (vllm_engine_pb2.DESCRIPTOR.services_by_name["VllmEngine"].full_name,)


class GrpcServer:
    """A gRPC server on its address; belongs to one asyncio loop.

    Attributes:
      address: Where it listens.
    """

    def __init__(self, service: Service, config: ServeConfig) -> None:
        """Takes the address.

        Raises:
          ConfigError: It is in use, or not of this machine.
        """
        self._server = grpc.aio.server(options=_OPTIONS)
        self._health = health.aio.HealthServicer()
        vllm_engine_pb2_grpc.add_VllmEngineServicer_to_server(
            VllmEngineServicer(service), self._server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        known = (*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(known, self._server)
        try:
            port = self._server.add_insecure_port(config.grpc_address)
        except RuntimeError as error:
            raise ConfigError(
                f"cannot listen on {config.grpc_address}: {error}; choose another --port or --host"
            ) from error
        self.address = join_address(config.host, port)

    async def start(self) -> None:
        """Answers from now on, and says that it is ready."""
        await self._health.set("", HealthCheckResponse.SERVING)
        await self.set_ready(True)
        await self._server.start()

    async def set_ready(self, is_ready: bool) -> None:
        """Tells those who ask whether to send requests here."""
        status = HealthCheckResponse.SERVING if is_ready else HealthCheckResponse.NOT_SERVING
        for name in _SERVICES:
            await self._health.set(name, status)

    async def stop(self, grace_s: float) -> None:
        """Takes no more calls; what is open after `grace_s` is cancelled."""
        await self._server.stop(grace_s)


__all__ = ["MAX_MESSAGE_BYTES", "GrpcServer", "health_pb2"]
