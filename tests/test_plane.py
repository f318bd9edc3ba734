"""The plane of a run: principal directions from inner products alone."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_ema.measure.plane import eigen, plane_of

COORDINATES = st.lists(st.floats(-100, 100), min_size=5, max_size=5)


def gram(points: list[list[float]]) -> list[list[float]]:
    """The inner products of some points."""
    return [[math.fsum(a * b for a, b in zip(p, q, strict=True)) for q in points] for p in points]


def test_a_right_angle_by_hand() -> None:
    # (0, 0), (4, 0), (4, 2): the centre is (8/3, 2/3).
    plane = plane_of(gram([[0.0, 0.0], [4.0, 0.0], [4.0, 2.0]]))
    squares = [math.dist(a, b) ** 2 for a in plane.points for b in plane.points]
    assert squares == pytest.approx([0, 16, 20, 16, 0, 4, 20, 4, 0])
    assert math.dist(plane.points[0], plane.origin) == pytest.approx(0, abs=1e-9)
    assert sum(plane.explained) == pytest.approx(1)


def test_points_on_a_line_have_one_direction() -> None:
    plane = plane_of(gram([[1.0, 2.0], [2.0, 4.0], [4.0, 8.0]]))
    assert [y for _, y in plane.points] == [0, 0, 0]
    assert plane.explained == pytest.approx((1, 0))
    assert plane.points[0][0] < plane.points[1][0] < plane.points[2][0]


@pytest.mark.parametrize("count", [1, 2])
def test_one_point_or_two_equal_ones_are_at_the_centre(count: int) -> None:
    plane = plane_of([[4.0] * count] * count)
    assert plane.points == ((0.0, 0.0),) * count
    assert plane.explained == (0.0, 0.0)


def test_the_direction_of_the_path_is_to_the_right_whatever_the_signs() -> None:
    forth = [[0.0, 0.0], [3.0, 1.0], [9.0, 0.0]]
    for points in (forth, [[-x, y] for x, y in forth], forth[::-1]):
        plane = plane_of(gram(points))
        assert plane.points[-1][0] > plane.points[0][0]
        assert max((y for _, y in plane.points), key=abs) > 0


@pytest.mark.parametrize("count", [3, 7, 30, 64])
def test_it_is_what_principal_component_analysis_by_singular_values_gives(count: int) -> None:
    torch: Any = pytest.importorskip("torch")
    values = torch.randn(
        count, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    points = values.cumsum(0)
    plane = plane_of((points @ points.T).tolist())
    centred = points - points.mean(0)
    left, scales, directions = torch.linalg.svd(centred, full_matrices=False)
    right = (left * scales)[:, :2]
    origin = (-points.mean(0)) @ directions[:2].T
    for axis in (0, 1):
        mine = torch.tensor([point[axis] for point in plane.points], dtype=torch.float64)
        sign = torch.sign(mine @ right[:, axis])
        assert torch.allclose(mine, sign * right[:, axis], atol=1e-8 * float(scales[0]))
        assert plane.origin[axis] == pytest.approx(float(sign * origin[axis]), abs=1e-6)
    shares = scales.square() / scales.square().sum()
    assert plane.explained == pytest.approx(shares[:2].tolist())


@settings(deadline=None, max_examples=100)
@given(st.lists(COORDINATES, min_size=1, max_size=8))
def test_distances_in_the_plane_are_never_larger(points: list[list[float]]) -> None:
    plane = plane_of(gram(points))
    for one, here in zip(points, plane.points, strict=True):
        for other, there in zip(points, plane.points, strict=True):
            assert math.dist(here, there) <= math.dist(one, other) + 1e-4


@settings(deadline=None, max_examples=100)
@given(st.lists(COORDINATES, min_size=1, max_size=8))
def test_vectors_are_orthogonal_and_make_the_matrix_up(points: list[list[float]]) -> None:
    matrix = gram(points)
    values, vectors = eigen(matrix)
    size = max(abs(one) for row in matrix for one in row) + 1e-300
    assert values == sorted(values, reverse=True)
    for i, row in enumerate(matrix):
        for j, entry in enumerate(row):
            made = math.fsum(
                value * vector[i] * vector[j] for value, vector in zip(values, vectors, strict=True)
            )
            assert made == pytest.approx(entry, abs=1e-11 * size)
            products = math.fsum(a * b for a, b in zip(vectors[i], vectors[j], strict=True))
            assert products == pytest.approx(float(i == j), abs=1e-11)
