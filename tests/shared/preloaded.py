"""The command line in processes that begin with everything imported."""

import sys

from forks import fork


def run(prepare, moment, cache, arguments):
    """``sparseforge-fx ARGUMENTS`` in a process of its own, after ``prepare(moment)`` there; its exit code, or minus
    the signal that ended it."""
    process = fork(_command_line, prepare, moment, str(cache), arguments)
    process.join()
    return process.exitcode


def _command_line(prepare, moment, cache, arguments):
    import torch
    from huggingface_hub import constants

    from sparseforge_fx import cli

    torch.set_num_threads(1)
    constants.HF_HOME = cache
    prepare(moment)
    sys.argv = ["sparseforge-fx", *arguments]
    cli.main()
