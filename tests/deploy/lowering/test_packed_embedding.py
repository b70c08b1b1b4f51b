"""An embedding and a head over one packed weight: exact rows, one copy of it everywhere, files that lie."""

import copy
import json
import shutil

import pytest
import torch
from packed_models import GREEDY, IDS, edit_json
from tiny_checkpoint import byte_tokenizer, tiny_llama
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, Gemma3ForCausalLM, Gemma3TextConfig

import sparseforge_fx as sf
from sparseforge_fx.deploy.checkpoints.packed_header import Header
from sparseforge_fx.deploy.lowering.packed_embedding import PackedEmbedding, TiedHead, packed_embeddings
from sparseforge_fx.deploy.lowering.sparse_modules import packed_weights
from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.formats import parse_format
from sparseforge_fx.kernels.packed import pack_codes
from sparseforge_fx.kernels.rows import rows_dense, rows_taken
from sparseforge_fx.methods.rounding import round_weight

EMBEDDING, HEAD, UP = "model.embed_tokens", "lm_head", "model.layers.0.mlp.up_proj"


def tied_model(values="int8", dtype=torch.float32, **size):
    torch.manual_seed(0)
    model = tiny_llama(initializer_range=0.2, **size).to(dtype).eval()
    sf.quantize(model, values, include="*")
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tied") / "packed"
    sf.save_packed(tied_model(), byte_tokenizer(), path)
    return path


@pytest.mark.parametrize("form", ["int8", "int4", "int4/128", "int4/16"])
@pytest.mark.parametrize(("rows", "width"), [(5, 128), (37, 384), (1, 128)])
def test_rows_are_those_of_the_whole_weight(form, rows, width):
    form = parse_format(form)
    packed = pack_codes(*round_weight(torch.randn(rows, width), form), form)
    for shape in ((), (0,), (7,), (2, 3)):
        ids = torch.randint(rows, shape)
        got = rows_taken(ids, packed.values, width, packed.scales)
        assert torch.equal(got, rows_dense(*packed)[ids]) and got.shape == (*shape, width)


def test_an_odd_width():
    packed = pack_codes(*round_weight(torch.randn(9, 13), parse_format("int8")), parse_format("int8"))
    assert torch.equal(rows_taken(torch.arange(9), packed.values, 13, packed.scales), rows_dense(*packed))


@pytest.mark.parametrize("wrong", [-1, 260])
def test_a_token_that_is_none_is_refused(wrong):
    with pytest.raises((IndexError, RuntimeError)):
        tied_model().model.embed_tokens(torch.tensor([wrong]))


