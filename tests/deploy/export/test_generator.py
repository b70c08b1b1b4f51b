"""export_generator, load_generator: tokens equal to generate(), one copy of the weights, and errors in one sentence."""

import io
import json
import shutil
import tracemalloc
import zipfile
from pathlib import Path

import fresh
import pytest
import torch
import transformers
from code_cases import mixed_formats
from tiny_models import build
from tokenizers import Tokenizer, models, pre_tokenizers

import sparseforge_fx as sf
from sparseforge_fx.deploy.export.archive import CHECKSUMS, seal
from sparseforge_fx.deploy.export.generation import SPEC_FILE
from sparseforge_fx.errors import SparseForgeError

LENGTH = 40


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """exported(name, format): (model, path, report), each made once."""
    made = {}

    def make(name, format="pt2"):
        if (name, format) not in made:
            torch.manual_seed(0)
            model = build(name).eval()
            sf.sparsify(model)
            model.generation_config.eos_token_id = None
            path = tmp_path_factory.mktemp("generator") / "g.pt2"
            report = sf.export_generator(model, path, tokenizer(), format=format, max_length=LENGTH, gate=False)
            made[name, format] = model, path, report
        return made[name, format]

    return make


@pytest.fixture(scope="module")
def loaded(exported):
    """loaded(name): the generator of its pt2 file, each read once; nothing is to be changed of it."""
    made = {}

    def load(name):
        if name not in made:
            made[name] = sf.load_generator(exported(name)[1])
        return made[name]

    return load


def tokenizer():
    words = ["<pad>", "<s>", "</s>", *(chr(97 + i) for i in range(26))]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")


def prompts(rows=2, length=7, padded=3):
    ids = torch.randint(3, 50, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0
    return ids * mask, mask


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "opt", *(pytest.param(n, marks=pytest.mark.slow) for n in ("mistral", "qwen3", "gemma3"))]
)
def test_greedy_tokens_are_those_of_generate(exported, loaded, name):
    model, path, report = exported(name)
    ids, mask = prompts()
    generator = loaded(name)
    want = model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
    assert torch.equal(generator.generate(ids, mask, max_new_tokens=20), want)
    one = ids[1:, :1]  # no prefill
    want = model.generate(one, attention_mask=torch.ones_like(one), max_new_tokens=20, do_sample=False)
    assert torch.equal(generator.generate(one, max_new_tokens=20), want)
    assert report["sites"] and report["file_bytes"] == path.stat().st_size


def test_every_format_generates_what_its_modules_do(tmp_path):
    """Dense codes have an empty bitmask, which once could not be packaged."""
    torch.manual_seed(0)
    model = build("llama of one block").eval()
    formats = mixed_formats(model)
    assert {form.is_sparse for form in formats.values()} == {True, False}
    model.generation_config.eos_token_id = None
    sf.export_generator(model, tmp_path / "g.pt2", format="pt2", max_length=LENGTH, gate=False)
    ids, mask = prompts()
    want = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert torch.equal(sf.load_generator(tmp_path / "g.pt2").generate(ids, mask, max_new_tokens=12), want)


def test_what_generate_does_unasked_is_done_or_told(tmp_path):
    """By the model's generation_config: a penalty goes with the file, the rest into the notes."""
    torch.manual_seed(0)
    model = build("llama of one block").eval()
    sf.sparsify(model)
    ids, mask = prompts()
    config = model.generation_config
    config.eos_token_id = None
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    config.repetition_penalty, config.no_repeat_ngram_size, config.do_sample, config.top_p = 1.7, 3, True, 0.9
    report = sf.export_generator(model, tmp_path / "g.pt2", max_length=LENGTH, gate=False)
    assert len(report["notes"]) == 2 and "do_sample=True, top_p=0.9" in report["notes"][0]
    assert "no no_repeat_ngram_size 3" in report["notes"][1]
    config.no_repeat_ngram_size = None
    want = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    generator = sf.load_generator(tmp_path / "g.pt2")
    assert torch.equal(generator.generate(ids, mask, max_new_tokens=12), want) and not torch.equal(want, plain)
    assert torch.equal(generator.generate(ids, mask, max_new_tokens=12, repetition_penalty=1.0), plain)
    drawn = [generator.generate(ids, mask, max_new_tokens=12, do_sample=True, seed=1) for _ in range(2)]
    assert torch.equal(*drawn)
    with pytest.raises(SparseForgeError, match="repetition_penalty"):
        generator.generate(ids, mask, repetition_penalty=0.0)


