"""Both decoders against transformers, on tiny random Llamas; sampling; blocks."""

import os
import platform
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from minigpt4.engine.kvcache import BLOCK_SIZE, BlockCache, hashes
from minigpt4.engine.native import NativeDecoder, library
from minigpt4.engine.sampling import Sampler, Sampling, penalize
from minigpt4.engine.scheduler import Rows
from minigpt4.engine.torch_decoder import TorchDecoder
from tests.block_llama import CONTEXT, HIDDEN, VOCABULARY, as_transformers, block_llama
from tests.running import python

needs_compiler = pytest.mark.skipif(library() is None, reason="no C compiler: install gcc")
ROOT = Path(__file__).parent.parent
BLOCKS = 64


@pytest.fixture(scope="module")
def llama():
    return block_llama()


@pytest.fixture(scope="module")
def reference(llama):
    return as_transformers(llama)


@pytest.fixture(params=["native", "native, 8-bit cache", "torch", "torch, 8-bit cache"])
def decoder(request, llama, reference):
    kv_bits = 8 if "8-bit" in request.param else 16
    if request.param.startswith("torch"):
        return TorchDecoder(reference, BLOCKS, kv_bits)
    if library() is None:
        pytest.skip("no C compiler: install gcc")
    return NativeDecoder(llama, CONTEXT, BLOCKS, threads=2, kv_bits=kv_bits)


def rows(tokens, positions, table_rows, tables, wanted, embeds=None) -> Rows:
    if embeds is None:
        embeds = np.zeros((0, HIDDEN), np.float32)
    arrays = (tokens, positions, table_rows, tables, wanted)
    tokens, positions, table_rows, tables, wanted = (np.array(a, np.int32) for a in arrays)
    return Rows(tokens, embeds, positions, table_rows, tables, wanted)


def whole(decoder, ids, blocks, embeds=None) -> np.ndarray:
    """Logits of all positions, in one call."""
    n = len(ids)
    return decoder.forward(rows(ids, range(n), [0] * n, [blocks], range(n), embeds))


def test_logits_are_transformers(decoder, reference):
    """With pictures' embeddings in between; the native decoder rounds what it multiplies, and keeps
    keys and values in 16 bits or 8."""
    draw = np.random.default_rng(0)
    ids = draw.integers(0, VOCABULARY, 40)
    embeds = draw.normal(size=(5, HIDDEN)).astype(np.float32)
    shown = ids.copy()
    shown[10:15] = [-1, -2, -3, -4, -5]
    with torch.inference_mode():
        inputs = reference.get_input_embeddings()(torch.from_numpy(ids))[None].clone()
        inputs[0, 10:15] = torch.from_numpy(embeds)
        expected = reference(inputs_embeds=inputs).logits[0].numpy()
    found = whole(decoder, shown, [3, 1, 2], embeds)
    if decoder.kv_bits == 8:  # of random keys: a few scores are far less exact than most
        assert ((found - expected) ** 2).mean() ** 0.5 < 0.05 * expected.std()
    elif isinstance(decoder, TorchDecoder):
        np.testing.assert_allclose(found, expected, atol=1e-4)
    else:
        assert np.abs(found - expected).max() < 0.03 * expected.std()


@needs_compiler
@pytest.mark.parametrize(
    "shape",
    [
        {"vocabulary": 333},  # no whole number of panels
        {"qwen": True},
        {"qwen": True, "tied": False, "heads": 6, "kv_heads": 2, "head_dim": 16, "vocabulary": 321},
        {"kind": "F16", "hidden": 54, "heads": 3, "head_dim": 20, "inner": 70, "vocabulary": 61},
        {"heads": 4, "head_dim": 96},
    ],
    ids=str,
)
@pytest.mark.parametrize("kv_bits", [16, 8])
def test_models_of_other_shapes(shape, kv_bits):
    """Sizes that are no whole blocks, biases, both rotary embeddings, tied or not."""
    llama = block_llama(3, **shape)
    ids = np.random.default_rng(0).integers(0, llama.vocabulary, 40)
    with torch.inference_mode():
        expected = as_transformers(llama)(torch.from_numpy(ids)[None]).logits[0].numpy()
    decoder = NativeDecoder(llama, CONTEXT, BLOCKS, threads=2, kv_bits=kv_bits)
    embeds = np.zeros((0, llama.hidden_size), np.float32)
    found = whole(decoder, ids, [3, 1, 2], embeds)
    if kv_bits == 16:
        assert np.abs(found - expected).max() < 0.01 * expected.std()
    assert ((found - expected) ** 2).mean() ** 0.5 < 0.05 * expected.std()
    single = [
        decoder.forward(rows([ids[i]], [i], [0], [[5, 4, 6]], [0], embeds)) for i in range(40)
    ]
    assert np.array_equal(np.concatenate(single), found)