@pytest.mark.parametrize("values", ["int8", "int4", "int4/16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_computes_what_the_dense_weight_does(values, dtype):
    model = tied_model(values, dtype)
    table, head = model.model.embed_tokens, model.lm_head
    assert isinstance(table, PackedEmbedding) and isinstance(head, TiedHead) and packed_embeddings(model) == {EMBEDDING: HEAD}
    assert table(IDS).dtype == dtype and torch.equal(table(IDS), table.weight[IDS]) and head.weight.dtype == dtype
    assert model.get_input_embeddings() is table and model.get_output_embeddings() is head
    assert (table.num_embeddings, table.embedding_dim) == (head.out_features, head.in_features) == (260, 32)


def test_there_is_one_copy_wherever_the_model_goes(tmp_path):
    model = tied_model()
    names = {n for n in model.state_dict() if n.startswith((EMBEDDING, HEAD))}
    assert names == {f"{EMBEDDING}.weight_{leaf}" for leaf in ("values", "bitmask", "scales")}
    with torch.no_grad():
        want = model(IDS).logits
        for other in (copy.deepcopy(model), copy.deepcopy(model).to("cpu"), copy.deepcopy(model).double().float()):
            assert other.lm_head.table is other.model.embed_tokens and torch.equal(other(IDS).logits, want)
        half = copy.deepcopy(model).to(torch.bfloat16)
        assert (
            half.lm_head.weight.dtype == torch.bfloat16 and half.model.embed_tokens.weight_scales.dtype == torch.float32
        )
        torch.save(model, tmp_path / "model.pt")
        again = torch.load(tmp_path / "model.pt", weights_only=False)
        assert again.lm_head.table is again.model.embed_tokens and torch.equal(again(IDS).logits, want)


def test_the_file_holds_it_once(folder):
    entry = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert entry["embeddings"] == {EMBEDDING: HEAD} and entry["format_version"] == 5 and HEAD not in entry["modules"]
    model, _ = sf.load(folder)
    assert (
        packed_embeddings(model) == {EMBEDDING: HEAD} and sum(m.experts is None for m in packed_weights(model).values()) == 15
    )
    assert Header.from_json(Header.from_json(entry).to_json()) == Header.from_json(entry)


@pytest.mark.parametrize("values", ["int8", "int4", "int4/16"])
def test_an_embedding_of_its_own(tmp_path, values):
    torch.manual_seed(0)
    model = tiny_llama(initializer_range=0.2, tie_word_embeddings=False, max_position_embeddings=64).eval()
    weight = model.model.embed_tokens.weight.detach().clone()
    assert EMBEDDING not in {s["name"] for s in sf.quantize(copy.deepcopy(model), values)["sites"]}
    by_plan = sf.quantize(copy.deepcopy(model), plan={f"{EMBEDDING}.weight": values})
    assert [s["name"] for s in by_plan["sites"]] == [EMBEDDING] and by_plan["dense_bytes"] == weight.nbytes
    report = sf.quantize(model, values, torch.arange(96).view(4, 24), include="*")
    formats = {s["name"]: s["format"] for s in report["sites"]}
    assert {formats[EMBEDDING], formats[HEAD]} == {str(parse_format(values))} and len(formats) == 16
    assert packed_embeddings(model) == {EMBEDDING: None} and not model.config.tie_word_embeddings
    assert (model.model.embed_tokens.weight - weight).norm() < 0.2 * weight.norm()
    sf.save_packed(model, None, tmp_path / "packed")
    loaded, _ = sf.load(tmp_path / "packed")
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    sf.export_generator(loaded, tmp_path / "g.pt2")
    text = sf.load_generator(tmp_path / "g.pt2").generate(IDS, max_new_tokens=8)
    assert torch.equal(torch.as_tensor(text), loaded.generate(IDS, **GREEDY))
    rows = loaded.model.embed_tokens.weight
    loaded.dequantize()
    assert type(loaded.model.embed_tokens) is nn.Embedding and torch.equal(loaded.model.embed_tokens.weight, rows)


def test_what_is_no_format_of_an_embedding_is_refused():
    model = tiny_llama(tie_word_embeddings=False)
    for form in ("2:4", "2:4 int8"):
        with pytest.raises(SparseForgeError, match=f"embed_tokens.weight {form}.*in {form} it is no embedding's"):
            sf.quantize(model, plan={f"{EMBEDDING}.weight": form, f"{HEAD}.weight": "int8"})
    report = sf.quantize(model, "int8", include="*", exclude=EMBEDDING)
    assert {"name": EMBEDDING, "reason": "excluded by name"} in report["skipped"]
    assert type(model.model.embed_tokens) is nn.Embedding and EMBEDDING not in {s["name"] for s in report["sites"]}


def test_a_model_that_has_no_table_to_tell_of(monkeypatch):
    def none(_):
        raise NotImplementedError("not auto-handled")

    model = tiny_llama(tie_word_embeddings=False)
    monkeypatch.setattr(type(model), "get_input_embeddings", none)
    assert EMBEDDING not in {s["name"] for s in sf.quantize(model, "int8", include="*")["sites"]}


def test_dense_false_leaves_it():
    for tied in (True, False):
        model = tiny_llama(tie_word_embeddings=tied)
        model.model.layers[0].mlp.up_proj.weight.data[:, ::2] = 0
        report = sf.quantize(model, "int8", dense=False, include="*")
        assert [s["name"] for s in report["sites"]] == [UP] and type(model.model.embed_tokens) is nn.Embedding


@pytest.mark.parametrize("backend", ["inductor", "sparseforge"])
def test_it_compiles(backend):
    model = tied_model()
    with torch.no_grad():
        want = model(IDS).logits
        got = torch.compile(model, backend=backend)(IDS).logits
        rows = torch.compile(model.model.embed_tokens, backend=backend, fullgraph=True)(IDS)
    assert torch.equal(rows, model.model.embed_tokens(IDS))
    assert (got - want).norm() < 0.01 * want.norm()  # linears round their inputs to 8 bits: one may fall the other way


def test_a_class_without_the_head(folder):
    model, _ = sf.load(folder)
    with torch.no_grad():
        want = model.model(IDS).last_hidden_state
        inner = AutoModel.from_pretrained(folder)
        assert isinstance(inner.embed_tokens, PackedEmbedding) and torch.equal(inner(IDS).last_hidden_state, want)
        other = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, pad_token_id=0)
        assert torch.equal(other.model(IDS).last_hidden_state, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gemma_scales_its_rows(tmp_path, dtype):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16}
    config = Gemma3TextConfig(vocab_size=97, num_key_value_heads=1, max_position_embeddings=64, **sizes)
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(config).to(dtype).eval()
    report = sf.quantize(model, "int8", include="*")
    assert "lm_head and model.embed_tokens stay one weight, in dense int8" in report["notes"]
    scale = torch.tensor(32**0.5).to(dtype)
    assert torch.equal(model.model.embed_tokens(IDS), model.model.embed_tokens.weight[IDS] * scale)
    sf.save_packed(model, None, tmp_path / "packed")
    loaded, _ = sf.load(tmp_path / "packed")
    with torch.no_grad():
        assert torch.equal(loaded.model.embed_tokens(IDS), model.model.embed_tokens(IDS))
        # its rotary tables are cast with a model, and not with one that is loaded so
        assert dtype != torch.float32 or torch.equal(loaded(IDS).logits, model(IDS).logits)
    sf.export_generator(loaded, tmp_path / "g.pt2")
    text = sf.load_generator(tmp_path / "g.pt2").generate(IDS, max_new_tokens=8)
    assert dtype != torch.float32 or torch.equal(torch.as_tensor(text), loaded.generate(IDS, **GREEDY))
    assert type(loaded.dequantize().model.embed_tokens).__name__ == "Gemma3TextScaledWordEmbedding"


def test_a_bias_and_a_training_flag_stay():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(40, 32, padding_idx=3), nn.Linear(32, 40)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.table(ids).tanh())

    torch.manual_seed(0)
    model, ids = Model(), torch.arange(40)[None]
    dense = copy.deepcopy(model)
    sf.quantize(model, "int8", include="*")
    assert model.head.bias is not None and model.table.training and model.table.padding_idx == 3
    assert list(dict(model.named_parameters())) == ["head.bias"]
    assert (model(ids) - dense(ids)).norm() < 0.03 * dense(ids).norm()
    model(ids).sum().backward()
    assert model.head.bias.grad is not None


