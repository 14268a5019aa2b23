"""The inits, over the table: shapes, balance, and what each promises of the product."""

from __future__ import annotations

import pytest
import torch

from lrsurgery.errors import SurgeryError
from lrsurgery.linalg.inits import INITS, InitProblem, get_init, layer_generator


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(60, 100, generator=torch.Generator().manual_seed(0)) * 0.1


@pytest.mark.parametrize("name", INITS)
def test_factors_are_balanced_and_of_the_rank(name: str, weight: torch.Tensor) -> None:
    (u, v), values, *_ = INITS[name](InitProblem(weight, 20, 100, layer_generator(0, "a")))
    assert (u.shape, v.shape) == ((60, 20), (20, 100))
    assert torch.allclose(u.T @ u, v @ v.T, atol=1e-4)
    assert torch.allclose(values, torch.linalg.svdvals(weight), rtol=1e-3)


@pytest.mark.parametrize("name", INITS)
def test_rank_may_wait_for_the_values(name: str, weight: torch.Tensor) -> None:
    seven = InitProblem(weight, lambda values: int((values > values[7]).sum()), 100, layer_generator(0, "a"))
    (u, _), *_ = INITS[name](seven)
    assert u.shape == (60, 7)


def test_spectral_ones_keeps_directions_only(weight: torch.Tensor) -> None:
    (u, v), *_ = INITS["spectral-ones"](InitProblem(weight, 20, 100, layer_generator(0, "a")))
    left, _, right = torch.linalg.svd(weight, full_matrices=False)
    assert torch.allclose(u @ v, left[:, :20] @ right[:20], atol=1e-4)


def test_the_controls_keep_values_or_directions_alone(weight: torch.Tensor) -> None:
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    products = {}
    for name in ("spectral-shuffled", "random-directions"):
        (u, v), *_ = INITS[name](InitProblem(weight, 20, 100, layer_generator(0, "a")))
        products[name] = u @ v
        found = torch.linalg.svdvals(u @ v)
        assert torch.allclose(found[:20], values[:20], rtol=1e-4)
    core = left[:, :20].T @ products["spectral-shuffled"] @ right[:20].T
    assert torch.allclose(core, torch.diag(core.diagonal()), atol=1e-4)  # the same directions
    assert torch.allclose(core.diagonal().sort(descending=True).values, values[:20], rtol=1e-4)
    assert not torch.allclose(core.diagonal(), values[:20], rtol=0.1)
    shared = left[:, :20].T @ products["random-directions"] @ right[:20].T
    assert float(shared.norm()) < 0.5 * float(values[:20].norm())  # what chance leaves of 20 of 60 and of 100


def test_he_matches_the_variance_of_a_dense_layer() -> None:
    (u, v), *_ = INITS["he"](InitProblem(torch.zeros(600, 800), 200, 800, layer_generator(0, "a")))
    assert float((u @ v).var()) == pytest.approx(2 / 800, rel=0.05)


def test_seed_and_name_decide_he_alone(weight: torch.Tensor) -> None:
    def draw(seed: int, name: str) -> torch.Tensor:
        return INITS["he"](InitProblem(weight, 5, 100, layer_generator(seed, name))).factors.u

    assert torch.equal(draw(0, "a"), draw(0, "a"))
    assert not torch.equal(draw(0, "a"), draw(1, "a"))
    assert not torch.equal(draw(0, "a"), draw(0, "b"))


def test_unknown_init_lists_the_known() -> None:
    with pytest.raises(SurgeryError, match="spectral, spectral-ones, spectral-shuffled, random-directions, he"):
        get_init("xavier")
