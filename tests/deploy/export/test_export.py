"""export: files that run without the model's code, without this package where that is promised, and without Python."""

import os
import resource
import shutil
import subprocess
import zipfile
from pathlib import Path

import fresh
import pytest
import torch
from chosen_layouts import all_in
from torch import nn
from torch._inductor.exc import CppCompileError

import sparseforge_fx as sf
from sparseforge_fx.deploy.export.aoti import package as package_programs
from sparseforge_fx.deploy.export.export import plain_outputs
from sparseforge_fx.deploy.lowering.lower import sparse_sites
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.graph.capture import capture
from sparseforge_fx.kernels.layouts import PLANES
from sparseforge_fx.kernels.sparse_linear import OP
from sparseforge_fx.passes import deploy_passes, package_passes, run_passes

WITHOUT_US = ("sparseforge_fx", "transformers")
RUN = """
import torch
inputs = torch.load(sys.argv[2])
if sys.argv[3] == "aoti":
    run = torch._inductor.aoti_load_package(sys.argv[1])
else:
    run = torch.export.load(sys.argv[1]).module()
outputs = [run(**x) if isinstance(x, dict) else run(x) for x in inputs]
torch.save([list(y.values())[0] if isinstance(y, dict) else y for y in outputs], sys.argv[4])
"""
SIZES = ((1, 1), (1, 5), (3, 9))


@pytest.fixture
def sparse(captured_once):
    def make(name):
        found = captured_once(name)
        sf.sparsify(found.model, example_inputs=found.example)
        return found

    return make


def first(outputs):
    return next(iter(outputs.values())) if isinstance(outputs, dict) else outputs


def call(function, batch):
    return first(function(**batch) if isinstance(batch, dict) else function(batch))


def batches(found):
    return [found.batch(rows=rows, length=length) for rows, length in SIZES]


def in_a_fresh_process(path, found, kind, tmp_path):
    torch.save(batches(found), tmp_path / "in.pt")
    fresh.run(RUN, path, tmp_path / "in.pt", kind, tmp_path / "out.pt", without=WITHOUT_US)
    return torch.load(tmp_path / "out.pt")


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mistral", "qwen3", "gemma3", "bert", "vit", "mlp"])
def test_an_exported_program_of_every_kind_of_model(sparse, name, tmp_path):
    found = sparse(name)
    report = sf.export(found.model, tmp_path / "m.pt2", found.example, gate=False)
    assert report["sites"] and report["notes"] == [] and report["file_bytes"] == (tmp_path / "m.pt2").stat().st_size
    loaded = torch.export.load(tmp_path / "m.pt2")
    assert sum(n.target == OP for n in loaded.graph.nodes) >= len(report["sites"])
    module = loaded.module()
    for batch in batches(found):
        torch.testing.assert_close(call(module, batch), call(found.model, batch), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["gpt2", "mlp"])
def test_the_portable_program_runs_on_torch_alone(sparse, name, tmp_path):
    found = sparse(name)
    report = sf.export(found.model, tmp_path / "m.pt2", found.example, portable=True)
    assert report["sites"] and report["table"] == []
    namespaces = {str(n.target).split(".")[0] for n in torch.export.load(tmp_path / "m.pt2").graph.nodes}
    assert "sparseforge" not in namespaces
    for got, batch in zip(in_a_fresh_process(tmp_path / "m.pt2", found, "pt2", tmp_path), batches(found), strict=True):
        torch.testing.assert_close(got, call(found.model, batch), rtol=1e-4, atol=2e-5)


def test_the_portable_file_is_as_small_as_the_packed_one(tmp_path):
    net = nn.Sequential(nn.Linear(512, 1024, bias=False), nn.LayerNorm(1024)).bfloat16()
    x = torch.randn(2, 512).bfloat16()
    sf.sparsify(net, example_inputs=x)
    sizes = [sf.export(net, tmp_path / "m.pt2", x, gate=False, portable=p)["file_bytes"] for p in (False, True)]
    assert max(sizes) < 0.62 * net[0].weight.nbytes


