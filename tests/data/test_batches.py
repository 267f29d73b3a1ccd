"""The stream against a slow one made of Python lists; resuming, ranks and epochs follow from that."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tessera.data import Batches, TokenDocuments
from tessera.data.draws import permutation
from tessera.ops.chunked_loss import IGNORED

END = 1
lengths = st.lists(st.integers(1, 12), min_size=1, max_size=12)


def documents_of(sizes: list[int], shard_tokens: int = 10**9) -> TokenDocuments:
    """Documents of given sizes, whose tokens are all different but for the end of text; ids start at 100."""
    bounds = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    tokens = np.arange(100, 100 + bounds[-1], dtype=np.uint32)
    tokens[bounds[1:] - 1] = END
    shards, start = [], 0
    for i in range(len(sizes)):
        if i == len(sizes) - 1 or bounds[i + 2] - start > shard_tokens:
            shards.append(tokens[start : bounds[i + 1]])
            start = int(bounds[i + 1])
    return TokenDocuments(bounds, shards)


def texts(documents: TokenDocuments) -> list[list[int]]:
    return [documents.read(i, 0, int(n)).tolist() for i, n in enumerate(documents.lengths)]


def slow_stream(documents: TokenDocuments, seed: int, tokens: int) -> list[tuple[int, int]]:
    """(token, how many documents began before or at it) of the endless stream."""
    stream: list[tuple[int, int]] = []
    epoch = begun = 0
    while len(stream) < tokens:
        for i in permutation(documents.num_documents, seed, "order", epoch):
            begun += 1
            stream += [(token, begun) for token in texts(documents)[i]]
        epoch += 1
    return stream[:tokens]


def drawn(batches: Batches, seed: int, position: int) -> int:
    """The sequence of the stream that stands at a position: shuffled within windows of an epoch's length."""
    window, place = divmod(position, batches.num_sequences)
    return window * batches.num_sequences + int(permutation(batches.num_sequences, seed, "sequences", window)[place])


@given(lengths, st.integers(1, 30), st.integers(0, 3), st.integers(0, 30), st.booleans(), st.integers(1, 40))
@settings(deadline=None, max_examples=200)
def test_every_sequence_is_the_slow_streams(sizes, length, seed, position, cross, shard_tokens) -> None:
    documents = documents_of(sizes, shard_tokens)
    batches = Batches(documents, length, seed=seed, end_of_text=END, cross_document_attention=cross)
    sequences = [drawn(batches, seed, position + row) for row in range(3)]
    stream = slow_stream(documents, seed, (max(sequences) + 1) * length + 1)
    batch = batches.batch(position, 3)
    for row in range(3):
        start = sequences[row] * length
        window = stream[start : start + length + 1]
        assert batch.tokens[row].tolist() == [token for token, _ in window[:-1]]
        expected = [after if cross or here == there else IGNORED for (_, here), (after, there) in pairwise(window)]
        assert batch.targets[row].tolist() == expected
        assert batch.document_ids[row].tolist() == [begun - window[0][1] for _, begun in window[:-1]]


@given(lengths, st.integers(1, 30), st.booleans())
@settings(deadline=None)
def test_held_out_tokens_are_each_a_target_once_and_the_rest_is_ignored(sizes, length, cross) -> None:
    documents = documents_of(sizes)
    batches = Batches(documents, length, seed=4, end_of_text=END, endless=False, cross_document_attention=cross)
    whole = batches.batch(0, batches.num_sequences)
    order = permutation(len(sizes), 4, "order", 0)
    expected = [token for i in order for token in texts(documents)[i]]
    in_order = np.argsort(permutation(batches.num_sequences, 4, "sequences", 0))
    inputs, targets = (x[torch.from_numpy(in_order)].flatten().tolist() for x in (whole.tokens, whole.targets))
    kept = [t for t in targets if t != IGNORED]
    if cross:
        assert kept == expected[1:]
    else:
        assert kept == [token for i in order for token in texts(documents)[i][1:]]
    assert inputs[: len(expected)] == expected[: len(inputs)]
    assert all(token == END for token in inputs[len(expected) :])
    assert all(t == IGNORED for t in targets[len(expected) - 1 :])
    again = batches.batch(batches.num_sequences, batches.num_sequences)
    assert torch.equal(again.tokens, whole.tokens) and torch.equal(again.targets, whole.targets)


@given(lengths, st.integers(1, 20), st.integers(0, 10**14), st.integers(1, 6))
@settings(deadline=None)
def test_a_batch_does_not_depend_on_what_was_read_before_or_on_how_it_is_cut(sizes, length, position, size) -> None:
    documents = documents_of(sizes)
    batches = Batches(documents, length, seed=0, end_of_text=END)
    whole = batches.batch(position, size)
    for row in reversed(range(size)):  # ranks ask for their own rows, in any order
        fresh = Batches(documents, length, seed=0, end_of_text=END)
        for source in (fresh, batches):
            one = source.batch(position + row, 1)
            for name in ("tokens", "targets", "document_ids"):
                assert torch.equal(getattr(one, name)[0], getattr(whole, name)[row])


