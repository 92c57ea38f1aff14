"""Pictures to videos: grids of frames with text on them, written as ``.mp4`` or ``.gif``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from es_flipout.errors import UserError
from es_flipout.tools.output import written

Frame = NDArray[np.uint8]
"""A picture, ``(H, W, 3)``."""

ENDINGS = (".mp4", ".gif")
_MOST_FPS = {".mp4": 60, ".gif": 25}
_LEAST_WIDTH = 240  # of a panel, whose text must be readable


def stride_of(path: Path, fps: float) -> int:
    """Return which frames are written, every ``n``-th, so that players can show the video in real time."""
    return max(1, int(np.ceil(fps / _MOST_FPS[path.suffix.lower()])))


def panel_width(frame: Frame, columns: int, width: int | None) -> int:
    """Return the width of a panel for a video of ``width``; by default that of the frame, if it is large enough."""
    return max(frame.shape[1], _LEAST_WIDTH) if width is None else max(width // columns, 16)


def grid(panels: Sequence[tuple[Frame, str]], columns: int, width: int) -> Frame:
    """Arrange panels in rows, each a frame scaled to ``width`` with a text on it.

    The size of the result is even, as video formats want it; free places are black.
    """
    drawn = [_panel(frame, text, width) for frame, text in panels]
    height, width = (max(each.shape[axis] for each in drawn) for axis in (0, 1))
    rows = -(-len(drawn) // columns)
    canvas = np.zeros((rows * height + rows * height % 2, columns * width + columns * width % 2, 3), np.uint8)
    for index, each in enumerate(drawn):
        top, left = index // columns * height, index % columns * width
        canvas[top : top + each.shape[0], left : left + each.shape[1]] = each
    return canvas


def _panel(frame: Frame, text: str, width: int) -> Frame:
    height = max(round(frame.shape[0] * width / frame.shape[1]), 1)
    coarse = frame.shape[1] <= width // 4  # few large pixels, whose edges shall stay sharp
    resampling = Image.Resampling.NEAREST if coarse else Image.Resampling.LANCZOS
    image = Image.fromarray(frame)
    if image.size != (width, height):
        image = image.resize((width, height), resampling)
    size = max(width // 24, 9)
    font = ImageFont.load_default(size)
    ImageDraw.Draw(image).text(
        (size // 2, size // 3), text, "white", font, stroke_width=max(size // 9, 1), stroke_fill="black"
    )
    return np.asarray(image)


def write_video(path: Path, frames: Iterable[Frame], fps: float) -> int:
    """Write frames as a video and return their number.

    Args:
        path: the file, ``.mp4`` or ``.gif``; it is replaced if it exists.
        frames: pictures of equal, even size.
        fps: frames per second.

    Raises:
        UserError: a package of the extra ``render``, or ffmpeg, is missing.
    """
    count = 0

    def counted() -> Iterator[Frame]:
        nonlocal count
        for frame in frames:
            count += 1
            yield frame

    with written(path) as temporary:
        if path.suffix.lower() == ".gif":
            _write_gif(temporary, counted(), fps)
        else:
            _write_mp4(temporary, counted(), fps)
    return count


def require_ffmpeg() -> None:
    """Check that ``.mp4`` can be written.

    Raises:
        UserError: a package of the extra ``render``, or ffmpeg, is missing.
    """
    try:
        import imageio_ffmpeg

        imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"mp4 needs ffmpeg, which the extra render brings: pip install 'es-flipout[render]' ({error}); .gif works without"
        ) from None


def _write_mp4(path: Path, frames: Iterable[Frame], fps: float) -> None:
    require_ffmpeg()
    import imageio.v2

    writer: Any = imageio.v2.get_writer(str(path), format="FFMPEG", fps=fps, macro_block_size=2, quality=7)  # pyright: ignore[reportArgumentType]
    with contextlib.closing(writer):  # its own `with` leaves ffmpeg running after an error
        for frame in frames:
            writer.append_data(frame)


def _write_gif(path: Path, frames: Iterable[Frame], fps: float) -> None:
    images = (Image.fromarray(frame).quantize(128, dither=Image.Dither.NONE) for frame in frames)
    first = next(images)
    # Delays are whole hundredths of a second.
    first.save(
        path, save_all=True, append_images=images, duration=max(round(100 / fps), 2) * 10, loop=0, optimize=False
    )
