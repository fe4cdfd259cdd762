"""A TCP link that delays, counts and breaks: the one tool of the bench that the package's tests use."""

from fedsea_bench.link import Link

__all__ = ["Link"]