@needs_compiler
@pytest.mark.parametrize(
    "change",
    [
        {"tokens": [VOCABULARY]},
        {"tokens": [-1]},  # there are no embeddings
        {"tokens": [-(2**31)]},
        {"positions": [CONTEXT]},
        {"positions": [-1]},
        {"positions": [BLOCK_SIZE]},  # the table has one block
        {"table_rows": [1]},
        {"tables": [[BLOCKS]]},
        {"tables": [[-1]]},
        {"wanted": [1]},
        {"wanted": [0, 0]},
        {"positions": [0, 1]},
        {"embeds": np.zeros((1, HIDDEN + 1), np.float32)},
    ],
    ids=str,
)
def test_rows_that_point_outside_are_refused(llama, change):
    decoder = NativeDecoder(llama, CONTEXT, BLOCKS, threads=1)
    sound = {"tokens": [1], "positions": [0], "table_rows": [0], "tables": [[0]], "wanted": [0]}
    decoder.forward(rows(**sound))
    with pytest.raises(ValueError):
        decoder.forward(rows(**sound | change))


def test_chunks_and_company_change_nothing(decoder):
    """One call, one position a call, other blocks, other conversations beside: the same logits; to
    the last bit where the decoder says so."""
    draw = np.random.default_rng(1)
    ids, others = draw.integers(0, VOCABULARY, 37), draw.integers(0, VOCABULARY, (6, 37))
    at_once = whole(decoder, ids, [0, 1, 2])
    single = np.concatenate(
        [decoder.forward(rows([ids[i]], [i], [0], [[5, 4, 6]], [0])) for i in range(37)]
    )
    tables = [[7, 8, 9], *([10 + 3 * k, 11 + 3 * k, 12 + 3 * k] for k in range(6))]
    among = [
        decoder.forward(rows([ids[i], *others[:, i]], [i] * 7, range(7), tables, range(7)))[0]
        for i in range(37)
    ]
    chunks = [
        decoder.forward(rows(ids[a:b], range(a, b), [0] * (b - a), [[40, 41, 42]], range(b - a)))
        for a, b in ((0, 16), (16, 19), (19, 37))
    ]
    for found in (single, np.array(among), np.concatenate(chunks)):
        if isinstance(decoder, NativeDecoder):
            assert np.array_equal(found, at_once)
        elif decoder.kv_bits == 8:
            assert ((found - at_once) ** 2).mean() ** 0.5 < 0.02 * at_once.std()
        else:
            np.testing.assert_allclose(found, at_once, atol=1e-4)


def test_a_copied_block_serves_as_the_first(decoder):
    ids = np.random.default_rng(2).integers(0, VOCABULARY, 20)
    expected = whole(decoder, ids, [0, 1])
    decoder.copy_block(0, 50)
    last = decoder.forward(rows(ids[16:], range(16, 20), [0] * 4, [[50, 51]], [3]))
    np.testing.assert_allclose(last[0], expected[-1], atol=1e-4)


@needs_compiler
def test_threads_do_not_change_the_result(llama):
    ids = np.random.default_rng(3).integers(0, VOCABULARY, 30)
    found = [whole(NativeDecoder(llama, CONTEXT, 4, threads), ids, [0, 1]) for threads in (1, 2, 3)]
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])


@needs_compiler
@pytest.mark.parametrize("kv_bits", [16, 8])
def test_what_is_not_a_number_stays_so(llama, kv_bits):
    """The engine ends an answer whose logits are not finite."""
    embeds = np.full((1, HIDDEN), np.nan, np.float32)
    decoder = NativeDecoder(llama, CONTEXT, 4, threads=1, kv_bits=kv_bits)
    assert np.isnan(whole(decoder, [1, -1, 2], [0], embeds)[2]).all()