def test_every_token_of_an_epoch_is_an_input_once_and_a_target_once() -> None:
    sizes = [5, 1, 17, 3, 8, 8, 30]
    documents = documents_of(sizes)
    length = 6
    assert sum(sizes) % length == 0
    batches = Batches(documents, length, seed=3, end_of_text=END)
    orders = []
    for epoch in range(5):
        batch = batches.batch(epoch * batches.num_sequences, batches.num_sequences)
        every = Counter(token for text in texts(documents) for token in text)
        assert Counter(batch.tokens.flatten().tolist()) == every
        stream = slow_stream(documents, 3, (epoch + 1) * sum(sizes) + 1)
        first, behind = stream[epoch * sum(sizes)][0], stream[-1][0]
        assert Counter(batch.targets.flatten().tolist()) == every - Counter([first]) + Counter([behind])
        orders.append(tuple(batch.tokens.flatten().tolist()))
    assert len(set(orders)) == 5


def test_epochs_follow_without_a_gap_where_sequences_do_not_divide_them() -> None:
    documents = documents_of([5, 4, 2])
    batches = Batches(documents, 4, seed=0, end_of_text=END)
    batch = batches.batch(0, 22)  # 88 tokens: eight epochs, and eleven windows of two sequences
    assert Counter(batch.tokens.flatten().tolist()) == Counter(8 * [t for text in texts(documents) for t in text])
    assert not (batch.targets == IGNORED).any()


def test_a_batch_is_no_run_of_neighbours() -> None:
    documents = documents_of([1000])
    batches = Batches(documents, 10, seed=0, end_of_text=END)
    firsts = batches.batch(0, 100).tokens[:, 0].tolist()
    neighbours = sum(after - before == 10 for before, after in pairwise(firsts))
    assert neighbours < 10  # 99 without the shuffle, one expected with it


def test_orders_of_past_epochs_are_not_kept() -> None:
    batches = Batches(documents_of([5, 4, 2]), 4, seed=0, end_of_text=END)
    batches.batch(0, 100)
    assert len(batches._epochs) == len(batches._windows) == 2


def test_a_single_document_meets_itself_as_another_document() -> None:
    batches = Batches(documents_of([3]), 7, seed=0, end_of_text=END, cross_document_attention=False)
    batch = batches.batch(0, 1)
    assert batch.document_ids.tolist() == [[0, 0, 0, 1, 1, 1, 2]]
    assert batch.targets.tolist() == [[101, 1, IGNORED, 101, 1, IGNORED, 101]]


def test_types_are_those_of_the_interface_and_memory_is_the_batchs_own() -> None:
    batches = Batches(documents_of([9, 9]), 5, seed=0, end_of_text=END)
    batch = batches.batch(2, 2)
    assert (batch.tokens.dtype, batch.targets.dtype, batch.document_ids.dtype) == (
        torch.int64, torch.int64, torch.int32,
    )  # fmt: skip
    kept = batch.targets.clone()
    batch.tokens.zero_()
    assert torch.equal(batch.targets, kept) and batches.batch(2, 2).tokens.any()
    assert batches.num_tokens == 18 and batches.num_sequences == 3


@pytest.mark.parametrize(("size", "sizes"), [(None, [5]), (1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (9, [5])])
def test_micro_batches_are_the_batchs_rows_in_order(size: int | None, sizes: list[int]) -> None:
    batch = Batches(documents_of([9, 4, 9]), 5, seed=0, end_of_text=END, cross_document_attention=False).batch(3, 5)
    pieces = list(batch.split(size))
    assert [len(piece.tokens) for piece in pieces] == sizes
    for name in ("tokens", "targets", "document_ids"):
        assert torch.equal(torch.cat([getattr(piece, name) for piece in pieces]), getattr(batch, name)), name


def test_a_batch_on_another_device_is_all_there() -> None:
    batch = Batches(documents_of([9, 9]), 5, seed=0, end_of_text=END).batch(0, 2)
    moved = batch.to(torch.device("meta"))
    for name in ("tokens", "targets", "document_ids"):
        there, here = getattr(moved, name), getattr(batch, name)
        assert (there.device.type, there.shape, there.dtype) == ("meta", here.shape, here.dtype), name
    for name in ("tokens", "targets", "document_ids"):
        assert torch.equal(getattr(batch.to(torch.device("cpu")), name), getattr(batch, name)), name


def test_another_seed_is_another_order() -> None:
    documents = documents_of([3] * 50)
    one, two = (Batches(documents, 10, seed=seed, end_of_text=END).batch(0, 5).tokens for seed in (0, 1))
    assert not torch.equal(one, two)


@pytest.mark.parametrize(("position", "size"), [(-1, 1), (0, 0), (5, -2)])
def test_positions_and_sizes_out_of_range_are_refused(position: int, size: int) -> None:
    with pytest.raises(ValueError, match="positions count from 0"):
        Batches(documents_of([9]), 4, seed=0, end_of_text=END).batch(position, size)
