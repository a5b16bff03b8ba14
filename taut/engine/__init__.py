"""Continuous batching: requests in, tokens out, keys and values in pages."""

from taut.engine.engine import Engine, Event
from taut.engine.request import Request, SamplingParams, Status

__all__ = ["Engine", "Event", "Request", "SamplingParams", "Status"]
