"""Sampling on rank 0: penalties, truncation, counter-based randomness, log probabilities."""

from shards.sampling.sampler import Sampler, SamplingError

__all__ = ["Sampler", "SamplingError"]