def test_a_cache_that_grows_holds_what_it_held(exported, monkeypatch):
    model, path, _ = exported("llama")
    ids, mask = prompts()
    monkeypatch.setattr("sparseforge_fx.deploy.export.generator.SLOTS", 4)
    generator, lengths = sf.load_generator(path), []
    decode = generator._decode
    generator._decode = lambda **given: lengths.append(given["cache"][0][0].shape[1]) or decode(**given)
    want = model.generate(ids, attention_mask=mask, max_new_tokens=LENGTH - 7, do_sample=False)
    assert torch.equal(generator.generate(ids, mask, max_new_tokens=LENGTH - 7), want)
    assert lengths == [-(-slots // 4) * 4 for slots in range(8, LENGTH)]  # no more than a step ahead of the text


def test_one_copy_of_the_weights(exported, loaded):
    model, path, report = exported("llama")
    generator = loaded("llama")
    first, second = generator._prefill.state_dict(), generator._decode.state_dict()
    assert first.keys() == second.keys() and all(first[n].data_ptr() == second[n].data_ptr() for n in first)
    with zipfile.ZipFile(path) as archive:
        stored = sum(i.file_size for i in archive.infolist() if "/data/weights/weight_" in i.filename)
    embedding = model.lm_head.weight.nbytes + model.model.embed_tokens.weight.nbytes
    assert stored < report["lowered_bytes"] + embedding + 3000  # norms, and a few bytes for every stand-in


def test_compiled_graphs(exported, tmp_path):
    model, path, _ = exported("llama of one block", "aoti")
    ids, mask = prompts()
    want = model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)
    generator = sf.load_generator(path)
    assert torch.equal(generator.generate(ids, mask, max_new_tokens=20), want)
    one = ids[1:, :1].expand(3, 1)  # of strides that the graph was not compiled for
    want = model.generate(one, attention_mask=torch.ones_like(one), max_new_tokens=20, do_sample=False)
    assert torch.equal(generator.generate(one, max_new_tokens=20), want)
    with zipfile.ZipFile(path) as archive:
        libraries = [archive.read(n) for n in archive.namelist() if n.endswith(".so")]
        stored = [i.filename for i in archive.infolist() if "/data/weights/weight_" in i.filename]
    assert len(libraries) == 2 and all(b"aoti_torch_cpu_sparse_linear" in library for library in libraries)
    packed_and_plain = {p.data_ptr() for p in model.parameters()}
    assert len(stored) <= len(packed_and_plain) + 16  # not twice


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("format", ["pt2", "aoti"])
def test_on_a_gpu_no_token_is_worse_than_rounding_makes_it(tmp_path, format):
    torch.manual_seed(0)
    model = build("llama").eval()
    sf.sparsify(model)
    model.to("cuda", torch.bfloat16)
    model.generation_config.eos_token_id = None
    report = sf.export_generator(model, tmp_path / "g.pt2", format=format, max_length=LENGTH, gate=False)
    assert {site["layout"] for site in report["sites"]} == {"planes"}
    ids = prompts(padded=0)[0].cuda()
    out = sf.load_generator(tmp_path / "g.pt2").generate(ids, max_new_tokens=20)
    with torch.no_grad():
        logits = model(out).logits.float()[:, ids.shape[1] - 1 : -1]
    chosen = logits.gather(-1, out[:, ids.shape[1] :, None])[..., 0]
    assert (logits.amax(-1) - chosen).max() < 0.05 * logits.abs().max()


def test_text_in_a_fresh_process(exported):
    model, path, _ = exported("llama")
    code = "import sparseforge_fx as sf; print(sf.load_generator(sys.argv[1]).text(['a b c', 'd'], max_new_tokens=5))"
    ids = torch.tensor([[3, 4, 5], [0, 0, 6]])
    want = model.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=5, do_sample=False)[:, 3:]
    assert fresh.run(code, path).strip() == str(tokenizer().batch_decode(want, skip_special_tokens=True))


