"""Errors that tell a person what to do; everything that bad input can cause is one of these."""


class KNetError(ValueError):
    """Base of all errors that this project raises for bad input."""

    def __str__(self) -> str:
        """The message; bytes of a file name that are not UTF-8 are escaped, since no log could be written with them."""
        return super().__str__().encode(errors="backslashreplace").decode()


class ConfigError(KNetError):
    """A config value that can't work; the message names the key."""


class DataError(KNetError):
    """A data file that is missing or wrong; the message names the file."""


class CheckpointError(KNetError):
    """A weights file that can't be used; the message names the file."""


class NonFiniteError(KNetError):
    """A cost or loss that is not finite; the message names the term, the stage and the images."""
