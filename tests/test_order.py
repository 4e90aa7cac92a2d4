"""The input order: a function of seed and step alone."""

import itertools

import numpy as np
import pytest

from llvq.data import order


def take(count, **kwargs):
    arguments = {"num_images": 70, "batch_size": 16, "seed": 3} | kwargs
    return list(itertools.islice(order.training_batches(**arguments), count))


def indices(batches):
    return np.concatenate([batch.index for batch in batches])


def test_every_epoch_is_a_permutation_and_batches_straddle_epochs():
    stream = indices(take(35))  # 560 positions: exactly 8 epochs of 70, 4.375 batches each
    epochs = stream.reshape(8, 70)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(70))
    assert len({tuple(epoch) for epoch in epochs}) == 8
    assert np.any(epochs[0] != np.arange(70))


def test_every_batch_is_full():
    for batch in take(20):
        assert batch.index.shape == batch.flip.shape == (16,)
        assert batch.mask.all()


@pytest.mark.parametrize("first_step", [1, 4, 5, 17])
def test_a_restart_sees_the_batches_it_would_have_seen(first_step):
    whole, resumed = take(20), take(20 - first_step, first_step=first_step)
    for a, b in zip(whole[first_step:], resumed, strict=True):
        np.testing.assert_array_equal(a.index, b.index)
        np.testing.assert_array_equal(a.flip, b.flip)


@pytest.mark.parametrize("process_count", [2, 4, 8])
def test_hosts_take_slices_of_the_same_batches(process_count):
    whole = take(9)
    shares = [take(9, process_index=i, process_count=process_count) for i in range(process_count)]
    for step, batch in enumerate(whole):
        together = [share[step] for share in shares]
        assert all(len(share.index) == 16 // process_count for share in together)
        np.testing.assert_array_equal(np.concatenate([s.index for s in together]), batch.index)
        np.testing.assert_array_equal(np.concatenate([s.flip for s in together]), batch.flip)


def test_the_seed_matters_and_nothing_else_does():
    np.testing.assert_array_equal(indices(take(9)), indices(take(9)))
    assert np.any(indices(take(9, seed=4)) != indices(take(9)))


def test_the_order_does_not_change_between_versions():
    """The published runs depend on it: these are the first indices of seed 0 on FashionMNIST."""
    first = next(order.training_batches(55_000, 64, seed=0))
    bits = np.random.Philox(key=np.array([0, 0], np.uint64)).random_raw(110_000)
    by_hand = sorted(range(55_000), key=lambda i: (bits[i], i))[:64]
    np.testing.assert_array_equal(first.index, by_hand)
    assert first.index[:6].tolist() == [47848, 34552, 24994, 32827, 31943, 24289]


def test_half_of_the_images_are_flipped_independently_of_the_order():
    batches = take(400, num_images=1000)
    flips = np.concatenate([batch.flip for batch in batches])
    assert abs(flips.mean() - 0.5) < 0.03  # 5 standard deviations of 6,400 fair coins
    position_of_image = indices(batches)[:1000]
    assert abs(np.corrcoef(flips[:1000], position_of_image)[0, 1]) < 0.15
    assert np.any(flips[:1000] != flips[1000:2000]), "another epoch, other flips"


@pytest.mark.parametrize(
    ("num_images", "steps"), [(55_000, 860), (162_770, 2_544), (60_000, 1_875)]
)
def test_steps_per_epoch(num_images, steps):
    assert order.steps_per_epoch(num_images, 64 if num_images != 60_000 else 32) == steps


@pytest.mark.parametrize(("num_images", "batch_size"), [(70, 16), (64, 16), (5, 16), (1, 16)])
@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_evaluation_counts_every_image_once(num_images, batch_size, process_count):
    shares = [
        list(
            order.evaluation_batches(
                num_images, batch_size, process_index=i, process_count=process_count
            )
        )
        for i in range(process_count)
    ]
    seen = []
    for step in zip(*shares, strict=True):
        assert sum(len(batch.index) for batch in step) == batch_size
        for batch in step:
            seen += batch.index[batch.mask].tolist()
            assert not batch.flip.any()
            assert np.all(batch.index < num_images)
    assert seen == list(range(num_images))
