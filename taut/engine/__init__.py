"""Continuous batching: requests in, tokens out, keys and values in pages."""

from taut.engine.request import Request, SamplingParams, Status

__all__ = ["Request", "SamplingParams", "Status"]