@needs_compiler
def test_an_8_bit_cache_takes_half_the_memory(llama):
    sizes = [NativeDecoder(llama, CONTEXT, 4, 1, kv_bits=bits).blocks.nbytes for bits in (8, 16)]
    assert sizes == [4 * NativeDecoder.block_bytes(llama, bits) for bits in (8, 16)]
    assert sizes[0] / sizes[1] == 17 / 32


@needs_compiler
def test_the_plain_c_of_other_processors(llama, tmp_path):
    """Compiled without vector instructions, in a program of its own: the same up to rounding."""
    ids = np.random.default_rng(3).integers(0, VOCABULARY, 30)
    code = (
        "import numpy as np; from tests.test_decoder import *;"
        "ids = np.random.default_rng(3).integers(0, VOCABULARY, 30);"
        "found = [whole(NativeDecoder(block_llama(), CONTEXT, 4, 2, kv_bits=bits), ids, [0, 1])"
        " for bits in (16, 8)];"
        f"np.save({str(tmp_path / 'plain.npy')!r}, found)"
    )
    compiler = os.environ.get("CC", "cc")
    compiler = f"{compiler} -mno-avx2" if platform.machine() == "x86_64" else "cc"
    python("-c", code, CC=compiler, XDG_CACHE_HOME=str(tmp_path))
    for found, bits in zip(np.load(tmp_path / "plain.npy"), (16, 8), strict=True):
        expected = whole(NativeDecoder(llama, CONTEXT, 4, threads=2, kv_bits=bits), ids, [0, 1])
        assert np.abs(found - expected).max() < 0.02 * expected.std()


@needs_compiler
def test_more_rows_than_fit_a_call(llama):
    decoder = NativeDecoder(llama, CONTEXT, 40, threads=2)
    ids = np.random.default_rng(4).integers(0, VOCABULARY, 400)
    found = whole(decoder, ids, list(range(25)))
    again = np.concatenate(
        [
            decoder.forward(
                rows(ids[a : a + 100], range(a, a + 100), [0] * 100, [range(25)], range(100))
            )
            for a in range(0, 400, 100)
        ]
    )
    assert np.array_equal(found, again)


# --- blocks --------------------------------------------------------------------------------------


