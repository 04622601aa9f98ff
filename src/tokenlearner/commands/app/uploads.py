"""Uploads that a visitor of the page chose: checked before they are decoded, then read for a model.

What a file is, its first bytes say and not its name. Nothing of it is kept on the disk.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ...data.dataset import UnreadableFile
from ...data.image_folder import decoded
from ...utils.validation import check_count, require
from .._inputs import InputPipeline, MapInput

if TYPE_CHECKING:
    from PIL import Image

LEAST_SIDE, MOST_TIMES_AS_LONG = 4, 20  # a strip would become huge as its short side is enlarged
_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF")  # of images
_STARTS = {  # with what files of these kinds start
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"\x1aE\xdf\xa3": ".mkv",  # WebM too
}
_RIFF = {b"WEBP": "WEBP", b"AVI ": ".avi"}
_STILLS = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1")  # images in the form of videos
_CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi")  # as FFmpeg calls them
_KINDS = "an image (PNG, JPEG, WebP, GIF, BMP, TIFF) or a clip (MP4, MOV, WebM, MKV, AVI)"


@dataclass(frozen=True)
class UploadLimits:
    """What an upload may have at most.

    Args:
        mib: Size of the file, in MiB.
        pixels: Of an image, or of a frame.
        frames: Of a clip.
        seconds: Of a clip.

    Raises:
        ValueError: A number is below 1.
    """

    mib: int = 32
    pixels: int = 25_000_000
    frames: int = 1800
    seconds: int = 120

    def __post_init__(self) -> None:
        for name in ("mib", "pixels", "frames", "seconds"):
            check_count(name, getattr(self, name))


def read_upload(
    path: Path, intake: InputPipeline, limits: UploadLimits
) -> tuple[MapInput, list[str]]:
    """Checks a file and reads it as a model takes it.

    An image is turned as its EXIF data say. Of an image that moves the first frame is taken.

    Args:
        path: The file; its name is only shown.
        intake: How the model takes it.
        limits: What is refused.

    Returns:
        The image or clip, and sentences on what was done to it.

    Raises:
        ValueError: It is of another kind, too large, damaged, or not what the model takes.
    """
    name, kind = path.name, upload_kind(path, limits)
    is_video = kind.startswith(".")
    if not is_video:
        require(
            not intake.takes_clips,
            f"{name} is an image, but this model takes clips of {intake.frames} frames; choose a "
            "clip, or another model",
        )
        image, said = _read_image(path, kind, limits)
        return preprocess(image, name, intake), said
    with TemporaryDirectory() as folder:
        file = Path(folder) / f"clip{kind}"
        shutil.copyfile(path, file)
        try:
            n = _check_video(file, name, limits)
            return intake.read(file, name), _of_video(n, intake)
        except UnreadableFile as error:
            raise UnreadableFile(str(error).replace(str(file), name)) from error


def preprocess(image: Image.Image, name: str, intake: InputPipeline) -> MapInput:
    """Reads a decoded image as a model takes it."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "image.bmp"  # keeps every pixel, and is quick
        image.save(file)
        return intake.read(file, name)


def upload_kind(path: Path, limits: UploadLimits) -> str:
    """Names the kind of a file by its first bytes: PIL's format, or a video's extension.

    Raises:
        ValueError: It is empty, larger than allowed, or of no kind that is known.
    """
    size = path.stat().st_size
    require(size > 0, f"{path.name} is empty; choose {_KINDS}")
    require(
        size <= limits.mib * 2**20,
        f"{path.name} has {size / 2**20:.1f} MiB, {limits.mib} are allowed; choose a smaller file, "
        "or start the page with a larger --max_upload_mib",
    )
    with path.open("rb") as file:
        start = file.read(16)
    if start[4:8] == b"ftyp":
        still = start[8:12] in _STILLS
        require(not still, f"{path.name} is a HEIC or AVIF image; save it as JPEG or PNG")
        return ".mp4"
    if start[:4] == b"RIFF" and start[8:12] in _RIFF:
        return _RIFF[start[8:12]]
    found = next((kind for begin, kind in _STARTS.items() if start.startswith(begin)), "")
    require(
        bool(found), f"{path.name} is neither an image nor a clip by its content; choose {_KINDS}"
    )
    return found


