"""The service: gRPC and HTTP in front of an engine. Thin: what is decided is decided in `loongjax`.

| module | job |
|---|---|
| `config` | what a server is started with |
| `errors` | its own errors, and the one table from errors to status codes |
| `auth` | who a client is, and what it may use |
| `gate` | limits, and turns that are fair between clients |
| `service` | an engine for asyncio: opens, aborts and drains requests of any protocol |
| `wishes` | what clients may say beside a request: its name, its priority |
| `stream` | one request's answers on their way from the engine's thread to asyncio |
| `text` | prompts to tokens and answers to text |
| `steps` | the engine's steps as they end, for followers |
| `steering` | the policy, to be changed while it runs |
| `profiling` | profiles of the process |
| `metrics`, `logs` | what operators see |
| `grpc/guarding` | every gRPC call: who calls, and how errors are told |
| `grpc/vllm_request` | a message of `vllm.grpc.engine` as a `Call`; refuses what is not honoured |
| `grpc/vllm_engine` | the service `vllm.grpc.engine.VllmEngine` |
| `grpc/inference`, `grpc/cluster` | the services of `protos/loongjax/v1` |
| `grpc/server` | the gRPC server: options, health, reflection |
| `http/` | OpenAI's API, from `door` (who asks) and `schemas` over `app` to `wording` |
| `stubs` | made from `protos/` by `scripts/generate_stubs.py`; never edited |
| `process` | a server's life: ready, signals, drain, exit |
| `client` | for programs that call a server |
| `bench` | load and chaos from outside, measured |
"""
