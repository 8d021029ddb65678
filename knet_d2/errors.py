"""Errors that tell a person what to do; everything that bad input can cause is one of these."""


class KNetError(ValueError):
    """Base of all errors that this project raises for bad input."""


class ConfigError(KNetError):
    """A config value that can't work; the message names the key."""


class DataError(KNetError):
    """A data file that is missing or wrong; the message names the file."""


class CheckpointError(KNetError):
    """A weights file that can't be used; the message names the file."""


class NonFiniteError(KNetError):
    """A cost or loss that is not finite; the message names the term, the stage and the images."""