def test_sampling(loaded):
    generator = loaded("llama")
    ids, mask = prompts()
    draw = lambda **options: generator.generate(ids, mask, max_new_tokens=12, do_sample=True, **options)  # noqa: E731
    assert torch.equal(draw(seed=3), draw(seed=3)) and not torch.equal(draw(seed=3), draw(seed=4))
    greedy = generator.generate(ids, mask, max_new_tokens=12)
    assert torch.equal(draw(top_k=1), greedy) and torch.equal(draw(top_p=1e-6), greedy)
    assert torch.equal(draw(temperature=1e-4, seed=0), greedy)


def test_the_first_sampled_token_follows_the_distribution(exported, loaded):
    model, _, _ = exported("llama")
    ids = prompts(rows=1, padded=0)[0]
    many = ids.expand(4000, -1)
    drawn = loaded("llama").generate(many, max_new_tokens=1, do_sample=True, seed=0)[:, -1]
    want = model(ids).logits[0, -1].softmax(-1)
    got = drawn.bincount(minlength=want.numel()) / 4000
    assert (got - want).abs().max() < 5 * (0.25 / 4000) ** 0.5


def test_sequences_end(exported, loaded, monkeypatch):
    model, _, _ = exported("llama")
    generator = loaded("llama")
    ids, mask = prompts(rows=3, padded=0)
    free = generator.generate(ids, max_new_tokens=12)
    monkeypatch.setattr(generator, "eos", [int(free[0, 9])])  # the third new token of the first row
    model.generation_config.eos_token_id = generator.eos
    try:
        want = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    finally:
        model.generation_config.eos_token_id = None
    got = generator.generate(ids, max_new_tokens=12)
    assert torch.equal(got, want) and (got[0, 10:] == generator.pad).all()


def test_a_second_export_gives_the_same_bytes(exported, tmp_path):
    model, path, _ = exported("gpt2")
    sf.export_generator(model, tmp_path / "other.pt2", tokenizer(), max_length=LENGTH, gate=False)
    assert (tmp_path / "other.pt2").read_bytes() == path.read_bytes()


def test_who_gets_tokens_may_write_into_them(loaded):
    generator, (ids, _) = loaded("llama"), prompts()
    expected = generator.generate(ids, max_new_tokens=6)[:, 7:]
    got = []
    for token in generator.stream(ids.clone(), max_new_tokens=6):
        got.append(token.clone())
        token.fill_(3)
    assert torch.equal(torch.stack(got, 1), expected)


def test_the_callers_modes_change_nothing(loaded):
    generator, (ids, _) = loaded("llama"), prompts()
    expected = generator.generate(ids, max_new_tokens=6)
    for mode in (torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.enable_grad()):
        with mode:
            assert torch.equal(generator.generate(ids.clone(), max_new_tokens=6), expected)
    tokens = generator.stream(ids, max_new_tokens=6)
    with torch.inference_mode():
        got = [next(tokens)]
    assert torch.equal(torch.stack([*got, *tokens], 1), expected[:, 7:])


def test_a_mask_that_is_not_left_padding_is_refused(loaded):
    generator = loaded("llama")
    ids, mask = prompts()
    for wrong in (mask.flip(1), mask[:, 1:], mask.tolist()):
        with pytest.raises(SparseForgeError, match="pad on the left"):
            generator.generate(ids, wrong, max_new_tokens=4)
    for wrong in (mask * 2, -mask, mask / 2):  # positions were counted by it, and halves were padding
        with pytest.raises(SparseForgeError, match="other values than 0 and 1"):
            generator.generate(ids, wrong, max_new_tokens=4)
    expected = generator.generate(ids, mask, max_new_tokens=4)
    for same in (mask.bool(), mask.float()):
        assert torch.equal(generator.generate(ids, same, max_new_tokens=4), expected)


