"""Attention over chosen blocks of keys, and the tree search that chooses them: every backend against the definition."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from subquad import ops
from subquad.kernels.block_sparse.dispatch import block_sparse_cpu
from subquad.ops.block_sparse.reference import REPRESENTATIVES, tree_search_reference

FAST = pytest.mark.parametrize("backend", ["chunked", "cpu"])
SIZES = {"block_q": 4, "block_k": 2, "window": 6}


def draw(batch=2, queries=37, keys=37, heads=4, key_heads=2, width=8, columns=5, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return (
        normal(batch, queries, heads, width),
        normal(batch, keys, key_heads, width),
        normal(batch, keys, key_heads, columns),
    )


def padded_mask(keys, *borders):
    columns = torch.arange(keys)
    return torch.stack([(columns >= a) & (columns < b) for a, b in borders])


CASES = {
    "prompt": {},
    "last queries": {"queries": 9},
    "one query": {"queries": 1, "sizes": {"block_q": 1}},
    "left padding": {"mask": [(0, 37), (11, 37)]},
    "right padding": {"mask": [(0, 37), (0, 23)]},
    "padding and last queries": {"queries": 9, "mask": [(3, 37), (31, 37)]},
    "nothing real": {"mask": [(0, 37), (0, 0)]},
    "shared": {"shared": True},
    "large blocks of keys": {"sizes": {"block_k": 5}, "budget": 10},
    "all keys": {"causal": False, "queries": 11},
    "all keys, padded": {"causal": False, "queries": 11, "mask": [(0, 37), (5, 29)]},
    "first": {"representative": "first", "query_stride": 3},
    "last": {"representative": "last", "query_stride": 1},
    "longer than a tile": {"keys": 331, "queries": 331, "budget": 96, "sizes": {"window": 150, "block_q": 20}},
}


def made(name, dtype=torch.float32):
    """Tensors, the options of the search and those that it shares with the attention."""
    case = dict(CASES[name])
    sizes = SIZES | case.pop("sizes", {})
    mask, keys = case.pop("mask", None), case.pop("keys", 37)
    common = {**sizes, "causal": case.pop("causal", True), "mask": None if mask is None else padded_mask(keys, *mask)}
    if not common["causal"]:
        common["window"] = 0
    tensors = draw(queries=case.pop("queries", keys), keys=keys, dtype=dtype)
    return tensors, {"budget": 8, **case}, common


@FAST
@pytest.mark.parametrize("name", CASES)
def test_search_finds_the_blocks_of_the_definition(name, backend):
    (q, k, _), options, common = made(name)
    found = ops.hip_mask(q, k, **options, **common, backend=backend)
    expected = ops.hip_mask(q, k, **options, **common, backend="reference")
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert int(expected[1].max()) == options["budget"] // common["block_k"]


@FAST
@pytest.mark.parametrize("name", CASES)
def test_attention_and_gradients_equal_the_definition(name, backend):
    tensors, options, common = made(name)
    choice = ops.hip_mask(*tensors[:2], **options, **common)
    results = []
    for kind, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        operands = [x.to(dtype).requires_grad_() for x in tensors]
        o, _, mass = ops.block_sparse_attention(
            *operands, *choice, sinks=3, **common, return_log_sum_exp=True, backend=kind
        )
        seen = mass.isfinite()
        assert not o[~seen].any()
        gradients = torch.autograd.grad(o.sin().sum() + mass[seen].cos().sum(), operands)
        results.append((o, mass.where(seen, 0), *gradients))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-4 * theirs.abs().max().item())


@pytest.mark.parametrize("backend", ["reference", "chunked", "cpu"])
def test_is_softmax_attention_where_all_keys_fit(backend):
    q, k, v = draw(dtype=torch.float32)
    mask = padded_mask(37, (0, 37), (9, 37))
    o, _ = ops.hip_attention(q, k, v, budget=64, **SIZES, mask=mask, backend=backend)
    torch.testing.assert_close(o, ops.softmax_attention(q, k, v, mask=mask)[0], rtol=1e-5, atol=1e-5)


@FAST
def test_no_key_counts_twice(backend):
    """Blocks that overlap sinks and the window: with equal scores the mass is the number of keys seen."""
    q, k, v = draw(batch=1)
    every = torch.arange(19, dtype=torch.int32).expand(1, 4, 10, -1)
    counts = torch.full((1, 4, 10), 19)
    zero = torch.zeros_like(q)
    options = {**SIZES, "sinks": 5, "return_log_sum_exp": True, "backend": backend}
    _, _, mass = ops.block_sparse_attention(zero, k, v, every, counts, **options)
    torch.testing.assert_close(mass.exp()[0, :, 0], torch.arange(1.0, 38.0))


@FAST
@pytest.mark.parametrize("size", [4, 12])
def test_a_prompt_in_pieces_is_the_whole(size, backend):
    q, k, v = draw()
    mask = padded_mask(37, (0, 37), (4, 37))
    options = {"budget": 8, "sinks": 3, **SIZES, "backend": backend}
    whole, _ = ops.hip_attention(q, k, v, **options, mask=mask)
    pieces = [
        ops.hip_attention(q[:, a : a + size], k[:, : a + size], v[:, : a + size], **options, mask=mask[:, : a + size])[
            0
        ]
        for a in range(0, 37, size)
    ]
    torch.testing.assert_close(torch.cat(pieces, 1), whole)


@FAST
def test_padded_rows_are_what_they_are_alone(backend):
    q, k, v = draw()
    options = {"budget": 8, "sinks": 3, **SIZES, "backend": backend}
    o, _ = ops.hip_attention(q, k, v, **options, mask=padded_mask(37, (0, 37), (7, 30)))
    alone, _ = ops.hip_attention(*(x[1:, 7:30] for x in (q, k, v)), **options)
    torch.testing.assert_close(o[1:, 7:30], alone)
    assert not o[1, :7].any()
    assert not o[1, 30:].any()


@FAST
def test_permuted_heads_permute_their_choices(backend):
    q, k, _ = draw(heads=4, key_heads=4)
    order = torch.tensor([2, 0, 3, 1])
    options = {"budget": 8, **SIZES, "backend": backend}
    indices, _ = ops.hip_mask(q, k, **options)
    permuted, _ = ops.hip_mask(q[:, :, order], k[:, :, order], **options)
    assert torch.equal(permuted, indices[:, order])


@FAST
def test_layouts_and_low_precision(backend):
    q, k, v = draw(keys=70, queries=70)
    options = {"budget": 8, "sinks": 3, **SIZES, "backend": backend}
    expected, _ = ops.hip_attention(q, k, v, **options)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    turned[2] = torch.stack([turned[2], turned[2]], -1)[..., 0]
    torch.testing.assert_close(ops.hip_attention(*turned, **options)[0], expected)
    half = [x.bfloat16() for x in (q, k, v)]
    low, _ = ops.hip_attention(*half, **options)
    wide, _ = ops.hip_attention(*(x.float() for x in half), **options)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), wide, rtol=2**-8, atol=2**-8)
    one = q[:, :1, :1].expand(-1, 70, 4, -1)
    torch.testing.assert_close(
        ops.hip_attention(one, k, v, **options)[0], ops.hip_attention(one.clone(), k, v, **options)[0]
    )


@settings(max_examples=60, deadline=None)
@given(keys=st.integers(1, 90), most=st.integers(1, 12), block_k=st.integers(1, 3), seed=st.integers(0, 99))
def test_the_tree_is_a_tree(keys, most, block_k, seed):
    """The first nodes partition the keys, at most 2 m blocks are scored in a round, and m distinct ones stay."""
    generator = torch.Generator().manual_seed(seed)
    k, q = torch.randn(keys, 4, generator=generator), torch.randn(3, 4, generator=generator)
    asked = []

    def center(first, size):
        asked.append((first, size))
        return REPRESENTATIVES["center"](first, size)

    found = tree_search_reference(q, k, most=most, block_k=block_k, representative=center)
    total = math.ceil(keys / block_k)
    assert found == sorted(set(found))
    assert len(found) == min(total, most)
    assert set(found) <= set(range(total))
    if total <= most:
        assert not asked
        return
    rounds = math.ceil(math.log2(math.ceil(total / most)))
    assert len(asked) <= 2 * most * rounds
    first_round = {}
    for first, size in asked:  # sizes fall from round to round: a block's first node is of the first round
        for block in range(first, first + size):
            first_round.setdefault(block, (first, size))
    assert set(first_round) == set(range(total))


def test_a_perfect_representative_finds_the_largest_score():
    q, k = torch.randn(3, 4), torch.randn(77, 4)

    def oracle(first, size):
        return list(range(first, first + size))

    found = tree_search_reference(q, k, most=4, block_k=1, representative=oracle)
    assert int((q @ k.T).amax(0).argmax()) in found
    rising = torch.arange(77.0)[:, None]
    assert tree_search_reference(torch.ones(1, 1), rising, most=4, block_k=1, representative=oracle) == [73, 74, 75, 76]


def mass_found(k, q, m):
    """Share of the exact top keys' attention that the search finds, without window and sinks."""
    indices, _ = ops.hip_mask(q, k, budget=m, block_q=1, block_k=1, window=0, causal=False)
    weights = (torch.einsum("bthk,bshk->bhts", q, k)).softmax(-1)
    best = weights.topk(m, -1).values.sum(-1)
    return float((weights.gather(-1, indices.long()).sum(-1) / best).mean())


