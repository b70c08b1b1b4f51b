"""What a user meets: a sentence that names the thing that is wrong and what to do about it."""


class SparseForgeError(ValueError):
    """Raised for bad input: models, data, files, options. The command line prints its text and exits with code 2."""


class SparseForgeWarning(UserWarning):
    """All goes on, but less well than it could. Of all warnings, these are what the command line prints (as notes)."""