def test_a_program_exports_to_the_same_bytes_whatever_its_name(sparse, tmp_path):
    found = sparse("llama")
    for name in ("a.pt2", "b.pt2"):
        sf.export(found.model, tmp_path / name, found.example, gate=False)
    assert (tmp_path / "a.pt2").read_bytes() == (tmp_path / "b.pt2").read_bytes()


def test_a_full_disk_is_told_and_the_file_of_before_stays(sparse, tmp_path):
    found, path = sparse("llama"), tmp_path / "m.pt2"
    path.write_text("of before")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (0, 30_000):  # torch's writer would abort the process
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            with pytest.raises(SparseForgeError, match=r"^the disk of .*m.pt2 is full: make room there"):
                sf.export(found.model, path, found.example, gate=False)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == "of before" and os.listdir(tmp_path) == ["m.pt2"]


def test_what_is_not_as_it_was_written_is_told(sparse, tmp_path):
    found = sparse("mlp")
    path = tmp_path / "m.pt2"
    sf.export(found.model, path, found.example, gate=False)
    sf.check_export(path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "bad.pt2", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name)[::-1] if name.endswith("weight_0") else old.read(name))
    with pytest.raises(SparseForgeError, match="data/weights/weight_0' differs"):
        sf.check_export(tmp_path / "bad.pt2")
    torch.export.save(torch.export.load(path), tmp_path / "bare.pt2")
    for name, match in (("bare.pt2", "has no checksums"), ("none.pt2", "No such file")):
        with pytest.raises(SparseForgeError, match=match):
            sf.check_export(tmp_path / name)


def test_packed_linears_stay_packed(sparse, tmp_path):
    found = sparse("llama")
    batch = found.batch(rows=3)
    want = found.model(**batch).logits
    model = type(found.model)(found.model.config).eval()
    model.load_state_dict(found.model.state_dict())
    sf.lower_modules(model, gate=False)
    report = sf.export(model, tmp_path / "m.pt2", found.example)
    assert len(report["sites"]) == 8  # merged as dense ones are
    assert report["sites"][0]["name"] == "model.layers.0.self_attn.q_proj_k_proj_v_proj.weight"
    assert 0.5 < report["lowered_bytes"] / report["dense_bytes"] < 0.6
    torch.testing.assert_close(
        torch.export.load(tmp_path / "m.pt2").module()(**batch)["logits"], want, rtol=1e-4, atol=1e-5
    )


def test_the_gate_decides_here_too(sparse, tmp_path):
    found = sparse("mlp")
    with pytest.raises(SparseForgeError, match="cannot be read: No such file"):
        sf.export(found.model, tmp_path / "m.pt2", found.example, table=tmp_path / "none.json")
    report = sf.export(found.model, tmp_path / "m.pt2", found.example, table={}, tokens=[1])
    assert report["sites"] == [] and {s["reason"][:8] for s in report["skipped"]} == {"gate: no", "not 2:4:"}


# -- AOTInductor -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A compiled llama, made once: it takes half a minute."""
    from tiny_models import _captured

    found = _captured("llama of one block").reset()
    sf.sparsify(found.model, example_inputs=found.example)
    path = tmp_path_factory.mktemp("aoti") / "m.pt2"
    report = sf.export(found.model, path, found.example, format="aoti", gate=False)
    return path, found, report


def test_a_compiled_package_runs_on_torch_alone(package, tmp_path):
    path, found, report = package
    assert len(report["sites"]) == 4
    for got, batch in zip(in_a_fresh_process(path, found, "aoti", tmp_path), batches(found), strict=True):
        torch.testing.assert_close(got, call(found.model, batch), rtol=1e-4, atol=2e-5)


def test_the_sparse_kernels_are_inside_and_no_dense_weight(package):
    path, found, _ = package
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        library = archive.read(next(n for n in names if n.endswith(".so")))
    assert b"aoti_torch_cpu_sparse_linear" in library and not any(n.endswith(".cpp") for n in names)
    weight = found.model.model.layers[0].mlp.down_proj.weight.detach()
    assert weight.numpy().tobytes() not in library
    kept = weight[weight != 0].numpy().tobytes()
    assert kept in library  # its survivors, row by row