def test_a_tokenizer_that_writes_no_tokenizer_json_is_refused(exported, tmp_path):
    class Slow:
        def save_pretrained(self, folder):
            Path(folder, "tokenizer.model").write_bytes(b"\xff\x00")

    with pytest.raises(SparseForgeError, match="Slow writes no tokenizer"):
        sf.export_generator(exported("gpt2")[0], tmp_path / "g.pt2", Slow(), max_length=16, gate=False)
    assert not list(tmp_path.iterdir())


def test_the_model_is_left_alone(exported):
    model, _, _ = exported("llama")
    assert model.config.use_cache and not hasattr(model, "key_cache_0")


# -- errors ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (torch.ones(1, 4, dtype=torch.long), {"max_new_tokens": LENGTH}, "do not fit a cache of 40"),
        (torch.ones(1, 4, dtype=torch.long), {"max_new_tokens": 0}, "max_new_tokens is 0"),
        (torch.ones(1, 4, dtype=torch.long), {"max_new_tokens": 4, "temperature": 0.5}, "are for do_sample=True"),
        (torch.ones(1, 4, dtype=torch.long), {"max_new_tokens": 4, "do_sample": True, "top_p": 1.5}, "top_p is 1.5"),
        (torch.ones(1, 4), {}, "int64 ids"),
        (torch.ones(1, 0, dtype=torch.long), {}, "int64 ids"),
        ([[5, 6]], {}, "int64 ids .*, not a list"),
        (torch.tensor([[5, 260, 6]]), {}, "the model has no token 260: take the tokenizer"),
        (torch.tensor([[-1, 6]]), {}, "no token -1"),
        (
            torch.ones(1, 4, dtype=torch.long),
            {"max_new_tokens": 4, "do_sample": True, "temperature": -1.0},
            "temperature",
        ),
    ],
)
def test_what_the_runner_refuses(loaded, ids, options, message):
    generator = loaded("llama")
    with pytest.raises(SparseForgeError, match=message):
        generator.generate(ids, **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama", {"max_length": 65}, "more than the 64 positions"),
        ("llama", {"max_length": 1}, "room for a prompt"),
        ("llama", {"format": "gguf"}, "unknown format"),
        ("bert", {}, "no causal language model"),
        ("mlp", {}, "no causal language model"),
    ],
)
def test_what_is_not_exported(name, options, message, tmp_path):
    with pytest.raises(SparseForgeError, match=message):
        sf.export_generator(build(name), tmp_path / "g.pt2", **{"max_length": 16, **options})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.double(), "dtype is 'float64', and a generator takes bfloat16, float16, float32"),
        (lambda model: setattr(model.generation_config, "eos_token_id", 1 << 40), "eos_token_id is .1099511627776"),
        (lambda model: setattr(model.generation_config, "pad_token_id", [0]), "pad_token_id is .0., and a generator"),
        (lambda model: setattr(model.generation_config, "repetition_penalty", -1.0), "takes a positive number"),
    ],
)
def test_what_could_not_be_loaded_is_not_written(tmp_path, change, message):
    model = build("llama of one block").eval()
    change(model)
    with pytest.raises(SparseForgeError, match=message):
        sf.export_generator(model, tmp_path / "g.pt2", max_length=16, gate=False)
    assert not list(tmp_path.iterdir())


def test_ends_as_a_tuple_and_a_padding_that_is_no_token(tmp_path):
    torch.manual_seed(0)
    model = build("llama of one block").eval()
    sf.sparsify(model)
    ids = prompts(rows=3, padded=0)[0]
    model.generation_config.eos_token_id = None
    end = int(model.generate(ids, max_new_tokens=3, do_sample=False)[0, -1])
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = (end, 1), -1
    model.generation_config.repetition_penalty = 2e6
    sf.export_generator(model, tmp_path / "g.pt2", max_length=LENGTH, gate=False)
    generator = sf.load_generator(tmp_path / "g.pt2")
    assert generator.eos == [end, 1]
    for options in ({}, {"repetition_penalty": 1.000001}, {"do_sample": True, "top_k": 1}):
        out = generator.generate(ids, max_new_tokens=12, **{"repetition_penalty": 1.0} | options)
        assert (out[0, 10:] == -1).all()


