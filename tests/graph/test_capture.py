"""Any module, any form of inputs; what cannot be captured is explained by the line that is in the way."""

import inspect
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers
from rounding import same_products
from torch import nn
from transformers import AutoConfig

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.graph.capture import as_call, capture, make_example_inputs
from sparseforge_fx.passes import find_linears

SIZE = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def llama(**settings):
    config = AutoConfig.for_model("llama", **SIZE | settings)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


class Affine(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x, *more, scale=1.0, shift=None):
        y = sum((self.linear(m) for m in more), self.linear(x)) * scale
        return y if shift is None else y + shift


A, B, C = torch.randn(2, 3, 8), torch.randn(2, 3, 8), torch.randn(2, 3, 8)


@pytest.mark.parametrize(
    "inputs",
    [A, (A,), [A, B], (A, B, C), {"x": A}, {"x": A, "scale": B}, {"shift": B, "x": A}, {"x": A, "shift": None}],
)
def test_every_form_of_inputs(inputs):
    model = Affine()
    program = capture(model, inputs)
    args, kwargs = as_call(inputs)
    assert torch.equal(program.module()(*args, **kwargs), model(*args, **kwargs))
    assert program.notes == ()
    stretch = [torch.randn(4, 5, 8) if isinstance(a, torch.Tensor) else a for a in (*args, *kwargs.values())]
    args, kwargs = stretch[: len(args)], dict(zip(kwargs, stretch[len(args) :], strict=True))
    assert torch.equal(program.module()(*args, **kwargs), model(*args, **kwargs)), "batch and sequence are dynamic"


def test_fixed_sizes_give_the_same_graph_without_notes():
    model = llama()
    free, fixed = capture(model), capture(model, dynamic=False)
    weights = [[s.fqn for s in find_linears(p)] for p in (free, fixed)]
    assert weights[0] == weights[1] and len(weights[0]) > 7 and fixed.notes == ()
    ids = make_example_inputs(model)
    assert torch.equal(fixed.module()(**ids).logits, free.module()(**ids).logits)
    with pytest.raises(RuntimeError, match="to be equal to 12, but got 5"):
        fixed.module()(input_ids=ids["input_ids"][:, :5])


def test_nested_inputs_and_outputs():
    class Nested(nn.Module):
        def forward(self, batch):
            return {"sum": batch["x"] + batch["pair"][0], "pair": batch["pair"]}

    batch = {"x": A, "pair": (B, C)}
    out = capture(Nested(), (batch,)).module()(batch)
    assert torch.equal(out["sum"], A + B) and torch.equal(out["pair"][1], C)


def test_training_the_graph_trains_the_model():
    model = Affine()
    module = capture(model, A).module()
    assert {id(p) for p in module.parameters()} == {id(p) for p in model.parameters()}
    before = model(A).detach()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(A).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model(A), before) and torch.equal(model(A), module(A))


def test_the_callers_grad_mode_does_not_enter_the_graph():
    class PartlyFrozen(Affine):
        def forward(self, x):
            with torch.no_grad():
                x = torch.sin(self.linear(x))
            return self.linear(x)

    model = PartlyFrozen()
    with torch.no_grad():
        module = capture(model, A).module()
    got, expected = (torch.autograd.grad(m(A).square().sum(), model.linear.weight) for m in (module, model))
    assert same_products(got[0], expected[0])