def test_smooth_scores_are_found_and_noise_is_not():
    steps = torch.randn(1, 1, 1024, generator=torch.Generator().manual_seed(0))
    walk = F.avg_pool1d(steps.cumsum(-1), 9, 1, 4).view(1, 1024, 1, 1) / 4
    assert mass_found(walk, torch.ones(1, 1, 1, 1), 64) >= 0.9
    noise = torch.randn(16, 1024, 1, 1, generator=torch.Generator().manual_seed(1))
    # the last round keeps the better half of 128 keys, whose mass is 0.35 of the best 64's if they are chance; some won
    # their way there
    assert mass_found(noise, torch.ones(16, 1, 1, 1), 64) <= 0.6


def test_operator_is_known_to_torch():
    q, k, v = draw(queries=9)
    choice = ops.hip_mask(q, k, budget=8, **SIZES)
    starts = torch.zeros(2, dtype=torch.int64)
    operands = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(block_sparse_cpu.registered, (*operands, *choice, starts, starts + 37, 4, 2, 6, 3, True, 0.5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budget": 7}, "multiple of block_k"),
        ({"budget": 0}, "multiple of block_k"),
        ({"window": 3}, "window must be at least block_q 4"),
        ({"window": 2.0}, "window must be an integer"),
        ({"causal": False}, "give window=0"),
        ({"representative": "centre"}, "representative must be one of 'center'"),
        ({"query_stride": 0}, "query_stride must be an integer >= 1"),
        ({"block_k": 0}, "block_k must be an integer >= 1"),
        ({"backend": "gpu"}, "no kernel of its own"),
        ({"mask": torch.ones(2, 36, dtype=torch.bool)}, "mask must be"),
        ({"mask": torch.ones(2, 37)}, "bool"),
        ({"mask": torch.arange(37).expand(2, -1) % 5 > 0}, "lie together"),
    ],
)
def test_bad_searches_are_refused(change, message):
    q, k, _ = draw()
    with pytest.raises((ValueError, TypeError), match=message):
        ops.hip_mask(q, k, **{"budget": 8, **SIZES, **change})


