"""The gRPC server: its options, services, health, and reflection.

Health has two meanings: "" is SERVING as long as the process lives, a service's full name while
it takes requests.
"""

from __future__ import annotations

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_health.v1.health_pb2 import HealthCheckResponse
from grpc_reflection.v1alpha import reflection
from smg_grpc_proto import vllm_engine_pb2, vllm_engine_pb2_grpc

from loongjax.errors import ConfigError
from serving.auth import Guard
from serving.config import ServeConfig, TlsConfig, join_address
from serving.grpc.cluster import ClusterServicer
from serving.grpc.guarding import GuardInterceptor
from serving.grpc.inference import InferenceServicer
from serving.grpc.vllm_engine import VllmEngineServicer
from serving.profiling import Profiler
from serving.service import Service
from serving.steering import Steering
from serving.steps import StepFeed
from serving.stubs import cluster_pb2, cluster_pb2_grpc, inference_pb2, inference_pb2_grpc

_PING_INTERVAL_MS = 10_000  # gateways ping so often, also while no call is open
_SERVICES = tuple(
    file.DESCRIPTOR.services_by_name[name].full_name
    for file, name in (
        (vllm_engine_pb2, "VllmEngine"),
        (inference_pb2, "Inference"),
        (cluster_pb2, "Cluster"),
    )
)


class GrpcServer:
    """A gRPC server on its address; belongs to one asyncio loop.

    Attributes:
      address: Where it listens.
    """

    def __init__(
        self,
        service: Service,
        steering: Steering,
        feed: StepFeed,
        config: ServeConfig,
        guard: Guard,
    ) -> None:
        """Takes the address.

        Raises:
          ConfigError: It is in use, or not of this machine; or a certificate cannot be used.
        """
        self._server = grpc.aio.server(
            options=_options(config), interceptors=[GuardInterceptor(guard)]
        )
        self._health = health.aio.HealthServicer()
        vllm_engine_pb2_grpc.add_VllmEngineServicer_to_server(
            VllmEngineServicer(service, Profiler(config.profile_dir)), self._server
        )
        inference_pb2_grpc.add_InferenceServicer_to_server(InferenceServicer(service), self._server)
        cluster_pb2_grpc.add_ClusterServicer_to_server(
            ClusterServicer(steering, feed), self._server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        known = (*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(known, self._server)
        self.address = join_address(config.host, self._listen(config))

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

    def _listen(self, config: ServeConfig) -> int:
        try:
            if config.tls is None:
                return self._server.add_insecure_port(config.grpc_address)
            return self._server.add_secure_port(config.grpc_address, _credentials(config.tls))
        except RuntimeError as error:
            raise ConfigError(
                f"cannot listen on {config.grpc_address}: {error}; choose another --port or "
                "--host, and look at the certificate if there is one"
            ) from error


def _options(config: ServeConfig) -> tuple[tuple[str, int], ...]:
    return (
        ("grpc.max_receive_message_length", config.limits.max_message_bytes),
        ("grpc.max_send_message_length", config.limits.max_message_bytes),
        # Half of it: a ping that was held up by the network must not follow the next too soon.
        ("grpc.http2.min_recv_ping_interval_without_data_ms", _PING_INTERVAL_MS // 2),
        ("grpc.keepalive_permit_without_calls", 1),
        # A second server on the port fails, and does not take every other call.
        ("grpc.so_reuseport", 0),
    )


def _credentials(tls: TlsConfig) -> grpc.ServerCredentials:
    ca = None if tls.client_ca is None else tls.client_ca.read_bytes()
    pair = (tls.key.read_bytes(), tls.cert.read_bytes())
    return grpc.ssl_server_credentials(
        [pair], root_certificates=ca, require_client_auth=ca is not None
    )
