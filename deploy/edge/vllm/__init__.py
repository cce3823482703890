"""`vllm.grpc.engine.VllmEngine`: headwise behind a gateway that speaks to vLLM (docs/vllm_grpc.md).

The messages are those of the package `smg-grpc-proto`.
"""

SERVICE = "vllm.grpc.engine.VllmEngine"
