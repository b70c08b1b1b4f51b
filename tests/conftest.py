"""What several test files share: one thread, fixed seeds, and one tiny network that has every kind of linear.

SPARSEFORGE_CPU_ISA runs everything as on a lesser processor: our kernels' level is torch's, too, so that AVX2 can be
tried on a machine that has more.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # of the processes that tests start: several share the cores
if os.environ.get("SPARSEFORGE_CPU_ISA") in ("portable", "avx2"):  # before torch is imported, which reads them once
    os.environ |= {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
elif os.environ.get("SPARSEFORGE_CPU_ISA", "").startswith("avx512"):
    bfloat16 = os.environ["SPARSEFORGE_CPU_ISA"] == "avx512_bf16"
    os.environ |= {
        "ATEN_CPU_CAPABILITY": "avx512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16" if bfloat16 else "AVX512_CORE",
    }

import pytest
import torch
import torch._inductor.config
import torch.fx.config
from captures import captures_alike  # noqa: F401  (a fixture)
from hypothesis import settings
from tiny_models import captured_once, tiny  # noqa: F401  (fixtures)
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparseforge_fx.graph.capture import capture

if os.environ.get("ATEN_CPU_CAPABILITY") == "avx2":  # with the variable alone Inductor of 2.13 computes x * 2 wrongly
    torch._inductor.config.cpp.simdlen = 256
torch.set_num_threads(1)
torch.fx.config.do_not_emit_stack_traces = True  # a quarter of every capture, for what no test reads
settings.register_profile("repository", deadline=None, derandomize=True, database=None)  # the same cases everywhere
settings.load_profile("repository")


#: files that take minutes: begun first, or one worker runs the last of them while the others have nothing left
LONG = ("test_examples.py", "test_cli.py", "test_generator.py", "test_export.py", "test_benchmarks.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class TinyNet(nn.Module):
    """Linear with and without bias, Conv1D ([in, out]), a module used twice, a tie, a width that 4 does not divide."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = Conv1D(8, 16)
        self.twice = nn.Linear(8, 8, bias=False)
        self.tied = nn.Linear(8, 8)
        self.tied.weight = self.twice.weight
        self.to_six = nn.Linear(8, 6)
        self.from_six = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)  # so that no linear is an output layer

    def forward(self, x):  # [batch, tokens, 8]
        x = x + self.down(torch.relu(self.up(x)))
        x = x + self.twice(torch.relu(self.twice(x)))
        x = x + torch.tanh(self.tied(x))
        return self.norm(x + self.from_six(self.to_six(x)))


@pytest.fixture
def x():
    return torch.randn(2, 3, 8)


@pytest.fixture
def net():
    net = TinyNet()
    nn.init.normal_(net.down.weight)  # Conv1D starts at 0.02: too small to see
    return net


@pytest.fixture
def program(net, x):
    return capture(net, x)
