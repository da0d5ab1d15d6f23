"""gRPC: what messages mean, and the server that speaks them."""
