"""Pictures as users give them (PIL images, paths, arrays), read into PIL images."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

#: Larger pictures are refused: unpacked they take gigabytes, and every processor shrinks them anyway.
MAX_PIXELS = 50_000_000


def load_images(image: Any) -> tuple[Any, ...]:
    """One or several images as RGB pictures.

    Args:
        image: a PIL image, a path, an array or tensor (``[height, width]``, ``[height, width, 3 or 4]`` or
            ``[3, height, width]``; integers 0 to 255, or floats 0 to 1), or a list of these.

    Raises:
        ValueError: something else, an empty list, values outside these ranges, a file that is no picture or is cut off,
            or more than 50 megapixels.
        FileNotFoundError: no file at the path.

    Examples:
        >>> [picture.size for picture in load_images([np.zeros((4, 6, 3)), np.zeros((8, 8), dtype=np.uint8)])]
        [(6, 4), (8, 8)]
    """
    several = list(image) if isinstance(image, (list, tuple)) else [image]
    if not several:
        raise ValueError("image is an empty list; give at least one image, or None")
    return tuple(_load_image(item) for item in several)


def _load_image(image: Any) -> Any:
    from PIL import Image

    if isinstance(image, Image.Image):
        return _converted(image, "image")
    if isinstance(image, (str, Path)):
        if not Path(image).is_file():
            raise FileNotFoundError(
                f"image {str(image)!r} is not a file; give a path on this machine, or the picture itself"
            )
        return _read_file(Path(image))
    if isinstance(image, Tensor):
        image = image.detach().cpu().numpy()
    if not isinstance(image, np.ndarray) or image.ndim not in (2, 3):
        what = f"array of shape {image.shape}" if isinstance(image, np.ndarray) else f"a {type(image).__name__}"
        raise ValueError(f"image is {what}; expected a PIL image, a path, or an array [height, width, 3]")
    if not image.size:
        raise ValueError(f"image has shape {image.shape}: no pixels; [height, width, 3] is needed")
    if image.ndim == 3 and image.shape[0] in (1, 3) and image.shape[2] not in (1, 3, 4):
        image = image.transpose(1, 2, 0)
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    if image.ndim == 3 and image.shape[2] not in (3, 4):
        raise ValueError(f"image has shape {image.shape}; [height, width, 3] is needed")
    _require_size(image.shape[1], image.shape[0], "image")
    low, high = float(image.min()), float(image.max())
    is_float = np.issubdtype(image.dtype, np.floating)
    if not (low >= 0 and high <= (1 if is_float else 255)):  # also refuses NaN
        wanted = "0 to 1" if is_float else "0 to 255"
        raise ValueError(f"image has values from {low:g} to {high:g}; {image.dtype} pixels go from {wanted}")
    pixels = (image * 255).round() if is_float else image
    return Image.fromarray(pixels.astype(np.uint8)).convert("RGB")


def _read_file(path: Path) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        # Pillow warns of a large picture before we can refuse it
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            file = Image.open(path)
        with file:
            return _converted(file, str(path))
    except UnidentifiedImageError:
        raise ValueError(f"{path} cannot be read by Pillow; give a png or jpeg file") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path}: {error}; make the picture smaller first") from None


def _converted(picture: Any, where: str) -> Any:
    """As RGB; the size is in the header, so a bomb is refused before it is unpacked."""
    width, height = picture.size
    _require_size(width, height, where)
    try:
        return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what Pillow's readers raise for broken pixel data
        raise ValueError(f"{where} is a picture that cannot be read to its end ({error}); save it again") from None


def _require_size(width: int, height: int, where: str) -> None:
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"{where} has {width} x {height} = {width * height / 1e6:.0f} megapixels; at most {MAX_PIXELS / 1e6:.0f} are "
            "read. Make it smaller first: no vision tower sees that many"
        )
