"""Processes that begin with everything imported: forks of one server, for tests that start many."""

import multiprocessing

_PRELOADED = ["torch", "datasets", "accelerate", "torch.distributed.fsdp", "transformers.models.llama.modeling_llama"]
_PRELOADED += ["sparseforge_fx.cli.sparsify", "sparseforge_fx.training.sparsify", "sparseforge_fx.training.train"]


def fork(target, *arguments):
    """A process that has begun to run ``target(*arguments)``."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(_PRELOADED)
    process = server.Process(target=target, args=arguments)
    process.start()
    return process
