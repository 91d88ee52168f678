"""Errors that say what the user can mend. The command lines print them in one line, without a traceback."""


class UserError(Exception):
    """Something in a config, on a command line or on the disk is not as it has to be."""


class ConfigError(UserError, ValueError):
    """A value that is not among the accepted ones, or that contradicts another."""


class UnknownOptionError(UserError, TypeError):
    """An argument that does not exist."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that is not there."""


class UnsupportedHostError(UserError, TypeError):
    """A backbone whose blocks mona_mm does not know."""


class CheckpointMismatchError(UserError, RuntimeError):
    """A checkpoint of another architecture than the model's."""


class FreezeError(UserError, RuntimeError):
    """What trains is not what the config asked for, or a frozen weight changed."""


class PlanError(UserError, ValueError):
    """A plan of SPT that is damaged, or for another base than the model's."""


class SensitivityError(UserError, RuntimeError):
    """Data or losses that no sensitivity can be measured with."""