def test_a_state_space_model_is_refused(tmp_path):
    config = transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, state_size=4)
    with pytest.raises(SparseForgeError, match="does not keep keys and values in a static cache"):
        sf.export_generator(transformers.MambaForCausalLM(config), tmp_path / "g.pt2", max_length=16)


def test_a_model_that_counts_the_slots_of_its_cache_is_refused(tmp_path):
    """Its local layers look back from the cache's end: past their window, at nothing of a short text."""
    kinds = {"attention_types": [[["global", "local"], 1]], "window_size": 16, "max_position_embeddings": 64}
    config = transformers.GPTNeoConfig(
        vocab_size=64, hidden_size=32, num_layers=2, num_heads=2, bos_token_id=1, eos_token_id=2, **kinds
    )
    torch.manual_seed(0)
    model = transformers.GPTNeoForCausalLM(config)
    with pytest.raises(SparseForgeError, match="GPTNeoForCausalLM answers otherwise where 40 slots"):
        sf.export_generator(model, tmp_path / "g.pt2", max_length=40, gate=False)
    assert not list(tmp_path.iterdir()) and model.training
    sf.sparsify(model)
    model.generation_config.eos_token_id = None
    sf.export_generator(model, tmp_path / "g.pt2", max_length=16, gate=False)
    ids = torch.randint(3, 64, (1, 6), generator=torch.Generator().manual_seed(0))
    want = model.generate(ids, max_new_tokens=10, do_sample=False, pad_token_id=0)
    assert torch.equal(sf.load_generator(tmp_path / "g.pt2").generate(ids, max_new_tokens=10), want)


