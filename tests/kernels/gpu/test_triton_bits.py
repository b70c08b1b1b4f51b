"""The byte permutes and masks of the device code, emulated in NumPy, against what a group of four means."""

import itertools

import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from sparseforge_fx.kernels.gpu import words

PATTERNS = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (3, 2)]  # places of the pair as stored: the last one is swapped


def prmt(a, b, selector):
    """PTX prmt.b32 in its default mode: four nibbles choose bytes; bit 3 of a nibble copies the byte's sign instead."""
    source = [(a >> 8 * i) & 255 for i in range(4)] + [(b >> 8 * i) & 255 for i in range(4)]
    result = 0
    for n in range(4):
        nibble = (selector >> 4 * n) & 15
        byte = source[nibble & 7]
        if nibble & 8:
            byte = 255 if byte & 128 else 0
        result |= byte << 8 * n
    return result


def meta_word(patterns):
    word = 0
    for plane, (first, second) in enumerate(patterns):
        shift = 16 * (plane // 4) + 2 * (plane % 4)
        word |= first << shift | second << (shift + 8)
    return word


def factor(constant):
    return int(constant.value)


def place_bits(meta):
    full = (1 << 32) - 1
    right, left7 = meta >> 1, (meta << 7) & full
    empty1 = right & ~((meta << 8) ^ left7)
    full3 = left7 | (meta & right)
    even, odd = factor(words.BYTES_02), factor(words.BYTES_13) & full
    return (meta & even) | (empty1 & odd), ((meta >> 8) & even) | (~full3 & odd)


def words_of_patterns():
    rng = np.random.default_rng(0)
    neighbours = list(itertools.product(PATTERNS, repeat=2))  # every pair of planes that share a shift
    for left, right in neighbours:
        chosen = [PATTERNS[i] for i in rng.integers(0, 6, 8)]
        for plane in range(8):
            yield [left if p == plane else right if p == plane ^ 1 else c for p, c in enumerate(chosen)]


def test_the_selectors_expand_every_pattern_in_every_plane():
    rng = np.random.default_rng(1)
    for patterns in words_of_patterns():
        low, high = place_bits(meta_word(patterns))
        for plane, (first, second) in enumerate(patterns):
            v = [int(i) for i in rng.integers(0, 1 << 16, 2)]
            pair = v[0] | v[1] << 16
            shift, skip = 16 * (plane // 4) + 4 * ((plane % 4) // 2), 2 * (plane % 2)
            mask = 0x0101 << skip
            pick_low = ((low >> shift) & mask) * (factor(words.LOW_FACTOR) >> skip) + factor(words.LOW_BASE)
            pick_high = ((high >> shift) & mask) * (factor(words.HIGH_FACTOR) >> skip) + factor(words.HIGH_BASE)
            left, right = prmt(pair, 0, pick_low), prmt(pair, 0, pick_high)
            expected = [0, 0, 0, 0]
            expected[first], expected[second] = v
            assert [left & 0xFFFF, left >> 16, right & 0xFFFF, right >> 16] == expected


def test_the_selector_finds_both_inputs_of_every_pattern_in_every_plane():
    rng = np.random.default_rng(2)
    for patterns in words_of_patterns():
        meta = meta_word(patterns)
        for plane, (first, second) in enumerate(patterns):
            x = [int(i) for i in rng.integers(0, 1 << 16, 4)]
            shift = 16 * (plane // 4) + 2 * (plane % 4) - 1
            fields = (meta >> shift if shift >= 0 else meta << 1) & 0x0606
            selector = fields * factor(words.SELECT_FACTOR) + factor(words.SELECT_BASE)
            chosen = prmt(x[0] | x[1] << 16, x[2] | x[3] << 16, selector)
            assert (chosen & 0xFFFF, chosen >> 16) == (x[first], x[second])