@pytest.mark.parametrize("values", ["int8", "int4"])
@pytest.mark.parametrize("format", ["pt2", "aoti"])
def test_exports(tmp_path, values, format):
    sf.save_packed(tied_model(values, max_position_embeddings=64), None, tmp_path / "packed")
    model, _ = sf.load(tmp_path / "packed")
    sf.export_generator(model, tmp_path / "g.pt2", format=format)
    text = sf.load_generator(tmp_path / "g.pt2").generate(IDS, max_new_tokens=8)
    assert torch.equal(torch.as_tensor(text), model.generate(IDS, **GREEDY))
    if format == "pt2":
        sf.export(model, tmp_path / "m.pt2", {"input_ids": IDS}, portable=True)
        ops = {str(n.target) for n in torch.export.load(tmp_path / "m.pt2").graph.nodes}
        assert not any("sparseforge" in op for op in ops)


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda h: h.update(embeddings={}), "'embeddings' names none"), (lambda h: h.update(embeddings=["a"]), "names none"),
     (lambda h: h.update(embeddings={"nowhere": HEAD}), "has the embedding 'nowhere' in no format of one"),
     (lambda h: h.update(embeddings={EMBEDDING: 7}), "ties 7 to 'model.embed_tokens', which cannot be"),
     (lambda h: h.update(embeddings={EMBEDDING: HEAD, UP: HEAD}), "ties 'lm_head' to .* which cannot be"),
     (lambda h: h.update(embeddings={EMBEDDING: UP}), "ties '.*up_proj' to .* which cannot be"),
     (lambda h: h["modules"][EMBEDDING].update(format="2:4 int8"), "the embedding 'model.embed_tokens' in no format of one"),
     (lambda h: h.update(format_version=4), "unknown entry 'embeddings'"), (lambda h: h.pop("embeddings"), "names none"),
     (lambda h: h.update(embeddings={EMBEDDING: "nowhere"}), "'nowhere' is not in this model"),
     (lambda h: h.update(embeddings={EMBEDDING: "model.norm"}), "ties 'model.norm' to .* whose weight does not fit it"),
     (lambda h: h.update(embeddings={EMBEDDING: None}), "tensor 'lm_head.weight' of the model is missing"),
     (lambda h: h.update(embeddings={UP: HEAD}), "'model.embed_tokens' is a Embedding in this model, no linear"),
     (lambda h: h.update(embeddings={EMBEDDING: HEAD, UP: None}), "up_proj' is a Linear in this model, no embedding"),
     (lambda h: h["modules"][EMBEDDING].update(shape=[260, 64]), "the header wants")],
)  # fmt: skip
def test_headers_that_lie(folder, tmp_path, change, message):
    shutil.copytree(folder, tmp_path / "f")
    edit_json(tmp_path / "f" / "config.json", lambda config: change(config["quantization_config"]))
    with pytest.raises(SparseForgeError, match=message):
        sf.load(tmp_path / "f")


def test_peft_cannot_train_a_copy_of_it():
    peft = pytest.importorskip("peft")
    for name in ("lm_head", "embed_tokens"):
        config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=[name])
        with pytest.raises(SparseForgeError, match=f"modules_to_save has '.*{name}', which is packed in dense int8"):
            peft.get_peft_model(tied_model(), config)
    adapted = peft.get_peft_model(tied_model(), peft.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    assert not any("lm_head" in n or "embed" in n for n, p in adapted.named_parameters() if p.requires_grad)


def test_dequantised_is_tied_as_before():
    model = tied_model()
    head = model.lm_head.weight
    model.dequantize()
    assert type(model.lm_head) is nn.Linear and type(model.model.embed_tokens) is nn.Embedding
    assert model.lm_head.weight is model.model.embed_tokens.weight and torch.equal(model.lm_head.weight, head)
    assert model.config.tie_word_embeddings and model.all_tied_weights_keys == {f"{HEAD}.weight": f"{EMBEDDING}.weight"}
    sf.quantize(model, "int8", include="*")
    assert torch.equal(model.lm_head.weight, head)
