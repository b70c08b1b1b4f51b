"""The same model on every process, each with batches of its own: gradients are averaged while they are computed."""

from __future__ import annotations

from collections.abc import Sequence

from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sparseforge_fx.errors import SparseForgeError


def check_precision(accelerator: Accelerator) -> None:
    """Raise SparseForgeError for a mixed precision whose steps may be skipped."""
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise SparseForgeError(
            f"mixed precision {accelerator.mixed_precision} scales losses, and a step that overflows still moves the "
            "masks: take bf16"
        )


def replicated(module: nn.Module, trained: Sequence[nn.Parameter], accelerator: Accelerator) -> nn.Module:
    """``module`` as accelerate runs it: under its autocast, and on several processes as DistributedDataParallel, which
    averages the gradients of ``trained`` in buckets while the backward pass goes on. Where that is not how the run
    goes, the module itself."""
    several = accelerator.num_processes > 1
    if not several and accelerator.mixed_precision == "no":
        return module
    ours = {id(p) for p in trained}
    others = [name for name, p in module.named_parameters() if id(p) not in ours]
    others += [name for name, _ in module.named_buffers()]  # masks are decided alike everywhere
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, others)
    if accelerator.ddp_handler is None:
        # which parameters a loss reaches is the model's matter
        accelerator.ddp_handler = DistributedDataParallelKwargs(
            find_unused_parameters=True, gradient_as_bucket_view=True
        )
    learns = any(id(p) in ours for p in module.parameters())
    return accelerator.prepare_model(module, device_placement=several, evaluation_mode=not learns)
