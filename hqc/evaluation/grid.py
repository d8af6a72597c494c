"""PNG grids, a row a class or prompt: one model's images, or several models' images of equal seeds side by side."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from hqc.atomic import write_file
from hqc.errors import EvaluationError
from hqc.evaluation.images import png_from_pil
from hqc.evaluation.protocol import Pictures, describe_seeds
from hqc.paths import StrPath

__all__ = ["comparison_image", "grid_image", "save_comparison", "save_grid"]

SCALE = 3  # nearest-neighbour enlargement, less for large images
LARGEST_CELL = 192  # px, of an image that is enlarged
COLUMNS = 10  # images a row where rows mean nothing
GAP = 4  # px between images of one block
BLOCK_GAP = 20  # px between models
MARGIN = 16
LABEL_WIDTH = 36  # px for the digit at the left, more for longer labels
PROMPT_WIDTH = 180  # px for a prompt there
TITLE_SIZE, NOTE_SIZE, NAME_SIZE, LABEL_SIZE = 20, 14, 16, 26
PAPER, INK, FAINT = (250, 250, 248), (28, 28, 30), (110, 110, 115)

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class _Layout:
    """Where things stand: a title, then blocks of images in columns with one row a class."""

    labels: tuple[str, ...]  # of the rows
    columns: int  # images a row and block
    blocks: int
    cell: tuple[int, int]  # enlarged image, width and height, px
    top: int  # y of the first row, px

    @property
    def label_width(self) -> int:
        longest = max((_font(LABEL_SIZE).getlength(text) for text in self.labels), default=0)
        return max(LABEL_WIDTH, min(math.ceil(longest) + 10, PROMPT_WIDTH))

    @property
    def block_width(self) -> int:
        return self.columns * (self.cell[0] + GAP) - GAP

    @property
    def width(self) -> int:
        return 2 * MARGIN + self.label_width + self.blocks * (self.block_width + BLOCK_GAP) - BLOCK_GAP

    @property
    def height(self) -> int:
        return self.top + len(self.labels) * (self.cell[1] + GAP) - GAP + MARGIN

    def block_left(self, block: int) -> int:
        return MARGIN + self.label_width + block * (self.block_width + BLOCK_GAP)

    def row_top(self, row: int) -> int:
        return self.top + row * (self.cell[1] + GAP)


def save_grid(path: StrPath, samples: Pictures, *, model_name: str, max_per_class: int = 10) -> None:
    """Write `grid_image` as a PNG, whole or not at all.

    Raises:
        ArtefactError: the file cannot be written.
        EvaluationError: see `grid_image`.
    """
    image = grid_image(samples, model_name=model_name, max_per_class=max_per_class)
    write_file(Path(path), png_from_pil(image))


def save_comparison(path: StrPath, models: Mapping[str, Pictures], *, max_per_class: int = 4) -> None:
    """Write `comparison_image` as a PNG, whole or not at all.

    Raises:
        ArtefactError: the file cannot be written.
        EvaluationError: see `comparison_image`.
    """
    image = comparison_image(models, max_per_class=max_per_class)
    write_file(Path(path), png_from_pil(image))


def grid_image(samples: Pictures, *, model_name: str, max_per_class: int = 10) -> Image.Image:
    """One row a class or prompt with its name at the left, up to `max_per_class` images in seed order of `samples`.

    The title is the model's name, the line under it the sampling protocol and the seeds.

    Raises:
        EvaluationError: `max_per_class` below 1.
    """
    return _draw(model_name, {"": samples}, max_per_class)


def comparison_image(models: Mapping[str, Pictures], *, max_per_class: int = 4) -> Image.Image:
    """One row a class or prompt, one block of columns a model; column k of every block is the same seed.

    Raises:
        EvaluationError: fewer than two models, or seeds, labels, image size or sampler differ.
    """
    if len(models) < 2:
        raise EvaluationError("comparison_image", f"{len(models)} model(s), expected two or more", "Add a model.")
    (first_name, first), *others = models.items()
    for name, samples in others:
        if _identity(samples) != _identity(first):
            raise EvaluationError(
                "comparison_image",
                f"{name} and {first_name} differ in seeds, labels, image size or sampler",
                "Sample every model with equal labels, seeds, steps, guidance and eta.",
            )
    return _draw(f"{len(models)} models, same seeds", models, max_per_class)


def _identity(samples: Pictures) -> tuple[object, ...]:
    return samples.seeds, samples.labels, samples.prompts, samples.size, samples.protocol


def _draw(title: str, blocks: Mapping[str, Pictures], max_per_class: int) -> Image.Image:
    if max_per_class < 1:
        raise EvaluationError("grid", f"max_per_class={max_per_class}, expected at least 1", "Raise it.")
    samples = next(iter(blocks.values()))
    rows = _rows(samples, max_per_class)
    height, width = samples.size
    scale = max(1, min(SCALE, LARGEST_CELL // max(height, width)))
    cell = (width * scale, height * scale)
    columns = max(len(indices) for _, indices in rows)
    labels = tuple(label for label, _ in rows)
    plain = _Layout(labels, columns, len(blocks), cell, top=0)
    text_width = max(plain.width, 420) - 2 * MARGIN
    note = _note(samples, shown=sum(len(indices) for _, indices in rows))
    lines = [(line, TITLE_SIZE, INK) for line in _wrapped(title, TITLE_SIZE, text_width)]
    lines += [(line, NOTE_SIZE, FAINT) for line in _wrapped(note, NOTE_SIZE, text_width)]
    names = [_wrapped(name, NAME_SIZE, plain.block_width) for name in blocks]
    name_height = max(map(len, names)) * _line_height(NAME_SIZE)
    title_height = sum(_line_height(size) for _, size, _ in lines)
    layout = _Layout(labels, columns, len(blocks), cell, MARGIN + title_height + 10 + name_height)

    page = Image.new("RGB", (max(layout.width, text_width + 2 * MARGIN), layout.height), PAPER)
    draw = ImageDraw.Draw(page)
    _draw_lines(draw, (MARGIN, MARGIN), lines)
    for block, wrapped in enumerate(names):
        top = layout.top - 3 - len(wrapped) * _line_height(NAME_SIZE)  # names stand on the images
        _draw_lines(draw, (layout.block_left(block), top), [(line, NAME_SIZE, INK) for line in wrapped])
    _draw_labels(draw, layout)
    for block, block_samples in enumerate(blocks.values()):
        _paste_block(page, layout, block, block_samples, [indices for _, indices in rows])
    return page


def _note(samples: Pictures, shown: int) -> str:
    note = f"{samples.protocol.describe()}, seeds {describe_seeds(samples.seeds)}"
    return note if shown == len(samples) else f"{note}, {shown} of {len(samples)} images shown"


def _rows(samples: Pictures, max_per_class: int) -> list[tuple[str, list[int]]]:
    """(label, indices of its first images), in ascending order of classes or prompts; without labels, full rows."""
    labels = samples.labels
    if not samples.labelled:
        shown = range(min(len(samples), max_per_class))
        return [("", list(shown[start : start + COLUMNS])) for start in range(0, len(shown), COLUMNS)]
    return [
        (
            " ".join(samples.prompts[label].split()) if samples.prompts else str(label),
            [i for i, other in enumerate(labels) if other == label][:max_per_class],
        )
        for label in sorted(set(labels))
    ]


def _draw_labels(draw: ImageDraw.ImageDraw, layout: _Layout) -> None:
    """Classes in the middle of their column; a prompt in small letters, as many of its lines as the row is high."""
    for row, label in enumerate(layout.labels):
        top, middle = layout.row_top(row), layout.row_top(row) + layout.cell[1] // 2
        room = layout.label_width - 10
        if _font(LABEL_SIZE).getlength(label) <= room:
            draw.text((MARGIN + room // 2, middle), label, font=_font(LABEL_SIZE), fill=INK, anchor="mm")
            continue
        lines = _wrapped(label, NOTE_SIZE, room)[: max(1, layout.cell[1] // _line_height(NOTE_SIZE))]
        _draw_lines(draw, (MARGIN, top), [(line, NOTE_SIZE, INK) for line in lines])


def _paste_block(page: Image.Image, layout: _Layout, block: int, samples: Pictures, rows: list[list[int]]) -> None:
    for row, indices in enumerate(rows):
        for column, index in enumerate(indices):
            image = Image.fromarray(samples.pixels(index)).resize(layout.cell, Image.Resampling.NEAREST)
            left = layout.block_left(block) + column * (layout.cell[0] + GAP)
            page.paste(image.convert("RGB"), (left, layout.row_top(row)))


def _draw_lines(
    draw: ImageDraw.ImageDraw, at: tuple[int, int], lines: list[tuple[str, int, tuple[int, int, int]]]
) -> None:
    x, y = at
    for text, size, colour in lines:
        draw.text((x, y), text, font=_font(size), fill=colour)
        y += _line_height(size)


def _wrapped(text: str, size: int, width: int) -> list[str]:
    """The text in lines of at most `width` px, broken at spaces; a longer word is cut and ends in '...'."""
    font = _font(size)
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(_cut(word, font, width))
    return lines


def _cut(word: str, font: Font, width: int) -> str:
    if font.getlength(word) <= width:
        return word
    kept = next((n for n in range(len(word), 0, -1) if font.getlength(word[:n] + "...") <= width), 0)
    return word[:kept] + "..."


def _line_height(size: int) -> int:
    return round(size * 1.35)


def _font(size: int) -> Font:
    return ImageFont.load_default(size=size)
