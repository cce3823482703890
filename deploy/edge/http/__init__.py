"""The OpenAI-compatible HTTP API, beside gRPC on the edge's event loop."""