def _read_image(path: Path, kind: str, limits: UploadLimits) -> tuple[Image.Image, list[str]]:
    """Decodes an image, in color, once its size is known to be allowed."""
    from PIL import Image

    try:
        image: Any = Image.open(path, formats=[kind])
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(_too_many_pixels(path.name, limits)) from error
    except Exception as error:  # as in `decoded`
        message = f"{path.name} starts like {kind}, but cannot be read ({error}); choose another"
        raise UnreadableFile(message) from error
    with image:
        _check_size(path.name, image.size, limits)
        moving = getattr(image, "n_frames", 1) if kind in ("GIF", "WEBP", "PNG") else 1
        upright = decoded(partial(_upright, image), path.name, 3)
    said = [f"{path.name} moves; its first frame of {moving} is shown."] if moving > 1 else []
    return upright, said


def _upright(image: Image.Image) -> Any:
    from PIL import ImageOps

    return ImageOps.exif_transpose(image)


def _check_video(file: Path, name: str, limits: UploadLimits) -> int:
    """Counts the frames of a video; decodes those at which its size may change, each within limits.

    Raises:
        ValueError: It has no frames, too many or too large ones, or cannot be read.
    """
    try:
        import av
        from av.error import FFmpegError
    except ImportError as error:
        message = "clips need PyAV; run pip install 'tokenlearner[video]', or choose an image"
        raise ValueError(message) from error
    try:
        with av.open(str(file), metadata_errors="ignore") as container:
            known = container.format.name in _CONTAINERS
            require(known, f"{name} is a video of another kind ({container.format.name})")
            require(len(container.streams.video) > 0, f"{name} has no images, only sound")
            seconds = (container.duration or 0) / av.time_base
            require(
                seconds <= limits.seconds,
                f"{name} lasts {seconds:.0f} seconds, {limits.seconds} are allowed; cut it",
            )
            _check_size(name, _size(container.streams.video[0]), limits)
            packets = (packet for packet in container.demux(video=0) if packet.size)
            n = sum(1 for _ in islice(packets, limits.frames + 1))
        require(n > 0, f"{name} has no frames; choose another clip")
        require(
            n <= limits.frames,
            f"{name} has more than {limits.frames} frames, which is the most allowed; cut it",
        )
        with av.open(str(file), metadata_errors="ignore") as container:
            _check_keyframes(container, name, limits)
    except (FFmpegError, OSError) as error:
        raise UnreadableFile(
            f"{name} cannot be read as a clip ({error}); choose another"
        ) from error
    return n


def _check_keyframes(container: Any, name: str, limits: UploadLimits) -> None:
    """Refuses a video whose frames grow on the way; FFmpeg allocates none above the limit."""
    from av.error import InvalidDataError

    stream = container.streams.video[0]
    stream.codec_context.options = {"max_pixels": str(limits.pixels)}
    stream.codec_context.skip_frame = "NONKEY"
    size, found = _size(stream), False
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except InvalidDataError:  # passed over, as where the clip is read
            continue
        for frame in frames:
            found = True
            same = (frame.width, frame.height) == size
            require(same, f"{name} changes its size on the way; choose another clip")
    require(found, f"{name} cannot be read as a clip: none of its frames can be decoded")


def _size(stream: Any) -> tuple[int, int]:
    require(stream.codec_context is not None, "there is no decoder for this clip; choose MP4")
    return stream.codec_context.width, stream.codec_context.height


def _check_size(name: str, size: tuple[int, int], limits: UploadLimits) -> None:
    width, height = size
    if width * height > limits.pixels:
        raise ValueError(_too_many_pixels(f"{name}, {width} x {height},", limits))
    short, long = sorted(size)
    require(
        short >= LEAST_SIDE and long <= MOST_TIMES_AS_LONG * short,
        f"{name} is {width} x {height} pixels, expected sides of {LEAST_SIDE} or more, one at most "
        f"{MOST_TIMES_AS_LONG} times as long as the other; cut it",
    )


def _too_many_pixels(what: str, limits: UploadLimits) -> str:
    most = f"{limits.pixels / 1e6:g} million pixels"
    return f"{what} has more than the {most} that are allowed; make it smaller"


def _of_video(n: int, intake: InputPipeline) -> list[str]:
    """Which frames of a video are looked at."""
    if n < intake.frames:
        return [f"The clip has {n} frames; its last one is repeated up to {intake.frames}."]
    steps = "spread over all of it" if not intake.stride else f"{intake.stride} apart"
    return [f"{intake.frames} of the clip's {n} frames are looked at, from its middle, {steps}."]