def rewritten(path, target, change, more=None, sealed=True):
    """The archive with the bytes of each file changed by ``change(name, bytes)``, where None drops it, and ``more``
    files by name; with the checksums of that, or with the old ones."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = change(name, old.read(name))
            if data is not None and not (sealed and name.endswith(CHECKSUMS)):
                new.writestr(name, data)
        for name, data in (more or {}).items():
            new.writestr(f"archive/{name}", data)
    if sealed:
        seal(target)


def same(name, data):
    return data


def with_spec(**fields):
    return lambda name, data: json.dumps({**json.loads(data), **fields}).encode() if name.endswith(SPEC_FILE) else data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_spec(version=99), "version 99"),
        (with_spec(version=None), "version None"),
        (with_spec(version=1), "version 1 of"),  # before there were checksums
        (with_spec(max_length=1 << 40), "describes its cache or tokens wrongly"),
        (with_spec(max_length="40"), "describes its cache or tokens wrongly"),
        (with_spec(version=2), "version 2 of"),  # whose caches had one length
        (with_spec(cache=[[[1, 1 << 20]] * 2] * 2), "made for another cache"),
        (with_spec(cache=[[[1, LENGTH, 16]] * 2] * 2), "describes its cache or tokens wrongly"),
        (with_spec(cache=None), "describes its cache or tokens wrongly"),
        (with_spec(dtype="object"), "describes its cache or tokens wrongly"),
        pytest.param(
            with_spec(device="cuda"),
            "there is none here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here"),
        ),
        (with_spec(format="pickle"), "describes its cache or tokens wrongly"),
        (with_spec(eos_token_id=7), "describes its cache or tokens wrongly"),
        (with_spec(eos_token_id=[1 << 70]), "describes its cache or tokens wrongly"),
        (with_spec(pad_token_id=[]), "describes its cache or tokens wrongly"),
        (lambda name, data: None if name.endswith(SPEC_FILE) else data, "not a file of sf.export_generator"),
        (lambda name, data: b"{" if name.endswith(SPEC_FILE) else data, "no export, or it is damaged"),
        (lambda name, data: b"[" * 100_000 if name.endswith(SPEC_FILE) else data, "no export, or it is damaged"),
        (lambda name, data: b"[]" if name.endswith(SPEC_FILE) else data, "version None"),
        (lambda name, data: None if name.endswith("models/decode.json") else data, "cannot be loaded"),
        (lambda name, data: data[:-9] if name.endswith("models/prefill.json") else data, "cannot be loaded"),
        (lambda name, data: data[:-2] if name.endswith("weight_0") else data, "cannot be loaded"),
        (lambda name, data: b"" if name.endswith("weight_0") else data, "something else than tensors"),
        (lambda name, data: b"{" if name.endswith("tokenizer.tokenizer.json") else data, "cannot be loaded"),
    ],
)
def test_damaged_files(exported, tmp_path, change, message):
    rewritten(exported("llama")[1], tmp_path / "bad.pt2", change)
    with pytest.raises(SparseForgeError, match=message):
        sf.load_generator(tmp_path / "bad.pt2")


@pytest.mark.parametrize("place", ["data/weights/weight_0", "data/constants/tensor_0", "models/decode.json", "version"])
def test_a_changed_bit_is_noticed(exported, tmp_path, place):
    change = lambda name, data: bytes([data[0] ^ 1, *data[1:]]) if name.endswith(place) else data  # noqa: E731
    rewritten(exported("llama")[1], tmp_path / "bad.pt2", change, sealed=False)  # all that a zip checks is right
    for check in (sf.load_generator, sf.check_export):
        with pytest.raises(SparseForgeError, match=f"not what was written .*{place}' differs"):
            check(tmp_path / "bad.pt2")


def test_a_bit_that_flips_on_the_disk_is_noticed(exported, tmp_path):
    path = exported("llama")[1]
    with zipfile.ZipFile(path) as archive:
        weight = archive.read("archive/data/weights/weight_0")
    data = bytearray(path.read_bytes())
    data[data.index(weight) + len(weight) // 2] ^= 4
    (tmp_path / "bad.pt2").write_bytes(data)
    with pytest.raises(SparseForgeError, match="it is damaged"):
        sf.load_generator(tmp_path / "bad.pt2")


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def with_pickle(name, data):
    """The description of weights, one of which is to be unpickled."""
    if not name.endswith("prefill_weights_config.json"):
        return data
    content = json.loads(data)
    next(iter(content["config"].values())).update(use_pickle=True)
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    ("change", "place", "message"),
    [
        (same, "data/weights/prefill.pt", "something else than tensors"),
        (same, "data/constants/opaque_obj_0", "something else than tensors"),
        (lambda n, d: None if n.endswith("prefill.pt") else d, "data/sample_inputs/prefill.pt", "has a pickle in it"),
        (lambda n, d: None if n.endswith("weight_0") else with_pickle(n, d), "data/weights/weight_0", "something else"),
        (same, "data/aotinductor/model/model.so", "compiled code"),
    ],
)
def test_nothing_is_unpickled_or_run(exported, tmp_path, change, place, message):
    evil = io.BytesIO()
    torch.save(Evil(tmp_path / "ran"), evil)
    rewritten(exported("llama")[1], tmp_path / "bad.pt2", change, {place: evil.getvalue()})
    with pytest.raises(SparseForgeError, match=message):
        sf.load_generator(tmp_path / "bad.pt2")
    assert not (tmp_path / "ran").exists()


def test_nothing_inflates(exported, tmp_path):
    path = tmp_path / "bad.pt2"
    rewritten(exported("llama")[1], path, lambda name, data: None if name.endswith(SPEC_FILE) else data)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"archive/extra/{SPEC_FILE}", b" " * (300 << 20))
    tracemalloc.start()
    with pytest.raises(SparseForgeError, match="not one that torch writes"):
        sf.load_generator(path)
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


def test_truncated_and_absent_files(exported, tmp_path):
    shutil.copy(exported("llama")[1], tmp_path / "bad.pt2")
    data = (tmp_path / "bad.pt2").read_bytes()
    (tmp_path / "bad.pt2").write_bytes(data[: len(data) // 2])
    with pytest.raises(SparseForgeError, match="damaged"):
        sf.load_generator(tmp_path / "bad.pt2")
    with pytest.raises(SparseForgeError, match="is not there"):
        sf.load_generator(tmp_path / "none.pt2")


def test_without_a_tokenizer(exported, tmp_path):
    rewritten(exported("llama")[1], tmp_path / "g.pt2", lambda n, data: None if "/extra/tokenizer" in n else data)
    with pytest.raises(SparseForgeError, match="no tokenizer"):
        sf.load_generator(tmp_path / "g.pt2").text("a b")
