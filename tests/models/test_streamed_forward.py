"""A model whose weights stay on disk answers as the one in memory."""

import pytest
import torch
from tiny_checkpoint import write_checkpoint

from sparseforge_fx.errors import SparseForgeError
from sparseforge_fx.evaluation.perplexity import perplexity
from sparseforge_fx.models.dense import load_dense
from sparseforge_fx.models.shards import Shards
from sparseforge_fx.models.streamed import StreamedModel
from sparseforge_fx.models.streamed_forward import StreamedForward


def test_perplexity_is_that_of_the_model_in_memory(tmp_path):
    folder = write_checkpoint(tmp_path / "model")
    ids = torch.randint(0, 256, (200,), generator=torch.Generator().manual_seed(0))
    options = {"context": 32, "batch_size": 3}
    there, here = perplexity(load_dense(folder)[0], ids, **options), StreamedForward(StreamedModel(folder))
    found = perplexity(here, ids, **options)
    assert found.nll_per_token == pytest.approx(there.nll_per_token, rel=1e-6)
    assert found.windows == there.windows == 6
    assert here.held.cache == {}  # nothing stays behind


def test_weights_are_cast_and_ties_followed(tmp_path):
    streamed = StreamedModel(write_checkpoint(tmp_path / "model"))
    streamed.compute_in(torch.bfloat16)
    head, table = streamed.fetch("lm_head.weight"), streamed.fetch("model.embed_tokens.weight")
    assert head.dtype == torch.bfloat16
    assert torch.equal(head, table)


def test_a_checkpoint_that_lacks_a_weight_is_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "model")
    from safetensors.torch import load_file, save_file

    kept = load_file(folder / "model.safetensors")
    del kept["model.layers.1.mlp.up_proj.weight"]
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SparseForgeError, match=r"lacks 1 weights of its model, model\.layers\.1\.mlp\.up_proj"):
        StreamedModel(folder)


def test_a_tensor_is_written_in_place(tmp_path):
    files = Shards(write_checkpoint(tmp_path / "model"))
    name = "model.norm.weight"
    before = {key: files.read(key) for key in files.places}
    files.write(name, before[name] + 1)
    after = Shards(tmp_path / "model")
    assert all(torch.equal(after.read(key), before[key] + (key == name)) for key in before)
