"""Errors that the user can fix. The command lines print them as one line, without a traceback."""


class UserError(Exception):
    """A mistake in a config, on a command line or in a file that the user can fix."""


class ConfigError(UserError, ValueError):
    """A value that is not accepted, or that contradicts another one."""


class UnknownOptionError(UserError, TypeError):
    """An argument that does not exist."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that does not exist."""


class UnsupportedHostError(UserError, TypeError):
    """A backbone that is not a supported host."""


class CheckpointMismatchError(UserError, RuntimeError):
    """A checkpoint that does not fit the architecture of the model."""


class FreezeError(UserError, RuntimeError):
    """Other parameters train than the config selects, or a frozen weight has changed."""


class PlanError(UserError, ValueError):
    """A plan of SPT that is damaged, or that was made for another base."""


class SensitivityError(UserError, RuntimeError):
    """Data or losses from which no sensitivity can be computed."""


class DivergedError(UserError, RuntimeError):
    """A loss, or what a checkpoint would hold, that is not finite."""


class UnreadableImageError(UserError, OSError):
    """An image of a data set that is missing, empty, truncated or damaged."""


class OutOfMemoryError(UserError, MemoryError):
    """A model and a batch that do not fit into the memory."""


class WorkDirError(UserError, OSError):
    """A work dir that another run uses, or that cannot be written."""
