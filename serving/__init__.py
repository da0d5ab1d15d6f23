"""The service: gRPC in front of an engine. Thin: what is decided is decided in `loongjax`.

| module | job |
|---|---|
| `config` | what a server is started with |
| `errors` | its own errors, and the one table from errors to status codes |
| `service` | an engine for asyncio: opens, aborts and drains requests of any protocol |
| `stream` | one request's answers on their way from the engine's thread to asyncio |
| `grpc/vllm_request` | a message of `vllm.grpc.engine` as a `Call`; refuses what is not honoured |
| `grpc/vllm_engine` | the service `vllm.grpc.engine.VllmEngine` |
| `grpc/server` | the gRPC server: options, health, reflection |
| `stubs` | made from `protos/` by `scripts/generate_stubs.py`; never edited |
| `process` | a server's life: ready, signals, drain, exit |
"""