def computed(cache: BlockCache, keys: list[int]) -> list[int]:
    """A conversation that computed all of `keys`, its full blocks registered."""
    blocks = cache.match(keys)
    assert cache.reserve(-(-len(keys) // BLOCK_SIZE) - len(blocks))
    block_hashes = hashes(keys)
    for number in range(len(blocks), -(-len(keys) // BLOCK_SIZE)):
        block = cache.allocate()
        blocks.append(block)
        if (number + 1) * BLOCK_SIZE <= len(keys):
            before = block_hashes[number - 1] if number else b""
            cache.register(block, before, keys[number * BLOCK_SIZE : (number + 1) * BLOCK_SIZE])
    return blocks


def test_a_beginning_is_shared_and_another_is_not():
    cache = BlockCache(10)
    keys = list(range(100, 140))
    first = computed(cache, keys)
    assert cache.match([*keys[:32], 7, 8, 9]) == first[:2]
    assert cache.match([99, *keys[1:]]) == []
    assert cache.match([*keys[:16], 99, *keys[17:]]) == first[:1]
    # The same tokens after another beginning are another block.
    assert cache.match(keys[16:]) == []


def test_blocks_come_back_and_the_oldest_goes_first():
    cache = BlockCache(6)
    old, new = computed(cache, list(range(32))), computed(cache, list(range(50, 82)))
    cache.free(old)
    cache.free(new)
    assert cache.available == 6
    assert not cache.reserve(3, spare=4) and not cache.reserve(7) and cache.available == 6
    assert cache.reserve(3, spare=3)
    taken = [cache.allocate() for _ in range(3)]
    assert not set(taken) & set(new)  # two free blocks, then the end of the older conversation
    assert cache.match(list(range(32))) == old[:1]
    assert cache.match(list(range(50, 82))) == new


def test_what_nobody_uses_goes_before_new_memory_is_touched():
    cache = BlockCache(10, kept=4)
    first = computed(cache, list(range(48)))
    cache.free(first)
    used = {*first, *computed(cache, list(range(100, 148)))}
    assert len(used) == 4  # one new block, then those of the first conversation
    assert cache.available == 7
    more = computed(cache, list(range(200, 296)))  # all are in use: new ones after all
    assert len({*used, *more}) == 9 and cache.available == 1


def test_what_was_reserved_is_there():
    """Whatever requests come and go: reservations hold, no block has two owners, none is lost."""
    draw = random.Random(5)
    cache = BlockCache(40)
    held: list[tuple[list[int], list[int], int]] = []  # blocks, keys, reserved
    for _ in range(3000):
        if held and draw.random() < 0.5:
            blocks, _, reserved = held.pop(draw.randrange(len(held)))
            cache.free(blocks)
            cache.unreserve(reserved)
        else:
            keys = [draw.randrange(2) for _ in range(BLOCK_SIZE * draw.randrange(1, 5) + 3)]
            blocks = cache.match(keys)
            needed = -(-len(keys) // BLOCK_SIZE) + 2 - len(blocks)
            if not cache.reserve(needed):
                cache.free(blocks)
                continue
            for block in blocks:
                assert block in {p for p, d in cache._hashes.items()}
            block_hash = hashes(keys[: len(blocks) * BLOCK_SIZE])[-1] if blocks else b""
            owned = {p for other, *_ in held for p in other}
            for start in range(len(blocks) * BLOCK_SIZE, len(keys), BLOCK_SIZE):
                block = cache.allocate()
                needed -= 1
                assert block not in owned
                blocks.append(block)
                if start + BLOCK_SIZE <= len(keys):
                    block_hash = cache.register(block, block_hash, keys[start : start + BLOCK_SIZE])
            held.append((blocks, keys, needed))
    for blocks, _, reserved in held:
        cache.free(blocks)
        cache.unreserve(reserved)
    assert cache.available == 40


# --- sampling -----------------------------------------------------------------------------------


def distribution(logits: np.ndarray, s: Sampling) -> np.ndarray:
    """The textbook's way: sort everything, cut, renormalise."""
    order = np.argsort(-logits, kind="stable")
    p = np.exp((logits[order] - logits.max()).astype(np.float64) / s.temperature)
    if s.top_k:
        p[s.top_k :] = 0
    p /= p.sum()
    if s.top_p < 1:
        p[np.cumsum(p) - p >= s.top_p] = 0
    p[p < s.min_p * p[0]] = 0
    result = np.zeros_like(p)
    result[order] = p / p.sum()
    return result


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 1.0},
        {"top_p": 0.7},
        {"top_p": 1.0, "top_k": 5},
        {"top_p": 0.9, "top_k": 40, "temperature": 0.7},
        {"top_p": 1.0, "min_p": 0.2},
        {"top_p": 0.95, "min_p": 0.05, "temperature": 2.0},
    ],
)
def test_draws_follow_the_distribution(options):
    s = Sampling(repetition_penalty=1.0, seed=3, **options)
    logits = np.random.default_rng(0).normal(size=300).astype(np.float32) * 3
    expected = distribution(logits, s)
    sampler = Sampler(s)
    drawn = np.bincount([sampler(logits) for _ in range(20000)], minlength=300) / 20000
    assert np.abs(drawn - expected).max() < 0.015
    assert not drawn[expected == 0].any()


def test_draws_reach_the_unlikely():
    """A flat distribution over many tokens: nothing is cut that was not asked to be."""
    sampler = Sampler(Sampling(top_p=1.0, repetition_penalty=1.0, seed=1))
    logits = np.zeros(5000, np.float32)
    assert len({sampler(logits) for _ in range(2000)}) > 1500


def test_penalties_cover_what_was_generated():
    logits = np.array([2.0, -1.0, 0.5], np.float32)
    assert penalize(logits, [0, 1], 2.0).tolist() == [1.0, -2.0, 0.5]
    assert logits.tolist() == [2.0, -1.0, 0.5]  # the decoder's own stay as they are
    greedy = Sampler(Sampling(temperature=0.0, repetition_penalty=5.0))
    assert [greedy(logits), greedy(logits)] == [0, 2]
