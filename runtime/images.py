"""Images as rows hold them, PIL, paths, bytes, URLs, and as processors take them: RGB, 8 bits, upright.

An image that is not what it seems is not used: one of several frames, in CMYK or in 16 bits would be trained on as
something else than its author saw. :attr:`ImageRules.convert` says that it may be converted. Nothing is fetched unless
:attr:`ImageRules.urls` says so.
"""

from __future__ import annotations

import base64
import binascii
import io
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .problems import BadRow, kind, shown

SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm"),
    *(".pgm", ".tga", ".ico", ".mpo"),
)
"""Of names that are taken for those of images, in columns whose names allow it. To ask PIL loads all of its readers."""
URL_SECONDS, URL_BYTES = 20, 50 * 2**20
"""For an answer, and of it, where URLs are fetched."""

_SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I")
_EIGHT_BITS = ("1", "L", "P", "RGB", "LA", "PA", "RGBA", "RGBX", "La", "RGBa")
_STILLS = ("MPO",)
"""Formats whose further frames belong to the first: other views or previews of a photograph."""


@dataclass(frozen=True)
class ImageRules:
    """What is done with images.

    Attributes:
        folder: where relative paths begin; None is the working directory.
        urls: fetch images that are given by a URL.
        convert: take an animation's first frame, and convert CMYK, 16 bits and other spaces of colour to RGB.
        resize: the most that an image may have: pixels of its longer side, or (width, height); it is reduced to fit,
            and keeps its proportions. None leaves the size to the model's processor.
    """

    folder: Path | None = None
    urls: bool = False
    convert: bool = False
    resize: int | tuple[int, int] | None = None


