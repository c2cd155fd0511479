"""Every error that finemoe raises on purpose. Each message is one line: what is wrong, and what to do about it."""

from __future__ import annotations


class FinemoeError(Exception):
    """Base of all errors below; the command line prints the message and exits with 2."""


class ConfigError(FinemoeError, ValueError):
    """A flag or argument has an unusable value; the message names the flag."""


class CheckpointError(FinemoeError):
    """A checkpoint is missing, incomplete or damaged; the message names the file or tensor."""


class UnsupportedModelError(FinemoeError):
    """The model is valid, but its experts can't be offloaded exactly; the message says why."""


class BudgetError(ConfigError):
    """The expert memory budget is below the minimum, or above what the machine has."""


class ExpertReadError(FinemoeError, OSError):
    """An expert's weights can't be read during generation; the request fails, the process continues."""


class InvariantError(FinemoeError, RuntimeError):
    """The expert pool's bookkeeping is inconsistent. Raised rather than computing with a wrong weight."""


class TraceError(FinemoeError):
    """A trace is missing, damaged, of another version, or lacks data that a command needs."""


class MapsError(FinemoeError):
    """A file of learned maps is missing, is none, or is of another version, policy or model; the message names it."""


class DamagedMapsError(MapsError):
    """A file of learned maps fails its checks: changed by another program, or damaged on disk."""


class FinemoeWarning(UserWarning):
    """Something failed that the work can continue without; the message says what."""


class ReferenceModelError(FinemoeError, RuntimeError):
    """The reference model can't be built or found; the message says why, and what to do."""


class BenchmarkError(FinemoeError):
    """A benchmark can't go on: the process that it measures did not start, or failed a request."""
