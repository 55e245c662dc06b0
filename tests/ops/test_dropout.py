import numba
import pytest
import torch

from everlong.ops.dropout import Dropout, dropout_mask, reference_mask

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (1,), (3,), (4,), (5,), (), (7, 9), (3, 5, 11)])
@pytest.mark.parametrize("seed", [0, 12345, 2**63 - 2])
def test_the_mask_equals_its_reference(
    dtype: torch.dtype, shape: tuple[int, ...], seed: int
) -> None:
    like = torch.zeros(shape, dtype=dtype)
    mask = dropout_mask(like, 0.3, seed)
    assert mask.dtype == dtype
    assert mask.shape == like.shape
    assert torch.equal(mask, reference_mask(like, 0.3, seed))


@pytest.mark.parametrize("size", [8191, 8192, 8193, 20_001])
def test_blocks_of_a_mask_are_continuous(size: int) -> None:
    like = torch.zeros(size)
    assert torch.equal(dropout_mask(like, 0.5, 7), reference_mask(like, 0.5, 7))


def test_a_mask_is_made_for_any_memory_order() -> None:
    like = torch.zeros(6, 10).T
    mask = dropout_mask(like, 0.4, 3)
    assert mask.is_contiguous()
    assert torch.equal(mask, reference_mask(like, 0.4, 3))


@pytest.mark.parametrize("p", [0.0, 0.01, 0.2, 0.5, 0.9])
def test_the_share_that_is_dropped(p: float) -> None:
    size = 400_000
    mask = dropout_mask(torch.zeros(size), p, 99)
    dropped = float((mask == 0).double().mean())
    assert abs(dropped - p) <= 4.5 * (p * (1 - p) / size) ** 0.5 + 1 / 65536
    kept = mask[mask != 0]
    assert (kept == torch.tensor(1.0 / (1.0 - p))).all()


def test_neighbours_are_independent() -> None:
    size = 200_000
    dropped = (dropout_mask(torch.zeros(size), 0.5, 5) == 0).double() - 0.5
    for lag in (1, 2, 3, 4, 5, 8, 16, 63, 64, 65, 256, 8192):
        correlation = float((dropped[lag:] * dropped[:-lag]).mean()) * 4
        assert abs(correlation) < 4.5 / (size - lag) ** 0.5, lag


def test_masks_of_neighbouring_seeds_are_independent() -> None:
    size = 100_000
    first, second = (
        (dropout_mask(torch.zeros(size), 0.5, seed) == 0).double() - 0.5 for seed in (41, 42)
    )
    assert abs(float((first * second).mean()) * 4) < 4.5 / size**0.5


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="one thread only")
def test_the_mask_does_not_depend_on_threads() -> None:
    like = torch.zeros(50_000)
    before = numba.get_num_threads()
    try:
        masks = []
        for threads in (1, 2):
            numba.set_num_threads(threads)
            masks.append(dropout_mask(like, 0.2, 1))
    finally:
        numba.set_num_threads(before)
    assert torch.equal(*masks)


def test_dropout_is_the_identity_outside_training() -> None:
    values = torch.randn(10)
    assert Dropout(0.5).eval()(values) is values
    assert Dropout(0.0).train()(values) is values


def test_values_and_gradients_see_one_mask() -> None:
    values = torch.ones(40, 25, requires_grad=True)
    result = Dropout(0.4).train()(values)
    slope = torch.randn(25, 40).T
    result.backward(slope)
    assert result.unique().tolist() == torch.tensor([0.0, 1 / 0.6]).tolist()
    assert values.grad is not None
    torch.testing.assert_close(values.grad, slope * result.detach())


def test_masks_depend_on_the_seed_of_torch() -> None:
    layer, values = Dropout(0.5), torch.ones(1000)

    def after(seed: int) -> torch.Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return layer(values)

    assert torch.equal(after(1), after(1))
    assert not torch.equal(after(1), after(2))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        assert not torch.equal(layer(values), layer(values))


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5])
def test_a_share_outside_its_range_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match=f"received {p}"):
        Dropout(p)


def test_a_share_just_below_one_is_possible() -> None:
    mask = dropout_mask(torch.zeros(200_000), 0.999999, 0)
    assert 0 < int((mask != 0).sum()) < 30
    assert torch.equal(mask[:500], reference_mask(mask[:500], 0.999999, 0))
