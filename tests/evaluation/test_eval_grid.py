"""Grids: where each image lands, what is refused, and that files are written whole or not at all."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hqc.errors import EvaluationError
from hqc.evaluation import grid
from hqc.evaluation.images import pil_from_tensor

SIZE = 16


def flat_samples(samples_factory: Any, count: int = 20) -> Any:
    """Image i is one grey value, 10·i of 255, so that it can be found again in the page."""
    samples = samples_factory(count, size=SIZE)
    values = torch.arange(count, dtype=torch.float32) * 10 / 255
    return dataclasses.replace(samples, images=values[:, None, None, None].expand(count, 1, SIZE, SIZE))


def cell_values(page: Image.Image, left: int, top: int, columns: int, rows: int) -> list[list[int]]:
    """The grey value of each cell's middle pixel; its corner pixels must have the same."""
    pixels = np.asarray(page)
    side, pitch = SIZE * grid.SCALE, SIZE * grid.SCALE + grid.GAP
    values = []
    for row in range(rows):
        line = []
        for column in range(columns):
            cell = pixels[top + row * pitch :, left + column * pitch :][:side, :side]
            assert (cell == cell[0, 0]).all()
            line.append(int(cell[0, 0, 0]))
        values.append(line)
    return values


def find_top(page: Image.Image, left: int) -> int:
    """First row of the pure black image 0 at the left edge of a block."""
    column = np.asarray(page)[:, left]
    return int(np.argmax((column == 0).all(1)))


def test_rows_are_classes_and_columns_are_seeds_in_order(samples_factory: Any) -> None:
    page = grid.grid_image(flat_samples(samples_factory), model_name="float")
    left = grid.MARGIN + grid.LABEL_WIDTH
    values = cell_values(page, left, find_top(page, left), columns=2, rows=10)
    assert values == [[10 * digit, 10 * (digit + 10)] for digit in range(10)]


def test_comparison_puts_one_block_a_model(samples_factory: Any) -> None:
    samples = flat_samples(samples_factory)
    other = dataclasses.replace(samples, images=1 - samples.images)
    page = grid.comparison_image({"float": samples, "W4A4": other}, max_per_class=2)
    left = grid.MARGIN + grid.LABEL_WIDTH
    top = find_top(page, left)
    second = left + 2 * (SIZE * grid.SCALE + grid.GAP) - grid.GAP + grid.BLOCK_GAP
    assert cell_values(page, left, top, 2, 10) == [[10 * d, 10 * d + 100] for d in range(10)]
    assert cell_values(page, second, top, 2, 10) == [[255 - 10 * d, 155 - 10 * d] for d in range(10)]


def test_title_names_and_labels_are_drawn(samples_factory: Any) -> None:
    samples = flat_samples(samples_factory)
    named = grid.grid_image(samples, model_name="float")
    other = grid.grid_image(samples, model_name="W4A4")
    assert np.asarray(named).shape == np.asarray(other).shape
    assert (np.asarray(named) != np.asarray(other)).any()
    labels = np.asarray(named)[-SIZE * grid.SCALE :, grid.MARGIN : grid.MARGIN + grid.LABEL_WIDTH - 4]
    assert (labels < 100).any()  # ink beside the last row


def test_long_names_stay_on_the_page(samples_factory: Any) -> None:
    samples = flat_samples(samples_factory)
    name = "a-model-name-that-goes-on-and-on-without-a-space " * 3
    page = np.asarray(grid.comparison_image({"float": samples, name: samples}, max_per_class=1))
    assert (page[:, -grid.MARGIN // 2 :] == grid.PAPER).all()


def test_colour_images_and_ragged_classes(samples_factory: Any) -> None:
    samples = samples_factory(13, channels=3)
    page = grid.grid_image(samples, model_name="rgb", max_per_class=1)
    left = grid.MARGIN + grid.LABEL_WIDTH
    expected = np.asarray(pil_from_tensor(samples.images[9]))[0, 0]
    bottom = page.height - grid.MARGIN - SIZE * grid.SCALE
    assert (np.asarray(page)[bottom, left] == expected).all()


def test_classes_ascend_whatever_their_order_in_the_samples(samples_factory: Any) -> None:
    samples = dataclasses.replace(flat_samples(samples_factory, 3), labels=(9, 1, 1))
    left = grid.MARGIN + grid.LABEL_WIDTH
    page = grid.grid_image(samples, model_name="float", max_per_class=1)
    top = page.height - grid.MARGIN - 2 * SIZE * grid.SCALE - grid.GAP
    assert cell_values(page, left, top, columns=1, rows=2) == [[10], [0]]


def test_comparison_of_other_seeds_is_refused(samples_factory: Any) -> None:
    samples = samples_factory(10)
    other = dataclasses.replace(samples, seeds=tuple(range(1, 11)))
    with pytest.raises(EvaluationError, match="W4A4 and float differ in seeds"):
        grid.comparison_image({"float": samples, "W4A4": other})
    with pytest.raises(EvaluationError, match="two or more"):
        grid.comparison_image({"float": samples})
    with pytest.raises(EvaluationError, match="max_per_class=0"):
        grid.grid_image(samples, model_name="float", max_per_class=0)


def test_saved_files_are_png_and_leave_nothing_else(tmp_path: Path, samples_factory: Any) -> None:
    samples = flat_samples(samples_factory)
    grid.save_grid(tmp_path / "new" / "grid.png", samples, model_name="float")
    grid.save_comparison(tmp_path / "new" / "both.png", {"float": samples, "W4A4": samples})
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["both.png", "grid.png"]
    with Image.open(tmp_path / "new" / "grid.png") as image:
        assert image.format == "PNG"
        assert image.size == grid.grid_image(samples, model_name="float").size


@pytest.mark.parametrize("shape", [(2, 4, 4), (4, 4)])
def test_images_that_are_neither_grey_nor_rgb(shape: tuple[int, ...]) -> None:
    with pytest.raises(EvaluationError, match="expected"):
        pil_from_tensor(torch.zeros(shape))


def test_pixels_are_rounded_not_cut() -> None:
    image = pil_from_tensor(torch.tensor([[[0.0, 0.5, 1.0, 254.6 / 255]]]))
    assert np.asarray(image).tolist() == [[0, 128, 255, 255]]
