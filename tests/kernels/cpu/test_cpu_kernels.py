"""Every instruction set of this machine against the reference; the same bits always; no compiler, no harm."""

import itertools
import math
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_cases import assert_correct, random_linear

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.kernels import cpu
from sparseforge_fx.kernels.activations import ACTIVATIONS
from sparseforge_fx.kernels.layouts import LAYOUTS, Kernel
from sparseforge_fx.kernels.packed import unpack
from sparseforge_fx.kernels.sparse_linear import DENSE_OP, OP, sparse_linear

ISAS = cpu.instruction_sets()
DTYPES = [torch.bfloat16, torch.float32]
pytestmark = pytest.mark.skipif(
    not ISAS and shutil.which(os.environ.get("CXX", "c++")) is None, reason="no C++ compiler"
)


def test_every_level_of_this_machine_is_tested():
    flags = cpu_flags()
    assert ISAS[0] == "portable"  # and a compiler that is there builds the library
    assert ("avx2" in ISAS) == ({"avx2", "fma"} <= flags)
    assert ("avx512" in ISAS) == ({"avx2", "fma", "avx512f"} <= flags)
    assert "amx" not in ISAS or {"amx_tile", "amx_bf16"} <= flags


@pytest.mark.parametrize("isa", ISAS)
def test_the_operator_runs_on_the_level_that_the_environment_names(isa):
    """In a process of its own, and from there into the packages of AOTInductor, which read the same variable."""
    script = """
import torch
from filelock import FileLock
from sparse_cases import assert_correct, random_linear
from sparseforge_fx.kernels import cpu
from sparseforge_fx.kernels.layouts import LAYOUTS, Kernel
from sparseforge_fx.kernels.sparse_linear import OP
for dtype in (torch.bfloat16, torch.float32):
    packed, bias = random_linear(40, 132, dtype)
    for rows in (1, 2, 20):
        x = torch.randn(rows, 132).to(dtype)
        y = OP(x, *packed[:2], "rows", 132, bias, "silu")
        assert_correct(y, x, packed, bias, "silu")
        assert torch.equal(y, cpu.rows_linear(x, *packed, bias, "silu", cpu.instruction_set()))
print(cpu.instruction_set())
"""
    environment = os.environ | {cpu.ISA_VARIABLE: isa, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=environment)
    assert (done.returncode, done.stdout) == (0, f"{isa}\n"), done.stderr


def cpu_flags():
    """What the system says that the processor has."""
    info = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not info.exists():
        pytest.skip("no list of the processor's instructions")
    return set(next(line for line in info.read_text().splitlines() if line.startswith("flags")).split())


def run(x, packed, bias=None, activation="none", isa=None):
    return cpu.rows_linear(x, *packed, bias, activation, isa)


@settings(max_examples=150)
@given(
    st.integers(1, 70),
    st.one_of(st.integers(1, 10), st.integers(11, 330)),
    st.one_of(st.integers(1, 9), st.integers(10, 140)),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.sampled_from(list(ACTIVATIONS)),
    st.integers(0, 1000),
)
def test_random_shapes(out, groups, rows, dtype, has_bias, activation, seed):
    out += out % 2 if activation == "silu_mul" else 0
    packed, bias = random_linear(out, 4 * groups, dtype, seed)
    x = torch.randn(rows, 4 * groups, generator=torch.Generator().manual_seed(seed)).to(dtype)
    for isa in ISAS:
        assert_correct(run(x, packed, bias if has_bias else None, activation, isa), x, packed,
                       bias if has_bias else None, activation)  # fmt: skip


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_number_of_rows_and_long_sums(dtype, isa):
    packed, bias = random_linear(48, 2100, dtype)
    x = torch.randn(67, 2100).to(dtype)
    for rows in range(1, 68):
        assert_correct(run(x[:rows], packed, bias, isa=isa), x[:rows], packed, bias)


