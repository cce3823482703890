"""Benchmarks: `headwise bench`.

The modules here are the load generator behind `headwise bench serve`: they know the SDK, neither
torch nor ray. `suite` measures engines in this process, `peers` other engines beside them.
"""
