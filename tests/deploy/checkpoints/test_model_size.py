"""check_size: a configuration may not ask for more modules than there are, whatever its entry for that is called."""

import threading

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel

from sparseforge_fx.deploy.checkpoints.model_size import at_most, check_size
from sparseforge_fx.errors import SparseForgeError

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "vocab_size": 20}
ENTRIES = {  # a model, and what makes it large
    "gpt2": ({"n_embd": 16, "n_head": 2, "n_layer": 1, "vocab_size": 20}, {"n_layer": 10**7}),
    "llama": ({**SMALL, "num_hidden_layers": 1, "intermediate_size": 16}, {"num_hidden_layers": 10**7}),
    "t5": ({"d_model": 16, "num_layers": 1, "vocab_size": 20}, {"num_decoder_layers": 10**7}),
    "bart": ({"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 20}, {"encoder_layers": 10**7}),
    "swin": ({"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "image_size": 32}, {"depths": [1, 10**6]}),
    "clip": ({"text_config": SMALL, "vision_config": {}}, {"vision_config": {"num_hidden_layers": 10**7}}),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_more_modules_than_there_may_be(name):
    small, large = ENTRIES[name]
    config = AutoConfig.for_model(name, **small)
    with torch.device("meta"):
        modules = sum(1 for _ in AutoModel.from_config(config).modules())
    before = config.to_dict()
    check_size(config, modules)
    with pytest.raises(SparseForgeError, match=f"more than {modules - 2} modules"):
        check_size(config, modules - 2)
    assert config.to_dict() == before
    with pytest.raises(SparseForgeError, match=f"more than {modules} modules"):
        check_size(AutoConfig.for_model(name, **{**small, **large}), modules)


def test_what_config_json_says_of_its_class_does_not_help():
    for architectures in (["BertForMaskedLM"], ["Trainer"], ["Unknown"], [], [7]):
        config = AutoConfig.for_model("gpt2", n_layer=10**7)
        config.architectures = architectures
        with pytest.raises(SparseForgeError, match="more than 50 modules"):
            check_size(config, 50)


def test_a_class_that_the_automatic_ones_do_not_know():
    class Config(transformers.PreTrainedConfig):
        model_type = "of_a_stranger"

    check_size(Config(), 5)  # the loader says so


def test_only_what_is_built_inside_and_in_this_thread_counts():
    def build():
        made.append(nn.Sequential(*(nn.ReLU() for _ in range(20))))

    made = []
    with at_most(10):
        thread = threading.Thread(target=build)
        thread.start()
        thread.join()
        assert len(made) == 1
        with pytest.raises(SparseForgeError, match="more than 10 modules"):
            build()
    build()
    assert len(made) == 2
