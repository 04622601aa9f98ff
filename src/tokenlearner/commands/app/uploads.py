"""Files that visitors of the page upload: checked before they are decoded, then cut for a model.

The content decides what a file is, not its name. Nothing is kept on the disk of a file that is
refused, and of others what the page received.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ...data.dataset import UnreadableFile
from ...data.image_folder import decoded
from ...utils.files import open_image, open_video
from ...utils.imports import require_package
from ...utils.validation import check_count, require
from .._inputs import InputPipeline, MapInput

if TYPE_CHECKING:
    from PIL import Image

MIN_SIDE, MAX_ASPECT = 4, 20  # a strip would become huge when its short side is enlarged
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_ANIMATED = ("PNG", "WEBP", "GIF")
_CONTAINERS = "mov,matroska,avi"  # FFmpeg's names; it opens no playlist and no list of files
_KINDS = "an image (PNG, JPEG, WebP, GIF, BMP, TIFF) or a clip (MP4, MOV, WebM, MKV, AVI)"


class WrongModel(ValueError):
    """A file that another model may take."""


@dataclass(frozen=True, kw_only=True)
class UploadLimits:
    """Limits of an upload.

    Args:
        max_upload_mib: Size of a file that can be uploaded, in MiB.
        max_pixels: Of an image, or of a clip's frame.
        max_frames: Of a clip.
        max_seconds: Of a clip.

    Raises:
        ValueError: A number is below 1.
    """

    max_upload_mib: int = 32
    max_pixels: int = 25_000_000
    max_frames: int = 1800
    max_seconds: int = 120

    def __post_init__(self) -> None:
        for name in ("max_upload_mib", "max_pixels", "max_frames", "max_seconds"):
            check_count(name, getattr(self, name))


def read_upload(
    path: Path, pipeline: InputPipeline, limits: UploadLimits
) -> tuple[MapInput, list[str]]:
    """Checks a file and reads it as a model takes it.

    An image is turned upright as its EXIF data say. Of an animated image the first frame is taken.

    Args:
        path: The file; its name is only displayed.
        pipeline: How the model takes it.
        limits: What is refused.

    Returns:
        The image or clip, and remarks on what was left out or added.

    Raises:
        WrongModel: The model takes no images.
        ValueError: It is of another kind, too large, damaged, or not what the model takes.
    """
    mib, most = path.stat().st_size / 2**20, limits.max_upload_mib
    require(
        0 < mib <= most,
        f"{path.name} has {mib:.1f} MiB, expected more than 0, up to {most}; choose another file, "
        "or start the page with a larger --max_upload_mib",
    )
    image = _open_image(path, limits)
    return _read_video(path, pipeline, limits) if image is None else _decode(image, path, pipeline)


def delete_upload(path: Path) -> None:
    """Deletes a file, and the folder that was made for it."""
    with suppress(OSError):
        path.unlink()
        path.parent.rmdir()


def _open_image(path: Path, limits: UploadLimits) -> Image.Image | None:
    """Opens an image without decoding it; None if it is not of `IMAGE_FORMATS`."""
    from PIL import Image, UnidentifiedImageError

    try:
        image = open_image(path, IMAGE_FORMATS)
    except UnidentifiedImageError:
        with path.open("rb") as file:
            head = file.read(12)
        is_still = head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"mif1", b"avif")
        require(not is_still, f"{path.name} is a HEIC or AVIF image; save it as JPEG or PNG")
        return None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(_too_many_pixels(path.name, limits)) from error
    except Exception as error:  # as in `decoded`
        raise UnreadableFile(f"{path.name} cannot be read as an image; choose another") from error
    try:
        _check_size(path.name, image.size, limits)
    except ValueError:
        image.close()
        raise
    return image


def _decode(image: Image.Image, path: Path, pipeline: InputPipeline) -> tuple[MapInput, list[str]]:
    with image:
        if pipeline.takes_clips:
            raise WrongModel(
                f"{path.name} is an image, but this model takes clips of {pipeline.frames} frames; "
                "choose a clip, or another model"
            )
        animated = image.format in _ANIMATED and getattr(image, "is_animated", False)
        channels = pipeline.size[0]
        upright = decoded(lambda: image, path.name, channels)
    remarks = [f"{path.name} is animated; its first frame is shown."] if animated else []
    return pipeline.from_image(upright, path.name), remarks


def _read_video(
    path: Path, pipeline: InputPipeline, limits: UploadLimits
) -> tuple[MapInput, list[str]]:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "clip.mp4"  # of whatever container, which FFmpeg finds by content
        shutil.copyfile(path, file)
        n = _check_video(file, path.name, limits)
        try:
            clip = pipeline.read(file, path.name)
        except UnreadableFile as error:
            raise UnreadableFile(str(error).replace(str(file), path.name)) from error
    if n < pipeline.frames:
        remark = f"The clip has {n} frames; its last one is repeated up to {pipeline.frames}."
    else:
        steps = f"{pipeline.stride} apart" if pipeline.stride else "spread over all of it"
        remark = f"{pipeline.frames} of the clip's {n} frames are used, from its middle, {steps}."
    return clip, [remark]


def _check_video(file: Path, name: str, limits: UploadLimits) -> int:
    """Counts the frames of a video.

    Key frames, at which the size may change, are decoded; FFmpeg allocates none above the limit.

    Raises:
        ValueError: It has no frames, too many or too large ones, or cannot be read.
    """
    av = require_package("av", "video", f"{name} is no image that can be read, and a clip")
    count, sizes = 0, set[tuple[int, int]]()
    try:
        with open_video(file, _CONTAINERS) as container:
            stream, size = _check_header(container, name, limits)
            for packet in container.demux(stream):
                count += packet.size > 0
                require(
                    count <= limits.max_frames,
                    f"{name} has more than the {limits.max_frames} frames that are allowed; cut it",
                )
                with suppress(av.InvalidDataError):  # passed over, as where the clip is read
                    sizes |= {(frame.width, frame.height) for frame in packet.decode()}
                require(sizes <= {size}, f"{name} changes its size on the way; choose another clip")
    except (av.FFmpegError, OSError) as error:
        message = f"{name} is neither an image nor a clip that can be read; choose {_KINDS}"
        raise UnreadableFile(message) from error
    require(bool(sizes), f"{name} has no frames that can be decoded; choose another clip")
    return count


def _check_header(container: Any, name: str, limits: UploadLimits) -> tuple[Any, tuple[int, int]]:
    """Checks what a video says of itself; returns its stream, set to key frames, and its size."""
    import av

    require(len(container.streams.video) > 0, f"{name} has no images, only sound")
    seconds = (container.duration or 0) / av.time_base
    require(
        seconds <= limits.max_seconds,
        f"{name} lasts {seconds:.0f} seconds, {limits.max_seconds} are allowed; cut it",
    )
    stream = container.streams.video[0]
    codec = stream.codec_context
    require(codec is not None, f"there is no decoder for {name}; choose MP4")
    size = codec.width, codec.height
    _check_size(name, size, limits)
    codec.options = {"max_pixels": str(limits.max_pixels)}
    codec.skip_frame = "NONKEY"
    return stream, size


def _check_size(name: str, size: tuple[int, int], limits: UploadLimits) -> None:
    width, height = size
    if width * height > limits.max_pixels:
        raise ValueError(_too_many_pixels(f"{name}, {width} x {height},", limits))
    short, long = sorted(size)
    require(
        short >= MIN_SIDE and long <= MAX_ASPECT * short,
        f"{name} is {width} x {height} pixels, expected sides of {MIN_SIDE} or more, one at most "
        f"{MAX_ASPECT} times as long as the other; cut it",
    )


def _too_many_pixels(name: str, limits: UploadLimits) -> str:
    most = f"{limits.max_pixels / 1e6:g} million pixels"
    return f"{name} has more than the {most} that are allowed; make it smaller"
