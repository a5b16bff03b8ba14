"""Modules shared by all families; each takes and gives packed tokens `[tokens, ...]`."""
