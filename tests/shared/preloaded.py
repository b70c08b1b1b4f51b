"""Processes of the command line that begin with everything imported: forks of one server, for tests that start many."""

import multiprocessing
import sys

_SERVER = multiprocessing.get_context("forkserver")
_PRELOADED = ["torch", "datasets", "accelerate", "transformers.models.llama.modeling_llama"]
_PRELOADED += ["sparseforge_fx.cli.sparsify", "sparseforge_fx.training.sparsify", "sparseforge_fx.training.train"]


def run(prepare, moment, cache, arguments):
    """``sparseforge-fx ARGUMENTS`` in a process of its own, after ``prepare(moment)`` there; its exit code, or minus
    the signal that ended it."""
    _SERVER.set_forkserver_preload(_PRELOADED)
    process = _SERVER.Process(target=_command_line, args=(prepare, moment, str(cache), arguments))
    process.start()
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