def stored(value: Any, rules: ImageRules) -> dict[str, Any]:
    """An image as a table holds it, once it has been read to its end.

    Args:
        value: as :func:`open_image` takes it.

    Returns:
        ``bytes`` of an image file, or its ``path``; the other is empty.

    Raises:
        BadRow: as :func:`open_image`.
    """
    data = _data(value, rules)
    with _opened(data) as image:
        _check(image, rules)
        if isinstance(data, Image.Image):
            return {"bytes": _encoded(_plain(image)), "path": ""}
        if image.format == "JPEG":
            image.draft(image.mode, (max(1, image.width // 8), max(1, image.height // 8)))  # all bytes, few pixels
        image.load()
    return {"bytes": b"", "path": str(data)} if isinstance(data, Path) else {"bytes": data, "path": ""}


def open_image(value: Any, rules: ImageRules) -> Image.Image:
    """An image, ready for a processor.

    Args:
        value: a PIL image, bytes of an image file, a path, a URL (``data:`` ones hold their image), or a mapping with
            ``bytes`` or ``path``, as data sets of the hub hold images.

    Returns:
        it in RGB, upright, on white where it was transparent, reduced as the rules say.

    Raises:
        BadRow: when there is none, it cannot be read, or the rules do not allow it.
    """
    with _opened(_data(value, rules)) as image:
        _check(image, rules)
        plain = _plain(image)
        return fitted(ImageOps.exif_transpose(plain) if plain is image else plain, rules)


def header_of(value: Any, rules: ImageRules) -> tuple[int, int]:
    """Width and height that an image's header gives, whose pixels are not read.

    Raises:
        BadRow: as :func:`open_image`, as far as the header tells.
    """
    with _opened(_data(value, rules)) as image:
        _check(image, rules)
        return image.size


def size_of(value: Any, rules: ImageRules) -> tuple[int, int]:
    """Width and height that :func:`open_image` would return, from the image's header."""
    with _opened(_data(value, rules)) as image:
        width, height = image.size
        if image.getexif().get(0x0112, 1) >= 5:  # lies on its side
            width, height = height, width
    return fitted_size(width, height, rules)


def fitted(image: Image.Image, rules: ImageRules) -> Image.Image:
    """An image, reduced as the rules say."""
    size = fitted_size(*image.size, rules)
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def fitted_size(width: int, height: int, rules: ImageRules) -> tuple[int, int]:
    if rules.resize is None:
        return width, height
    most = (rules.resize, rules.resize) if isinstance(rules.resize, int) else rules.resize
    scale = min(1.0, most[0] / width, most[1] / height)
    return max(1, round(width * scale)), max(1, round(height * scale))


# -- where it is -------------------------------------------------------------------------------------------------------


def _data(value: Any, rules: ImageRules) -> Image.Image | bytes | Path:
    """What an image is read from."""
    if isinstance(value, Mapping):
        # Values of columns that a row does not use are null, or empty.
        found = [value[name] for name in ("bytes", "path", "url", "image", "base64") if value.get(name)]
        if not found:
            raise BadRow("an image is null")
        return _data(found[0], rules)
    if isinstance(value, Image.Image | Path):
        return value if isinstance(value, Image.Image) else _in_folder(value, rules)
    if isinstance(value, bytes | bytearray | memoryview):
        if not len(value):
            raise BadRow("an image has no bytes")
        return bytes(value)
    if not isinstance(value, str) or not value.strip():
        raise BadRow("an image is null" if value is None or value == "" else f"{kind(value)} is no image")
    text = value.strip()
    scheme = text.partition(":")[0].lower()
    if scheme == "data":
        try:
            return base64.b64decode(text.partition(",")[2], validate=True)
        except binascii.Error as error:
            raise BadRow(f"the image {shown(text)} is no base64: {error}") from None
    if scheme in ("http", "https"):
        return _fetched(text, rules)
    return _in_folder(Path(text.removeprefix("file://")), rules)


def _in_folder(path: Path, rules: ImageRules) -> Path:
    path = path.expanduser()
    return path if rules.folder is None else rules.folder.absolute() / path


def _fetched(url: str, rules: ImageRules) -> bytes:
    if not rules.urls:
        raise BadRow(f"the image is a URL, {shown(url, 80)}, which is not fetched unless allow_image_urls says so")
    try:
        with urllib.request.urlopen(url, timeout=URL_SECONDS) as answer:
            data = answer.read(URL_BYTES + 1)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise BadRow(f"the image {shown(url, 80)} cannot be fetched: {error}") from None
    if len(data) > URL_BYTES:
        raise BadRow(f"the image {shown(url, 80)} has more than {URL_BYTES // 2**20} MB")
    return data


# -- what it is --------------------------------------------------------------------------------------------------------


@contextmanager
def _opened(data: Image.Image | bytes | Path) -> Iterator[Image.Image]:
    """The image, its errors as a row's; what is done inside may read pixels."""
    if isinstance(data, Image.Image):
        yield data
        return
    name = f"image {data}" if isinstance(data, Path) else "image"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as image:
                yield image
    except FileNotFoundError:
        raise BadRow(f"there is no {name}") from None
    except IsADirectoryError:
        raise BadRow(f"the {name} is a folder") from None
    except UnidentifiedImageError:
        raise BadRow(f"the {name} is no image that can be read, or is damaged") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise BadRow(f"the {name} has more than {Image.MAX_IMAGE_PIXELS:,} pixels") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what PIL's readers raise over damaged files
        raise BadRow(f"the {name} is damaged: {str(error) or type(error).__name__}") from None


def _check(image: Image.Image, rules: ImageRules) -> None:
    """Refuse what would be trained on as something else."""
    name = Path(str(getattr(image, "filename", "") or "")).name
    name = f"the image {name}" if name else "the image"
    if image.width < 1 or image.height < 1:
        raise BadRow(f"{name} has no pixels")
    if image.mode == "F":
        raise BadRow(f"{name} holds floating-point numbers, whose range nobody knows; save it in 8 bits")
    if rules.convert:
        return
    advice = "; convert_images takes it all the same"
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format not in _STILLS:
        raise BadRow(f"{name} has {frames} frames{advice}, the first of them")
    if image.mode in _SIXTEEN_BITS or _has_sixteen_bits(image):
        raise BadRow(f"{name} has 16 bits per colour, not 8{advice}, rounded")
    if image.mode not in _EIGHT_BITS:
        raise BadRow(f"{name} is in {image.mode}, not RGB or grey{advice}, converted")


def _has_sixteen_bits(image: Image.Image) -> bool:
    """Whether a file has more bits than PIL is going to read of it."""
    return any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))


def _plain(image: Image.Image) -> Image.Image:
    """In RGB with 8 bits; the same image where it is so."""
    if image.mode in _SIXTEEN_BITS:
        values = np.asarray(image, dtype=np.float64) / 257
        image = Image.fromarray(values.round().clip(0, 255).astype(np.uint8), "L")
    if image.mode in ("P", "PA", "LA", "RGBA", "La", "RGBa") and image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else ImageOps.exif_transpose(image).convert("RGB")


def _encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()
