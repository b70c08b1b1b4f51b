"""The tokenizer of most tests of data."""

import pytest
from text_data import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()