class TestHuggingFace:
    def test_a_causal_model_without_inputs(self):
        model = llama()
        program = capture(model)
        assert program.notes == ()
        module = program.module()
        for shape in ((2, 12), (1, 7), (3, 1), (1, 1), (4, 64)):
            ids = torch.randint(0, 64, shape)
            out = module(input_ids=ids)
            assert type(out) is type(model(ids)) and same_products(out.logits, model(ids).logits), shape
            assert out.past_key_values is None

    def test_padding_masks_stay_dynamic(self):
        model = llama()
        inputs = make_example_inputs(model) | {"attention_mask": torch.ones(2, 12, dtype=torch.long)}
        module = capture(model, inputs).module()
        ids, mask = torch.randint(0, 64, (3, 9)), torch.ones(3, 9, dtype=torch.long)
        mask[0, :4] = 0
        out = module(input_ids=ids, attention_mask=mask).logits
        assert same_products(out, model(input_ids=ids, attention_mask=mask).logits)

    def test_modes_and_settings_come_back(self):
        model = llama(attention_dropout=0.5).train()
        model.model.norm.eval()
        assert model.config.use_cache
        modes = {n: m.training for n, m in model.named_modules()}
        capture(model)
        assert {n: m.training for n, m in model.named_modules()} == modes and model.config.use_cache
        with pytest.raises(SparseForgeError):
            capture(model, {"input_ids": "text"})
        assert {n: m.training for n, m in model.named_modules()} == modes and model.config.use_cache

    def test_a_meta_model_is_captured_without_its_weights(self):
        with torch.device("meta"):
            model = llama(tie_word_embeddings=True)
        program = capture(model)
        assert program.op_counts()["aten.linear.default"] == 8
        assert program.tensor("lm_head.weight") is model.model.embed_tokens.weight

    def test_example_inputs_come_from_the_config(self):
        model = llama(max_position_embeddings=8)
        ids = make_example_inputs(model)["input_ids"]
        assert ids.shape == (2, 8) and ids.max() < 64
        vision = transformers.ViTModel(transformers.ViTConfig(**SIZE, image_size=(16, 8), patch_size=8)).bfloat16()
        (pixels,) = make_example_inputs(vision).values()
        assert pixels.shape == (2, 3, 16, 8) and pixels.dtype == torch.bfloat16
        config = transformers.T5Config(vocab_size=64, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
        inputs = make_example_inputs(transformers.T5ForConditionalGeneration(config), batch=3, length=5)
        assert {k: tuple(v.shape) for k, v in inputs.items()} == {"input_ids": (3, 5), "decoder_input_ids": (3, 4)}

    def test_the_random_state_is_left_alone(self):
        model = llama()
        state = torch.get_rng_state()
        capture(model)
        assert torch.equal(torch.get_rng_state(), state)
        first, second = (make_example_inputs(model)["input_ids"] for _ in range(2))
        assert torch.equal(first, second)

    def test_a_model_with_other_inputs_asks_for_them(self):
        model = llama()
        model.main_input_name = "input_features"
        with pytest.raises(
            SparseForgeError, match=r"no rule .* LlamaForCausalLM .*'input_features'.* pass example_inputs"
        ):
            capture(model)


class Recurrent(nn.Module):
    """Unrolls over time."""

    def __init__(self):
        super().__init__()
        self.emb, self.cell = nn.Embedding(16, 8), nn.Linear(8, 8)

    def forward(self, ids):
        h = torch.zeros(ids.shape[0], 8)
        for t in range(ids.shape[1]):
            h = torch.tanh(self.cell(h) + self.emb(ids[:, t]))
        return h


class NeedsInts(nn.Module):
    """Refuses symbolic sizes in these dimensions."""

    def __init__(self, *dims):
        super().__init__()
        self.linear, self.dims = nn.Linear(8, 8), dims

    def forward(self, x):
        for d in self.dims:
            if type(x.shape[d]) is not int:
                raise TypeError(f"dimension {d} must be an int")
        return self.linear(x)


class TestFixedDimensions:
    def test_unrolling_over_time_fixes_the_sequence_and_says_so(self):
        model, ids = Recurrent(), torch.randint(0, 16, (2, 5))
        program = capture(model, ids)
        assert program.notes == ("the sequence dimension of ids is fixed at 5 by the model",)
        module = program.module()
        other_batch = torch.randint(0, 16, (4, 5))
        assert same_products(module(other_batch), model(other_batch))
        with pytest.raises((RuntimeError, AssertionError), match=r"equal to 5, but got 6|size\(\)\[1\] == 5"):
            module(torch.randint(0, 16, (2, 6)))

    def test_what_needs_an_int_gets_one_and_it_is_noted(self):
        model = NeedsInts(1)
        program = capture(model, A)
        wanted = "the sequence dimension had to be fixed at the example's size (dimension 1 must be an int)"
        assert program.notes == (wanted,)
        x = torch.randn(5, 3, 8)
        assert same_products(program.module()(x), model(x)), "the batch stays dynamic"

    def test_both_dimensions_fixed(self):
        model = NeedsInts(0, 1)
        program = capture(model, A)
        wanted = "batch and sequence dimensions had to be fixed at the example's size (dimension 0 must be an int)"
        assert program.notes == (wanted,)
        assert torch.equal(program.module()(A), model(A))

    def test_a_batch_that_the_model_fixes_is_noted(self):
        class Tiled(nn.Module):
            def forward(self, x):
                return x + torch.ones(2, 1, 8)

        assert capture(Tiled(), A).notes == ("the batch dimension of x is fixed at 2 by the model",)

    def test_one_row_in_the_example_does_not_fix_the_batch(self, tiny):
        model = tiny("llama").model
        ids = tiny("llama").batch()["input_ids"]
        for example in ({"input_ids": ids[:1]}, {"input_ids": ids[:1, :1], "attention_mask": torch.ones(1, 1).long()}):
            program = capture(model, example)
            assert program.notes == ()
            more = {n: torch.ones_like(ids) if n != "input_ids" else ids for n in example}
            torch.testing.assert_close(program.module()(**more).logits, model(input_ids=ids).logits)

    def test_a_model_that_takes_one_row_alone(self):
        class One(nn.Module):
            def forward(self, x):
                return x + x.reshape(1, 8)

        program = capture(One(), A[:1, 0])
        assert program.notes == ("the batch dimension of x is fixed at 1 by the example, where it is single",)

    def test_a_size_that_the_model_fixes_is_the_examples_own(self):
        class Counted(nn.Module):
            def forward(self, x):
                return x + torch.ones(int(x.shape[0]), 3, 8)

        program = capture(Counted(), A[:1])
        assert program.notes == ("the batch dimension of x is fixed at 1 by the example, where it is single",)
        assert torch.equal(program.module()(A[:1]), A[:1] + 1)

    def test_every_dimension_of_ids_is_free(self):
        class Choices(nn.Module):
            def __init__(self):
                super().__init__()
                self.table = nn.Embedding(9, 4)

            def forward(self, ids):
                return self.table(ids).sum(-2)

        model = Choices()
        program = capture(model, torch.ones(2, 3, 5).long())
        ids = torch.arange(4 * 2 * 7).view(4, 2, 7) % 9
        torch.testing.assert_close(program.module()(ids), model(ids))


class Open(nn.Module):
    """Takes its inputs by whatever names, as wrappers do."""

    def __init__(self, inner=None):
        super().__init__()
        self.linear, self.inner = nn.Linear(8, 8), inner

    def forward(self, *args, **kwargs):
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        return self.linear(args[0] if args else kwargs["x"]) + kwargs["y"]


class TestWrappers:
    def test_keyword_containers_keep_their_sizes_free(self):
        model = Open()
        program = capture(model, {"x": A, "y": B})
        assert program.notes == () and "forward" not in model.__dict__
        for x, y in ((A, B), (A.repeat(2, 1, 1), B.repeat(2, 1, 1))):
            torch.testing.assert_close(program.module()(x=x, y=y), model(x=x, y=y))

    def test_compiled_models_are_captured_as_they_were_written(self, tiny):
        found = tiny("llama")
        names = {s.fqn for s in find_linears(found.program)}
        compiled = torch.compile(found.model, backend="eager")
        parts = Open(torch.compile(nn.Linear(8, 8), backend="eager"))
        assert {s.fqn for s in find_linears(capture(compiled, found.example))} == names
        assert capture(compiled).source is found.model
        program = capture(parts, A)
        assert program.notes == () and program.op_counts()["aten.linear.default"] == 1
        torch.testing.assert_close(program.module()(A.repeat(2, 1, 1)), parts(A.repeat(2, 1, 1)))

    def test_data_parallel_models(self):
        model = nn.Linear(8, 8)
        assert capture(nn.DataParallel(model), A).source is model


def test_what_only_the_first_call_of_a_model_makes():
    """torch.export would fail at it; the sizes stay free all the same."""

    class Late(nn.Module):
        def forward(self, x):
            if not hasattr(self, "table"):
                if x.sum() > 1e9:  # a value, which a trace does not have
                    raise ValueError
                self.table = [1.0] * 8
            return x + torch.tensor(self.table)

    model = Late()
    program = capture(model, A)
    assert program.notes == ()
    assert torch.equal(program.module()(A.repeat(2, 1, 1)), A.repeat(2, 1, 1) + 1)


def test_sizes_that_are_not_known_yet():
    model = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 8))
    with pytest.raises(SparseForgeError, match=r"0\.weight of Sequential has no size yet: call the model once"):
        capture(model, A)