def test_bad_operands_are_refused():
    q, k, v = draw()
    with pytest.raises(ValueError, match="37 queries need as many keys; got 30"):
        ops.hip_mask(q, k[:, :30], **SIZES)
    with pytest.raises(ValueError, match="H a multiple of G"):
        ops.hip_mask(q[:, :, :3], k, **SIZES)
    with pytest.raises(ValueError, match="NaN"):
        ops.hip_mask(q / 0 * 0, k, **SIZES)
    indices, counts = ops.hip_mask(q, k, budget=8, **SIZES)
    with pytest.raises(ValueError, match="ascend"):
        ops.block_sparse_attention(q, k, v, indices.flip(-1), counts, **SIZES)
    with pytest.raises(ValueError, match="counts must lie in"):
        ops.block_sparse_attention(q, k, v, indices, counts + 9, **SIZES)
    with pytest.raises(ValueError, match=r"blocks of queries, m\) and without m"):
        ops.block_sparse_attention(q, k, v, indices[:, :3], counts[:, :3], **SIZES)
    with pytest.raises(TypeError, match="integer tensor"):
        ops.block_sparse_attention(q, k, v, indices.float(), counts, **SIZES)
    with pytest.raises(ValueError, match="sinks"):
        ops.block_sparse_attention(q, k, v, indices, counts, sinks=-1, **SIZES)