def leave_nan_in_free_memory(most):
    """What is allocated next, of up to ``most`` bytes, has NaN around it."""
    filled = [torch.full((most * part // 16 + 64,), math.nan) for part in range(1, 7)]
    filled.clear()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("in_features", [4, 12, 36, 44, 100, 132, 200])
def test_nothing_is_read_beyond_the_last_row(in_features, dtype, isa):
    """The last row of 65 or 129 is alone in its pass over the weight."""
    packed, bias = random_linear(22, in_features, dtype)
    for rows in (1, 2, 63, 64, 65, 129):
        x = torch.randn(rows, in_features).to(dtype)
        for _ in range(5):
            leave_nan_in_free_memory(rows * (in_features + 64) * 4)
            assert_correct(run(x, packed, bias, isa=isa), x, packed, bias)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_far_out(dtype, isa):
    packed, _ = random_linear(64, 32, dtype)
    x = (torch.randn(3, 32) * 100).to(dtype)
    for activation in ACTIVATIONS:
        assert_correct(run(x, packed, None, activation, isa), x, packed, None, activation)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_number_of_threads_and_on_every_run(dtype, isa):
    packed, bias = random_linear(1000, 516, dtype)
    before = torch.get_num_threads()
    try:
        for rows, activation in itertools.product((1, 2, 5, 16, 40, 100), ("none", "silu_mul")):
            x = torch.randn(rows, 516).to(dtype)
            results = []
            for threads in (1, 2, 3, 2, 1):
                torch.set_num_threads(threads)
                results.append(run(x, packed, bias, activation, isa))
            assert all(torch.equal(results[0], other) for other in results[1:])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_in_its_row(value, dtype, isa):
    packed, _ = random_linear(24, 68, dtype)
    for rows in (2, 7, 20):
        x = torch.randn(rows, 68).to(dtype)
        clean = run(x, packed, isa=isa)
        x[1, 5] = value
        spoilt = run(x, packed, isa=isa)
        others = [m for m in range(rows) if m != 1]
        assert torch.equal(spoilt[others], clean[others])
        touched = unpack(packed)[:, 5] != 0
        assert not spoilt[1][touched].isfinite().any()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_nothing_is_read_from_beyond_a_row_of_x(rows, dtype, isa):
    packed, _ = random_linear(16, 36, dtype)  # packed to 40
    wide = torch.full((rows + 1, 36), float("nan")).to(dtype)
    wide[:rows] = torch.randn(rows, 36)
    assert_correct(run(wide[:rows], packed, isa=isa), wide[:rows], packed)
    assert run(wide[:rows], packed, isa=isa).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int32])
def test_dense_weights_are_exact(dtype):
    for out, in_features in ((1, 4), (5, 36), (70, 1028)):
        packed = random_linear(out, in_features, dtype)[0]
        assert torch.equal(cpu.rows_dense(*packed), unpack(packed))


def test_wrong_arguments_never_reach_memory():
    packed, _ = random_linear(8, 16, torch.float32)
    x = torch.randn(2, 16)
    for change in (
        {"values": packed.values[:4]},
        {"bitmask": packed.bitmask[:, :1]},
        {"bitmask": packed.bitmask.to(torch.int32)},
        {"in_features": 24},
        {"values": packed.values.bfloat16()},
    ):
        with pytest.raises(RuntimeError):
            run(x, packed._replace(**change))
    for bitmask in (torch.full_like(packed.bitmask, 255), torch.zeros_like(packed.bitmask)):
        for isa in ISAS:  # damaged, but of the right size: some number, no crash
            run(x, packed._replace(bitmask=bitmask), isa=isa)


def test_many_threads_at_once():
    packed, bias = random_linear(64, 128, torch.bfloat16)
    x = torch.randn(8, 128).bfloat16()
    expected, results = run(x, packed, bias), []
    threads = [threading.Thread(target=lambda: results.append(run(x, packed, bias))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8 and all(torch.equal(expected, y) for y in results)


@pytest.fixture
def fresh():
    for cached in (cpu._load, cpu.instruction_sets, cpu.instruction_set):
        cached.cache_clear()
    torch.ops.sparseforge_cpu.use("")
    yield
    for cached in (cpu._load, cpu.instruction_sets, cpu.instruction_set):
        cached.cache_clear()
    torch.ops.sparseforge_cpu.use("")


def test_without_a_compiler_it_is_plain_torch_and_one_warning(fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    packed, bias = random_linear(8, 36, torch.bfloat16)
    x = torch.randn(3, 36).bfloat16()
    with pytest.warns(UserWarning, match="plain torch on this CPU"):
        y = sparse_linear(x, packed.values, packed.bitmask, "rows", 36, bias, "silu")
    assert_correct(y, x, packed, bias, "silu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparse_linear(x, packed.values, packed.bitmask, "rows", 36)
    assert cpu.instruction_sets() == () and not list((tmp_path / "sparseforge_fx").iterdir())


def test_what_another_process_builds_is_not_built_twice(tmp_path):
    cpu.available()
    folder = tmp_path / "sparseforge_fx"
    code = "from sparseforge_fx.kernels import cpu; del cpu._build; print(cpu.available())"
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    with FileLock(folder.with_suffix(".lock")):
        other = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(600):
            if folder.exists():  # it is about to wait
                break
            time.sleep(0.1)
        for file in cpu._folder().glob(f"*{cpu._name()}*"):
            shutil.copy(file, folder)
    assert other.communicate(timeout=120)[0].strip() == "True"


@pytest.fixture
def only_python():
    """The operator as it is without its C++ half."""
    cpu.instruction_set()
    torch.ops.sparseforge_cpu.use("")
    yield
    cpu.instruction_set.cache_clear()
    cpu.instruction_set()


CALLS = [
    (dtype, leading, has_bias, activation)
    for dtype in (torch.bfloat16, torch.float32, torch.float16, torch.float64)
    for leading in ((), (1,), (2, 3), (0,), (2, 0, 3), (65,), (129,), (5, 30))
    for has_bias, activation in zip((False, True) * 3, ACTIVATIONS, strict=True)
]


def outputs():
    results = []
    for dtype, leading, has_bias, activation in CALLS:
        packed, bias = random_linear(22, 44, dtype)
        x = torch.randn(*leading, 88, generator=torch.Generator().manual_seed(1)).to(dtype)[..., ::2]
        with torch.no_grad():
            results.append(OP(x, *packed[:2], "rows", 44, bias if has_bias else None, activation))
        results.append(DENSE_OP(*packed[:2], "rows", 44))
    return results


def test_both_halves_of_the_operator_give_the_same_bits(only_python):
    expected = outputs()
    cpu.instruction_set.cache_clear()
    cpu.instruction_set()
    for a, b in zip(outputs(), expected, strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)


def on_cpu(monkeypatch, layout, kernel):
    monkeypatch.setitem(LAYOUTS, layout, LAYOUTS[layout]._replace(kernels={"cpu": kernel}))


def test_usual_calls_never_reach_python(monkeypatch):
    def reached(*_):
        raise AssertionError

    on_cpu(monkeypatch, "rows", Kernel(reached, reached))
    for dtype, rows in itertools.product((torch.bfloat16, torch.float32, torch.float16), (0, 1, 200)):
        packed, bias = random_linear(8, 36, dtype)
        x = torch.randn(rows, 1, 36).to(dtype)
        for mode in (torch.inference_mode(), torch.no_grad(), torch.enable_grad()):
            with mode:
                sparse_linear(x, *packed[:2], "rows", 36, bias, "silu_mul")
        with torch.no_grad():
            assert not sparse_linear(x.requires_grad_(), *packed[:2], "rows", 36).requires_grad
        with pytest.raises(AssertionError):
            sparse_linear(x.double(), packed.values.double(), packed.bitmask, "rows", 36)


def test_other_layouts_and_wrong_input_reach_python(monkeypatch):
    packed, bias = random_linear(8, 36, torch.float32)
    kernel = Kernel(lambda values, *_: values + 1, lambda x, *_: x.new_full((x.shape[0], 8), 7))
    on_cpu(monkeypatch, "planes", kernel)
    x = torch.randn(2, 3, 36)
    for inputs in (x, x.clone().requires_grad_()):
        assert torch.equal(OP(inputs, *packed[:2], "planes", 36, bias), torch.full((2, 3, 8), 7.0))
        for wrong in ((inputs[..., :35], "rows"), (inputs, "columns")):
            for mode in (torch.inference_mode(), torch.no_grad(), torch.enable_grad()):
                with mode, pytest.raises(SparseForgeError):
                    OP(wrong[0], *packed[:2], wrong[1], 36, bias)
    assert torch.equal(DENSE_OP(*packed[:2], "planes", 36), packed.values + 1)


def test_the_environment_chooses_the_instruction_set(fresh, monkeypatch):
    monkeypatch.delenv(cpu.ISA_VARIABLE, raising=False)
    assert cpu.instruction_set() == ISAS[-1]
    cpu.instruction_set.cache_clear()
    monkeypatch.setenv(cpu.ISA_VARIABLE, "portable")
    assert cpu.instruction_set() == "portable"
    cpu.instruction_set.cache_clear()
    monkeypatch.setenv(cpu.ISA_VARIABLE, "mmx")
    with pytest.raises(SparseForgeError, match="SPARSEFORGE_CPU_ISA=mmx is not one of"):
        cpu.instruction_set()


def test_a_built_library_is_taken_from_the_cache_quietly():
    script = "from sparseforge_fx.kernels import cpu; assert cpu.available(); assert cpu.instruction_set()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
