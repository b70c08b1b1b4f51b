"""What a user meets: a sentence that names the thing that is wrong and what to do about it."""


class SparseForgeError(ValueError):
    """Raised for bad input: models, data, files, options. The command line prints its text and exits with code 2."""


class SparseForgeWarning(UserWarning):
    """All goes on, but less well than it could. Of all warnings, these are what the command line prints (as notes)."""


def one_line(error: BaseException, *, lines: int | None = 1, limit: int | None = 200) -> str:
    """What another library's error says, for a sentence of ours; its class where it says nothing.

    Args:
        lines: so many of its first lines, joined by blanks; None: all of them.
        limit: characters; None: as many as there are.
    """
    kept = str(error).strip().splitlines()[:lines]
    text = " ".join(" ".join(kept).split()) or type(error).__name__
    return text if limit is None or len(text) <= limit else text[: limit - 3] + "..."


AS_IT_WAS = "the model is dense again, as it was"


def add_sentence(error: BaseException, sentence: str) -> None:
    """Let an error that goes on its way say one thing more."""
    if isinstance(error, SparseForgeError):
        error.args = (f"{error}; {sentence}",)
    else:
        error.add_note(sentence)