@pytest.mark.slow
def test_a_compiled_package_is_the_same_again(package, tmp_path):
    path, found, _ = package
    sf.export(found.model, tmp_path / "again.pt2", found.example, format="aoti", gate=False)
    assert (tmp_path / "again.pt2").read_bytes() == path.read_bytes()
    sf.check_export(path)


def test_a_package_made_by_one_thread_is_run_by_as_many_as_there_are(tmp_path):
    assert torch.get_num_threads() == 1
    x = torch.randn(64, 512)
    package_programs({"model": capture(nn.Sequential(nn.GELU(), nn.Softmax(-1)), x)}, tmp_path / "m.pt2")
    with zipfile.ZipFile(tmp_path / "m.pt2") as archive:
        library = archive.read(next(n for n in archive.namelist() if n.endswith(".so")))
    assert b"GOMP_parallel" in library or b"__kmpc_fork_call" in library
    run, outputs = torch._inductor.aoti_load_package(str(tmp_path / "m.pt2")), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            outputs.append(run(x))
    finally:
        torch.set_num_threads(1)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "opt", "mistral", "qwen3", "gemma3", "bert", "vit"])
def test_a_compiled_package_of_every_other_kind_of_model(sparse, name, tmp_path):
    found = sparse(name)
    sf.export(found.model, tmp_path / "m.pt2", found.example, format="aoti", gate=False)
    for got, batch in zip(in_a_fresh_process(tmp_path / "m.pt2", found, "aoti", tmp_path), batches(found), strict=True):
        torch.testing.assert_close(got, call(found.model, batch), rtol=1e-4, atol=2e-5)


@pytest.mark.slow
def test_branches_with_kernels_compile(tmp_path):
    """What a package for a GPU is made of, on a CPU, where each kernel is plain torch."""
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.LayerNorm(32)).bfloat16()
    sf.sparsify(net, example_inputs=torch.randn(3, 64).bfloat16())
    program = capture(net, torch.randn(3, 64).bfloat16())
    program, _ = run_passes(program, deploy_passes(sparse_sites, all_in(PLANES)))
    _, (record,) = run_passes(program, package_passes("cuda"))
    assert record.modified == 1
    package_programs({"model": program}, tmp_path / "m.pt2")
    run = torch._inductor.aoti_load_package(str(tmp_path / "m.pt2"))
    for rows in (0, 1, 2, 16, 17, 128, 129, 300):
        x = torch.randn(rows, 64).bfloat16()
        torch.testing.assert_close(run(x), net(x), rtol=0.02, atol=0.02)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_compiled_package_for_a_gpu_holds_the_kernels(sparse, tmp_path):
    found = sparse("llama")
    found.model.to("cuda", torch.bfloat16)
    move = lambda batch: {name: t.cuda() for name, t in batch.items()}  # noqa: E731
    path = tmp_path / "m.pt2"
    report = sf.export(found.model, path, move(found.example), format="aoti", gate=False)
    assert {site["layout"] for site in report["sites"]} == {"planes"}
    with zipfile.ZipFile(path) as archive:
        cubins = b"".join(archive.read(n) for n in archive.namelist() if n.endswith(".cubin"))
    assert all(b".text." + kernel + b"\0" in cubins for kernel in (b"gemv", b"dot", b"expand_weight"))
    wanted = [move(found.batch(rows=rows, length=length)) for rows, length in (*SIZES, (8, 20))]
    torch.save(wanted, tmp_path / "in.pt")
    fresh.run(RUN, path, tmp_path / "in.pt", "aoti", tmp_path / "out.pt", without=(*WITHOUT_US, "triton"))
    for got, batch in zip(torch.load(tmp_path / "out.pt"), wanted, strict=True):
        torch.testing.assert_close(got, call(found.model, batch), rtol=0.05, atol=0.05)
    tokens = [5, 9, 11, 4]
    done = run_from_cpp(path, tmp_path, tokens)
    assert int(done.stdout) == found.model(torch.tensor([tokens]).cuda()).logits[0, -1].argmax()


