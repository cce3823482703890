"""Attention over the paged cache, through one of three libraries."""

from shards.kernels.cuda.attention.base import AttentionBackend, Geometry, StepAttention
from shards.kernels.cuda.attention.choice import AttentionName, choose

__all__ = ["AttentionBackend", "AttentionName", "Geometry", "StepAttention", "choose"]
