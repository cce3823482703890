"""Sampling on rank 0: penalties, grammars, truncation, counter-based randomness, logprobs."""

from shards.sampling.sampler import Sampler, SamplingError

__all__ = ["Sampler", "SamplingError"]
