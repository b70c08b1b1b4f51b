"""What a user meets: a sentence that names the thing that is wrong and what to do about it."""


class SparseForgeError(ValueError):
    """Raised for bad input: models, data, files, options. The command line prints its text and exits with code 2."""


class SparseForgeWarning(UserWarning):
    """All goes on, but less well than it could. Of all warnings, these are what the command line prints (as notes)."""


def one_line(error: BaseException) -> str:
    """The first line of another library's error, for a sentence of ours; its class where it says nothing."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0].strip()
    return text if len(text) <= 200 else text[:197] + "..."


AS_IT_WAS = "the model is dense again, as it was"


def add_sentence(error: BaseException, sentence: str) -> None:
    """Let an error that goes on its way say one thing more."""
    if isinstance(error, SparseForgeError):
        error.args = (f"{error}; {sentence}",)
    else:
        error.add_note(sentence)