def test_inference_tensors():
    with torch.inference_mode():
        made, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.BatchNorm1d(3)), A.clone()
        made[1].weight = made[0].weight
        made[0].bias.requires_grad_(False)
    values = {n: v.clone() for n, v in made.state_dict().items()}
    program = capture(made, A)
    assert not any(t.is_inference() for t in (*made.parameters(), *made.buffers()))
    assert made[0].weight is made[1].weight and not made[0].bias.requires_grad and made[1].bias.requires_grad
    assert all(torch.equal(v, values[n]) for n, v in made.state_dict().items())
    program.module()(A).sum().backward()
    model = nn.Linear(8, 8)
    with torch.inference_mode():
        program = capture(model, x)
    assert program.module()(A).requires_grad


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        y = self.linear(x)
        if y.sum() > 0:  # the line to name
            y = y + 1
        return y


class Numbers(Branches):
    def forward(self, x):
        return self.linear(x)[: int(x.sum().item())]  # the line to name


class LeavesTorch(Branches):
    def forward(self, x):
        return self.linear(x) * math.sin(x.detach().numpy()[0, 0, 0])  # the line to name


class TestRefusals:
    @pytest.mark.parametrize("kind", [Branches, Numbers, LeavesTorch])
    def test_the_message_names_the_line_of_the_model(self, kind, capfd):
        lines, start = inspect.getsourcelines(kind.forward)
        line = start + next(i for i, text in enumerate(lines) if "the line to name" in text)
        model = nn.Sequential(nn.Identity(), kind())
        with pytest.raises(SparseForgeError) as caught:
            capture(model, A.clone().requires_grad_(False))
        message = str(caught.value)
        assert f"torch.export cannot take Sequential at {__file__}:{line} (" in message and "\n" not in message
        control_flow = kind is not LeavesTorch
        assert ("without Python control flow on tensor values" in message) == control_flow
        assert "rewrite that line" in message and "sf.sparsify" in message
        assert caught.value.__cause__ is not None
        assert capfd.readouterr() == ("", ""), "torch's half-traced graphs are not printed"

    def test_a_model_that_fails_by_itself_is_told_apart(self):
        class Wrong(nn.Module):
            def forward(self, x):
                return F.linear(x, torch.zeros(3, 3))

        with pytest.raises(SparseForgeError, match=r"Wrong itself fails .* at .*test_capture\.py:\d+ .*pass inputs"):
            capture(Wrong(), A)

    def test_inputs_that_do_not_fit_the_signature(self):
        with pytest.raises(SparseForgeError, match=r"do not fit Affine\.forward: missing a required argument: 'x'"):
            capture(Affine(), {"shift": A})
        with pytest.raises(SparseForgeError, match="unexpected keyword argument 'z'"):
            capture(Affine(), {"x": A, "z": A})

    def test_what_is_no_model(self):
        with pytest.raises(SparseForgeError, match=r"expected a torch\.nn\.Module, got str"):
            capture("gpt2")
        with pytest.raises(SparseForgeError, match="Affine is not a Hugging Face model: pass example_inputs"):
            capture(Affine())

    def test_failing_restores_modes(self):
        model = Branches().train()
        with pytest.raises(SparseForgeError):
            capture(model, A)
        assert model.training and model.linear.training


def test_nothing_is_printed_or_warned(capfd):
    model = llama()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        program = capture(model)
        program.copy().validate()
    assert capfd.readouterr() == ("", "")
