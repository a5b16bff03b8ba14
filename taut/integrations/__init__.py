"""Bridges to other libraries, each in a file of its own, which imports that library when it is used."""