def run_from_cpp(path, folder, tokens):
    """Build examples/cpp once, and run it."""
    source = Path(__file__).parents[3] / "examples" / "cpp" / "run_package.cpp"
    torch_folder = Path(torch.__file__).parent
    include, libraries = torch_folder / "include", torch_folder / "lib"
    binary = folder / "run_package"
    cuda = ["-Wl,--no-as-needed", "-ltorch_cuda"] if torch.cuda.is_available() else []
    if not binary.exists():
        subprocess.run(
            ["g++", "-O0", "-std=c++20", f"-I{include}", f"-I{include}/torch/csrc/api/include", source, "-o", binary,
             f"-L{libraries}", f"-Wl,-rpath,{libraries}", *cuda, "-ltorch", "-ltorch_cpu", "-lc10"],
            check=True,
        )  # fmt: skip
    return subprocess.run([binary, path, *map(str, tokens)], env={}, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_a_compiled_package_runs_from_cpp(package, tmp_path):
    path, found, _ = package
    tokens = [5, 9, 11, 4]
    done = run_from_cpp(path, tmp_path, tokens)
    assert int(done.stdout) == found.model(torch.tensor([tokens])).logits[0, -1].argmax()
    bad = run_from_cpp(tmp_path / "none.pt2", tmp_path, [1])
    assert bad.returncode == 1 and len(bad.stderr.splitlines()) == 1


def test_the_environment_is_left_as_it_was(package):
    assert "sparseforge_fx" not in os.environ.get("LIBRARY_PATH", "")


# -- errors ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("m.pt", {}, "does not end in .pt2"),
        ("no/such/m.pt2", {}, "its folder is not there"),
        ("m.pt2", {"format": "onnx"}, "unknown format 'onnx'; choose pt2 or aoti"),
        ("m.pt2", {"format": "aoti", "portable": True}, "portable is for the format pt2"),
        ("m.pt2", {"target": "tpu"}, "unknown target"),
        ("m.pt2", {"example_inputs": torch.randn(2, 5)}, "itself fails on the example inputs"),
    ],
)
def test_what_is_refused(tmp_path, name, options, message):
    net = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    sf.sparsify(net, example_inputs=torch.randn(2, 8))
    with pytest.raises(SparseForgeError, match=message):
        sf.export(net, tmp_path / name, **{"example_inputs": torch.randn(2, 8), **options})
    assert not list(tmp_path.iterdir())


def test_a_dense_model_is_refused(tmp_path):
    with pytest.raises(SparseForgeError, match="nothing to lower"):
        sf.export(nn.Linear(8, 8), tmp_path / "m.pt2", torch.randn(2, 8))
    assert not list(tmp_path.iterdir())


def test_a_compiler_that_fails_leaves_nothing(sparse, tmp_path, monkeypatch):
    found = sparse("mlp")
    monkeypatch.setattr("sparseforge_fx.kernels.cpu.available", lambda: False)
    with pytest.raises(SparseForgeError, match="install a C\\+\\+ compiler"):
        sf.export(found.model, tmp_path / "m.pt2", found.example, format="aoti", gate=False)
    assert not list(tmp_path.iterdir())


def test_what_the_compiler_says_becomes_one_sentence(sparse, tmp_path, monkeypatch):
    found = sparse("mlp")
    said = "C++ compile error\n\nCommand:\ng++ x.hpp\n\nOutput:\ndevice.h:15:10: fatal error: cuda.h: No such file\n  15 | #include"

    def fail(*_, **__):
        raise CppCompileError(["g++"], said)

    monkeypatch.setattr("torch._inductor.aot_compile", fail)
    with pytest.raises(SparseForgeError, match=r"cuda.h: No such file\): set CUDA_HOME to a CUDA toolkit$"):
        sf.export(found.model, tmp_path / "m.pt2", found.example, format="aoti", gate=False)
    assert not list(tmp_path.iterdir())


def test_outputs_become_plain(tiny):
    program = tiny("bert").program.copy()
    plain_outputs(program.exported)
    outputs = program.module()(**tiny("bert").batch())
    assert type(outputs) is dict and "last_hidden_state" in outputs
