"""GraphDecoder: the steps of a ShadowKVCache at fixed addresses, as a CUDA graph where there is a
GPU."""

from __future__ import annotations

import pytest
import torch
from helpers import Place
from hf_models import fresh, tokens
from test_shadow_cache import compress_from, full_cache

import sparseattn
from sparseattn import GraphDecoder, ShadowKVCache

PLACES = [
    Place("cpu", torch.float32),
    pytest.param(Place("cuda", torch.bfloat16), marks=pytest.mark.cuda),
]
SMALL = {"rank": 32, "sparse_budget": 64, "outlier_chunks": 3, "local_tokens": 16}


@pytest.fixture(params=PLACES, ids=str)
def place(request):
    return request.param


def model_on(place: Place, shape: str = "glm-2kv"):
    return sparseattn.hf.enable(fresh(shape).to(place.device, place.dtype))


def prefilled(model, ids, **options):
    cache = ShadowKVCache(model.config, **(SMALL | options))
    compress_from(cache, 100)
    logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
    return cache, logits[:, -1].argmax(-1, keepdim=True)


def eager(model, cache, ids, count: int) -> torch.Tensor:
    out = []
    for _ in range(count):
        logits = model(ids, past_key_values=cache, logits_to_keep=1).logits
        ids = logits[:, -1].argmax(-1, keepdim=True)
        out.append(ids)
    return torch.cat(out, dim=1)


@pytest.mark.parametrize("shape", ["llama", "glm-2kv", "qwen3", "phi3"])
@torch.inference_mode()
def test_tokens_of_eager_steps(shape):
    """Across several turns of the tail into chunks; then the cache goes on without a decoder."""
    model = sparseattn.hf.enable(fresh(shape))
    ids = tokens(2, 157)
    (a, first), (b, _) = prefilled(model, ids), prefilled(model, ids)
    decoder = GraphDecoder(model, a, 200)
    assert torch.equal(decoder.generate(first, 200), eager(model, b, first, 200))
    assert a.get_seq_length() == b.get_seq_length() and a.counters() == b.counters()
    turn = tokens(2, 30, seed=3)
    assert torch.equal(eager(model, a, turn, 40), eager(model, b, turn, 40))


@torch.inference_mode()
def test_full_rank_and_budget(place):
    """The model's own tokens, on the CPU; on a GPU finite logits of the right shape."""
    model = model_on(place)
    ids = tokens(1, 157).to(place.device)
    cache = full_cache(model)
    first = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1)[:, None]
    got = GraphDecoder(model, cache, 90).generate(first, 90)
    assert got.shape == (1, 90)
    if place.device == "cpu":
        plain = fresh("glm-2kv")
        expected = plain.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=91, do_sample=False
        )
        assert torch.equal(torch.cat((first, got), dim=1), expected[:, 157:])


@pytest.mark.cuda
@pytest.mark.parametrize("store", ["device", "host"])
@torch.inference_mode()
def test_replay_equals_the_same_steps_without_a_graph(store):
    """To the bit, with chunks made on the way."""
    model = model_on(Place("cuda", torch.bfloat16))
    ids = tokens(2, 300).cuda()
    (a, first), (b, _) = (prefilled(model, ids, value_store=store) for _ in range(2))
    graph, plain = GraphDecoder(model, a, 150), GraphDecoder(model, b, 150)
    assert graph.graph is not None
    plain.graph = None
    for _ in range(150):
        x, y = graph.step(first), plain.step(first)
        assert torch.equal(x, y) and x.isfinite().all()
        first = x.argmax(-1, keepdim=True)
    assert a.get_seq_length() == b.get_seq_length()


@torch.inference_mode()
def test_end_of_sequence(place):
    model = model_on(place)
    cache, first = prefilled(model, tokens(2, 157).to(place.device))
    free = GraphDecoder(model, cache, 60).generate(first, 60)
    cache, first = prefilled(model, tokens(2, 157).to(place.device))
    stop = int(free[0, 5])
    got = GraphDecoder(model, cache, 60).generate(first, 60, eos_token_id=stop)
    for row, whole in zip(got, free, strict=True):
        places = (whole == stop).nonzero().flatten()
        end = int(places[0]) if len(places) else len(whole)
        assert torch.equal(row[:end], whole[:end][: len(row)]) and (row[end:] == stop).all()


@torch.inference_mode()
def test_refusals():
    model = model_on(Place("cpu", torch.float32))
    ids = tokens(1, 157)
    with pytest.raises(TypeError, match="cache: expected a ShadowKVCache, got NoneType"):
        GraphDecoder(model, None, 5)
    with pytest.raises(ValueError, match="cache: expected a compressed text, got 0 tokens"):
        GraphDecoder(model, ShadowKVCache(model.config), 5)
    cache, first = prefilled(model, ids)
    with pytest.raises(ValueError, match="max_new_tokens: expected at least 1, got 0"):
        GraphDecoder(model, cache, 0)
    decoder = GraphDecoder(model, cache, 2)
    with pytest.raises(ValueError, match=r"ids: expected shape \[1, 1\], got \[2, 1\]"):
        decoder.step(first.repeat(2, 1))
    decoder.generate(first, 2)
    with pytest.raises(ValueError, match="at most max_new_tokens steps"):
        decoder.step(first)
    decoder = GraphDecoder(model, cache, 5)
    model(first, past_key_values=cache)
    with pytest.raises(ValueError, match="no change but by this decoder's steps"):
        decoder.step(first)
    decoder = GraphDecoder(model, cache, 5)
    with pytest.raises(ValueError, match="tokens: expected at least 1, got 0"):
        decoder.generate(first, 0)
    cache.reorder_cache(torch.tensor([0]))  # other buffers, the same length
    with pytest.raises(ValueError, match="no change but by this decoder's steps"):
        decoder.step(first)
    sparseattn.hf.disable(model)
    with pytest.raises(ValueError, match="was not enabled"):
        GraphDecoder(model, cache, 5)
