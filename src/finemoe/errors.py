"""Every error that finemoe raises on purpose. Each message is one line: the culprit, then the way out."""

from __future__ import annotations


class FinemoeError(Exception):
    """Base of all errors below; the CLI prints the message as one line and exits with 2."""


class ConfigError(FinemoeError, ValueError):
    """A flag or argument has a value that can't be used; the message names the flag."""


class CheckpointError(FinemoeError):
    """A checkpoint is missing, incomplete or damaged; the message names the file or tensor."""


class UnsupportedModelError(FinemoeError):
    """The model is valid, but its experts can't be offloaded exactly; the message says why."""


class BudgetError(ConfigError):
    """The expert memory budget is below the minimum, or above what the machine has."""


class ExpertReadError(FinemoeError, OSError):
    """Reading an expert's weights failed in mid-generation; the request fails, the process goes on."""


class InvariantError(FinemoeError, RuntimeError):
    """An internal rule of the expert pool was broken. Raised instead of ever computing with a wrong weight."""


class TraceError(FinemoeError):
    """A recorded trace is missing, damaged, of another version, or does not hold what was asked of it."""


class MapsError(FinemoeError):
    """A file of expert maps is missing, of another version, policy or model, or none at all; the message names it."""


class DamagedMapsError(MapsError):
    """A file of expert maps was changed by someone else than finemoe, or by a failing disk."""


class FinemoeWarning(UserWarning):
    """Something could not be done, and the work goes on without it; the message says what."""


class ReferenceModelError(FinemoeError, RuntimeError):
    """The reference model cannot be had; the message is one line naming the culprit and the way out."""
