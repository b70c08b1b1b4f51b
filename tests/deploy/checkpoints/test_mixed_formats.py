"""Linears in several formats: packed folders of them, graphs, packages, and files that lie."""

import copy
import json

import pytest
import torch
from code_cases import FORMATS, mixed_formats
from fresh import run
from packed_models import GREEDY, IDS, edit_json, pack_to, sparse_model
from safetensors.torch import load_file, save_file
from tiny_checkpoint import byte_tokenizer, tiny_llama
from tiny_models import build
from transformers import AutoModelForCausalLM

import sparseforge_fx as sf
from sparseforge_fx.deploy.checkpoints.packed_state import packed_linears
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.formats import parse_format

WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}


def mixed(formats=FORMATS):
    torch.manual_seed(0)
    model = tiny_llama(initializer_range=0.2, **WIDE).eval()
    return model, mixed_formats(model, formats)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of every format, what is in it, its logits and text."""
    path = tmp_path_factory.mktemp("mixed") / "llama"
    model, formats = mixed()
    with torch.no_grad():
        logits, text = model(IDS).logits, model.generate(IDS, **GREEDY)
    report = sf.save_packed(model, byte_tokenizer(), path)
    assert {s["name"]: s["format"] for s in report["sites"]} == {n: str(f) for n, f in formats.items()}
    assert {str(f) for f in formats.values()} == set(FORMATS)
    return path, formats, logits, text


def test_a_new_model_has_the_same_bits(folder):
    path, formats, logits, text = folder
    model, tokenizer = sf.load(path)
    assert {n: m.packed().format for n, m in packed_linears(model).items()} == formats and tokenizer is not None
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, logits) and torch.equal(model.generate(IDS, **GREEDY), text)
    other = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        assert torch.equal(other(IDS).logits, logits)


def test_packed_in_place_and_saved_by_transformers(tiny, tmp_path):
    for number, pack in enumerate((sf.quantize, lambda model: sf.lower_modules(model, gate=False))):
        model = copy.deepcopy(tiny("llama").model)
        sf.sparsify(model, method="magnitude", show_progress=False)
        pack(model)
        model.save_pretrained(tmp_path / str(number))
        with torch.no_grad():
            expected = model(IDS).logits
            for again in (
                sf.load(tmp_path / str(number))[0],
                AutoModelForCausalLM.from_pretrained(tmp_path / str(number)),
            ):
                assert torch.equal(again(IDS).logits, expected)
        model.dequantize()
        assert not packed_linears(model) and not hasattr(model.config, "quantization_config")


def test_in_a_fresh_process(folder):
    path, _, _, text = folder
    code = (
        "import sys, torch, sparseforge_fx as sf\n"
        "model, _ = sf.load(sys.argv[1])\n"
        f"print(model.generate(torch.tensor({IDS.tolist()}), **{GREEDY}).tolist())"
    )
    assert json.loads(run(code, str(path))) == text.tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype_leaves_codes_and_scales(folder, dtype):
    path, _, _, _ = folder
    want = {n: m.packed() for n, m in packed_linears(sf.load(path)[0]).items()}
    for model in (sf.load(path, dtype=dtype)[0], sf.load(path)[0].to(dtype)):
        for name, module in packed_linears(model).items():
            got = module.packed()
            assert module.weight.dtype == dtype
            assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got[:2], want[name][:2], strict=True))
            assert torch.equal(got.scales, want[name].scales) and got.scales.dtype == want[name].scales.dtype
        assert model(IDS).logits.isfinite().all()


def test_saved_again_and_dequantised(folder, tmp_path):
    path, _, _, _ = folder
    model, _ = sf.load(path)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()
    dense = sf.load(path)[0]
    weights = {n: m.weight for n, m in packed_linears(dense).items()}
    dense.dequantize()
    assert all(torch.equal(dense.get_submodule(n).weight, w) for n, w in weights.items())


def test_version_1_still_loads(tmp_path):
    new, old = pack_to(tmp_path / "new"), pack_to(tmp_path / "old")

    def earlier(config):
        header = config["quantization_config"]
        header |= {"format_version": 1, "pattern": "2:4"}
        for entry in header["modules"].values():
            del entry["format"]

    edit_json(old / "config.json", earlier)
    assert torch.equal(sf.load(old)[0](IDS).logits, sf.load(new)[0](IDS).logits)


def test_a_version_of_byte_scales_without_any_is_refused(tmp_path):
    path = pack_to(tmp_path / "new")
    edit_json(path / "config.json", lambda config: config["quantization_config"].update(format_version=6))
    with pytest.raises(SparseForgeError, match="version 6 has no format that is new in it"):
        sf.load(path)


def test_versions_say_the_least_that_is_needed(folder, tmp_path):
    """So that older readers keep what they can read."""
    version = lambda path: json.loads((path / "config.json").read_text())["quantization_config"]["format_version"]  # noqa: E731
    assert version(folder[0]) == 6
    for number, text in ((2, "2:4 int4/32"), (6, "2:4 int4/16")):
        model = build("llama").eval()
        mixed_formats(model, [text])
        sf.save_packed(model, None, tmp_path / str(number))
        assert version(tmp_path / str(number)) == number


def test_conv1d_and_learned_positions(tmp_path):
    model = build("gpt2").eval()
    formats = mixed_formats(model, ["2:4 int8", "dense int4/32"])
    with torch.no_grad():
        want = model(IDS).logits
    sf.save_packed(model, None, tmp_path / "gpt2")
    loaded, _ = sf.load(tmp_path / "gpt2")
    assert {n: m.format for n, m in packed_linears(loaded).items()} == formats
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, want)


def test_beside_plain_two_four(tmp_path):
    model = sparse_model("llama")
    mixed_formats(model.model.layers[0], ["dense int8", "2:4 int8"])
    sf.save_packed(model, None, tmp_path / "both")
    formats = {str(m.format) for m in packed_linears(sf.load(tmp_path / "both")[0]).values()}
    assert formats == {"dense int8", "2:4 int8", "2:4"}


# -- graphs ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", FORMATS)
def test_lowered(text):
    """q/k/v and gate/up of one format become one linear each; the numbers stay."""
    model, _ = mixed([text])
    with torch.no_grad():
        want = model(IDS).logits
    graph = sf.lower(model, {"input_ids": IDS})
    ops = [str(n.target) for n in graph.graph.nodes if "sparse_linear" in str(n.target)]
    assert len(ops) == 4 * model.config.num_hidden_layers
    with torch.no_grad():
        torch.testing.assert_close(graph(input_ids=IDS).logits, want, rtol=1e-4, atol=1e-4)


def test_formats_that_differ_are_not_merged():
    model, _ = mixed()
    graph = sf.lower(model, {"input_ids": IDS})
    with torch.no_grad():
        torch.testing.assert_close(graph(input_ids=IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_pt2_runs_without_us(folder, tmp_path):
    path, _, logits, _ = folder
    model, _ = sf.load(path)
    sf.export(model, tmp_path / "model.pt2", {"input_ids": IDS}, portable=True)
    code = (
        "import sys, torch\n"
        "program = torch.export.load(sys.argv[1]).module()\n"
        f"torch.save(program(input_ids=torch.tensor({IDS.tolist()}))['logits'], sys.argv[2])\n"
    )
    run(code, str(tmp_path / "model.pt2"), str(tmp_path / "logits.pt"), without=("sparseforge_fx",))
    # plain operators multiply by x as it is; the kernels round it to 8 bits
    near = torch.load(tmp_path / "logits.pt")
    assert (near - logits).norm() < 0.05 * logits.norm()


def test_package_without_python(folder, tmp_path):
    path, _, logits, _ = folder
    model, _ = sf.load(path)
    sf.export(model, tmp_path / "package.pt2", {"input_ids": IDS}, format="aoti")
    packaged = torch._inductor.aoti_load_package(str(tmp_path / "package.pt2"))
    # where the compiled graph's x differs in its last bit, its rounding may fall to the other side: a step of one input
    torch.testing.assert_close(packaged(input_ids=IDS)["logits"], logits, rtol=1e-3, atol=2e-3)


# -- files that lie --------------------------------------------------------------------------------------------------
def header(change):
    def edit(path):
        edit_json(path / "config.json", lambda config: change(config["quantization_config"]))

    return edit


def module_of(entries, text):
    return next(entry for entry in entries["modules"].values() if entry["format"] == text)


def tensors(change):
    """Change the tensors of the first module of a format, and the checksum with them."""

    def edit(path):
        state = load_file(path / "model.safetensors")
        config = json.loads((path / "config.json").read_text())
        modules = config["quantization_config"]["modules"]
        change(state, {f: next(n for n, e in modules.items() if e["format"] == f) for f in FORMATS})
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
        edit_json(path / "config.json", lambda c: c["quantization_config"].pop("files"))

    return edit


def put(text, leaf, make):
    def change(state, names):
        name = f"{names[text]}.weight_{leaf}"
        state[name] = make(state[name]).contiguous()

    return tensors(change)


def drop(text, leaf):
    return tensors(lambda state, names: state.pop(f"{names[text]}.weight_{leaf}"))


LIES = {
    "version from the future": header(lambda h: h.update(format_version=3)),
    "version 1 with formats": header(lambda h: h.update(format_version=1, pattern="2:4")),
    "pattern of version 1": header(lambda h: h.update(pattern="2:4")),
    "format of no kernel": header(lambda h: module_of(h, "2:4 int4/32").update(format="2:4 int4/64")),
    "format of a number": header(lambda h: module_of(h, "2:4 int8").update(format=8)),
    "format that is not as it is written": header(lambda h: module_of(h, "2:4 int8").update(format=" 2:4  int8")),
    "dense for sparse": header(lambda h: module_of(h, "2:4 int8").update(format="dense int8")),
    "sparse for dense": header(lambda h: module_of(h, "dense int4/32").update(format="2:4 int4/32")),
    "int4 for int8": header(lambda h: module_of(h, "dense int8").update(format="dense int4/32")),
    "another group": header(lambda h: module_of(h, "dense int4/32").update(format="dense int4/128")),
    "floating for codes": header(lambda h: module_of(h, "2:4 int8").update(format="2:4")),
    "shape of other groups": header(lambda h: module_of(h, "2:4 int4/128").update(shape=[64, 96])),
    "no scales": drop("dense int8", "scales"),
    "no values": drop("2:4 int4/32", "values"),
    "no bitmask": drop("2:4 int8", "bitmask"),
    "scales of NaN": put("2:4 int8", "scales", lambda t: t * float("nan")),
    "scales of zero": put("dense int4/32", "scales", lambda t: t * 0),
    "scales in float32": put("2:4 int4/32", "scales", lambda t: t.float()),
    "scales for a row less": put("2:4 int4/128", "scales", lambda t: t[:-1]),
    "a code off the grid": put("dense int8", "values", lambda t: torch.full_like(t, -128)),
    "scales below zero": put("dense int8", "scales", lambda t: -t),
    "three bits of four": put("2:4 int4/32", "bitmask", lambda t: torch.full_like(t, 0x77)),
    "values of another dtype": put("2:4 int8", "values", lambda t: t.view(torch.uint8)),
    "scales of bytes in a version of halves": header(lambda h: h.update(format_version=5)),
    "other levels": header(lambda h: module_of(h, "dense int4/32").update(format="dense int4/16")),
    "halves for bytes": header(lambda h: module_of(h, "2:4 int4/16").update(format="2:4 int4/32")),
    "scales of zero bytes": put("2:4 int4/16", "scales", lambda t: t * 0),
    "a row's scale below zero": put("dense int4/16", "scales", lambda t: torch.cat((t[:, :-1], t[:, -1:] | -128), 1)),
    "a row's scale of NaN": put("dense int4/16", "scales", lambda t: torch.cat((t[:, :-4], t[:, -4:] * 0 - 1), 1)),
    "scales without their row's": put("dense int4/16", "scales", lambda t: t[:, :-4]),
    "a bitmask for dense": put("dense int8", "bitmask", lambda t: torch.zeros(len(t), 16, dtype=torch.uint8)),
}


@pytest.mark.parametrize("lie", LIES)
def test_files_that_lie_are_refused(folder, tmp_path, lie):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder[0], copy)
    LIES[lie](copy)
    with pytest.raises(SparseForgeError):
        sf.load(copy)


def test_a_weight_of_codes_takes_no_other(folder):
    model, _ = sf.load(folder[0])
    module = next(iter(packed_linears(model).values()))
    with pytest.raises(SparseForgeError, match="quantise the dense model anew"):
        module.replace_weight(module.weight)
    assert module.format == parse_format(str(module.format)) and str(module.format) in repr(module)
