"""Films as files: MP4 and WebM through PyAV, GIF, a folder of PNGs; chosen by the suffix. Torch-free.

A film is written beside its destination under a temporary name and renamed when it is whole, so the destination is
either what it was before or the whole new film.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from ..error_types import UsageError
from .problems import OutputError

# Encoders in order of preference, with their options. Constant quality; small films are worth the bits.
_CODECS: dict[str, tuple[tuple[str, dict[str, str]], ...]] = {
    ".mp4": (
        ("libx264", {"crf": "16", "preset": "medium"}),
        ("libopenh264", {"b": "8M"}),
        ("libx265", {"crf": "18", "x265-params": "log-level=error"}),
        ("libsvtav1", {"crf": "22"}),
        ("mpeg4", {"qscale": "2"}),
    ),
    ".webm": (
        ("libvpx-vp9", {"crf": "20", "b": "0", "row-mt": "1"}),
        ("libsvtav1", {"crf": "22"}),
        ("libaom-av1", {"crf": "22", "cpu-used": "6"}),
        ("libvpx", {"crf": "8", "b": "8M"}),
    ),
}
SUFFIXES = (".mp4", ".webm", ".gif", ".png")
_FRAME = "frame_{:05d}.png"


def kind_of(path: Path) -> str:
    """``.mp4``, ``.webm``, ``.gif``, or ``.png`` for a folder (``NAME/`` or ``NAME.png``)."""
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        return suffix
    if not suffix:
        return ".png"
    raise OutputError(
        f"--output {path}: {suffix} is not a format this writes; use .mp4, .webm, .gif, or NAME/ for PNGs"
    )


def destination(path: str | Path) -> Path:
    """Where a film really goes: ``NAME.png`` means the folder ``NAME``."""
    path = Path(path).expanduser()
    return path.with_suffix("") if path.suffix.lower() == ".png" else path


def check_output(path: str | Path) -> str:
    """Everything about the destination that can be known before there is a film; the encoder that will be used.

    Raises:
        OutputError: the folder cannot be written, or no encoder is there; names the remedy.
    """
    path = Path(path).expanduser()
    kind, target = kind_of(path), destination(path)
    if kind == ".png":
        if target.exists() and not target.is_dir():
            raise OutputError(f"--output {target} is a file; name a new folder for the PNGs")
        if target.is_dir() and any(not _is_frame(p.name) for p in target.iterdir()):
            raise OutputError(f"--output {target} holds other files; name a new folder for the PNGs")
    elif target.is_dir():
        raise OutputError(f"--output {target} is a folder; name a file in it")
    check_folder(target.parent, "output")
    return pick_codec(kind)[0] if kind in _CODECS else kind[1:]


def check_folder(folder: Path, option: str) -> None:
    """Make a folder, and see that files can be made in it; OutputError names the option it came from."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        why = error.strerror or error
        raise OutputError(f"{folder} cannot be written ({why}); choose another --{option}") from None


def _is_frame(name: str) -> bool:
    return name.startswith("frame_") and name.endswith(".png")


def pick_codec(kind: str) -> tuple[str, dict[str, str]]:
    """The first encoder of this machine's FFmpeg for a container."""
    try:
        import av
    except ImportError:
        raise OutputError("writing films needs PyAV: pip install 'pyvideo-kernels[sampler]', or use a .gif") from None
    for name, options in _CODECS[kind]:
        if _has_encoder(av, name):
            return name, options
    names = ", ".join(name for name, _ in _CODECS[kind])
    raise OutputError(f"FFmpeg has no encoder for {kind} here (looked for {names}); write a .gif or a folder of PNGs")


def _has_encoder(av: Any, name: str) -> bool:
    try:
        av.codec.Codec(name, "w")
    except (ValueError, av.error.FFmpegError):
        return False
    return True


def write_video(
    path: str | Path,
    frames: Any,
    fps: float,
    metadata: Mapping[str, Any] | None = None,
    *,
    upscale: int = 1,
    note: Callable[[str], None] = lambda text: None,
    on_frame: Callable[[int], None] = lambda index: None,
) -> Path:
    """Write a film; the format follows the suffix.

    Args:
        path: ``.mp4``, ``.webm``, ``.gif``, or a folder for PNGs (no suffix, or ``NAME.png`` for folder ``NAME``).
        frames: ``[T, H, W, 3]`` uint8.
        fps: frames per second; GIF rounds each frame's time to 10 ms and keeps the total.
        metadata: of the run; kept as JSON in the container's comment, the GIF's comment or each PNG's text.
        upscale: repeat every pixel this many times along both axes.
        note, on_frame: told what is worth knowing, and the index of each frame as it is encoded.
    Returns:
        The path that was written.
    Raises:
        OutputError: folder, encoder or disk; names the remedy. Nothing is left behind then.
    """
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not frames.shape[0]:
        raise OutputError(f"frames must be [T, H, W, 3] uint8 with T > 0; got {list(frames.shape)} {frames.dtype}")
    check_output(path)
    return encode(path, frames, fps, metadata, upscale=upscale, note=note, on_frame=on_frame)


def encode(
    path: str | Path,
    frames: Iterable[Any],
    fps: float,
    metadata: Mapping[str, Any] | None = None,
    *,
    upscale: int = 1,
    note: Callable[[str], None] = lambda text: None,
    on_frame: Callable[[int], None] = lambda index: None,
    settle: Callable[[Path], Path] = lambda target: target,
) -> Path:
    """`write_video` of frames ``[H, W, 3]`` as they come, to a path that `check_output` has passed.

    Args:
        settle: asked at the end, with the destination: where the film goes after all, in the same folder.
    """
    kind, target = kind_of(Path(path)), destination(path)
    text = json.dumps(dict(metadata or {}), ensure_ascii=False, sort_keys=True)

    def images() -> Iterator[Any]:
        for index, frame in enumerate(frames):
            if upscale > 1:
                frame = frame.repeat(upscale, 0).repeat(upscale, 1)
            yield np.ascontiguousarray(frame)
            on_frame(index)

    try:
        with _beside(target, folder=kind == ".png", settle=settle) as temporary:
            if kind == ".png":
                _write_pngs(temporary, images(), text)
            elif kind == ".gif":
                _write_gif(temporary, images(), fps, text)
            else:
                _write_av(temporary, images(), kind, fps, text, note)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"{target} could not be written ({error.strerror or error}); free some space or choose another --output"
        ) from error
    return settle(target)


@contextlib.contextmanager
def _beside(target: Path, *, folder: bool, settle: Callable[[Path], Path] = lambda target: target) -> Iterator[Path]:
    """A temporary path in the same folder that replaces ``settle(target)`` on success and vanishes on any failure."""
    # The suffix stays last: FFmpeg and PIL choose the format by it.
    suffix = "" if folder else target.suffix
    if folder:
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    else:
        handle, name = tempfile.mkstemp(prefix=f".{target.stem}.", suffix=suffix, dir=target.parent)
        os.close(handle)
        temporary = Path(name)
    try:
        yield temporary
        target = settle(target)
        # mkstemp makes private files; a film gets the permissions any new file would.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod((0o777 if folder else 0o666) & ~mask)
        if folder and target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            os.replace(target, old)
            os.replace(temporary, target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temporary, target)
    except BaseException:
        if folder:
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise


def _write_av(path: Path, images: Iterator[Any], kind: str, fps: float, text: str, note: Callable[[str], None]) -> None:
    import av

    codec, options = pick_codec(kind)
    preferred = _CODECS[kind][0][0]
    if codec != preferred:
        note(f"FFmpeg has no {preferred} here; writing {codec}")
    rate = Fraction(fps).limit_denominator(1001)
    # bitexact: no random identifiers, so that the same film is the same file.
    settings = {"fflags": "+bitexact"} | ({"movflags": "+faststart"} if kind == ".mp4" else {})
    try:
        with av.open(str(path), "w", format=kind[1:], options=settings) as container:
            container.metadata["comment"] = text
            stream: Any = None
            for image in images:
                # 4:2:0 needs even sizes: the last row or column is repeated where one is missing.
                image = np.pad(image, ((0, image.shape[0] % 2), (0, image.shape[1] % 2), (0, 0)), mode="edge")
                if stream is None:
                    if codec == "libx264" and min(image.shape[:2]) < 64:
                        # Its macroblock tree reads past frames of a few blocks: another file each time.
                        options = options | {"x264-params": "mbtree=0"}
                    stream = container.add_stream(codec, rate=rate, options=dict(options))
                    stream.height, stream.width = image.shape[:2]
                    stream.pix_fmt = "yuv420p"
                    context = stream.codec_context
                    # Say which colours these are: players guess otherwise, and guess by size.
                    context.color_primaries, context.color_trc, context.colorspace, context.color_range = 1, 1, 1, 1
                frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(
                    format="yuv420p", src_colorspace="ITU709", dst_colorspace="ITU709",
                    src_color_range="JPEG", dst_color_range="MPEG",
                )  # fmt: skip
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    except av.error.FFmpegError as error:
        if isinstance(error, OSError) and error.errno:
            raise OSError(error.errno, error.strerror) from error
        raise OutputError(f"FFmpeg's {codec} failed ({error}); write a .gif or a folder of PNGs") from error


def _write_gif(path: Path, images: Iterator[Any], fps: float, text: str) -> None:
    from PIL import Image

    pictures = [Image.fromarray(image).quantize(256, method=Image.Quantize.MEDIANCUT) for image in images]
    # Hundredths of a second, spread so that the whole keeps its length.
    ends = [round(100 * (i + 1) / fps) for i in range(len(pictures))]
    durations = [10 * max(2, end - start) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    pictures[0].save(
        path, format="GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0,
        comment=text.encode(), disposal=1,
    )  # fmt: skip


def _write_pngs(folder: Path, images: Iterator[Any], text: str) -> None:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("pyvideo", text)
    for index, image in enumerate(images):
        Image.fromarray(image).save(folder / _FRAME.format(index), pnginfo=info)


def write_bytes(path: Path, write: Callable[[Path], None]) -> Path:
    """Replace ``path`` by what ``write`` puts at a temporary path beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _beside(path, folder=False) as temporary:
        write(temporary)
    return path


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The run's metadata from a film this package wrote; empty for another."""
    path = Path(path)
    text: Any = None
    if path.is_dir() or path.suffix.lower() in (".gif", ".png"):
        from PIL import Image

        with Image.open(path / _FRAME.format(0) if path.is_dir() else path) as image:
            text = image.info.get("pyvideo") or image.info.get("comment")
    else:
        import av

        with av.open(str(path)) as container:
            tags = {key.lower(): value for key, value in container.metadata.items()}
            text = tags.get("comment")
    try:
        data = json.loads(text or "{}")
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}


def read_image(path: str | Path) -> Any:
    """A picture as RGB, or UsageError."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError, ValueError) as error:
        raise UsageError(f"--image {path} cannot be read ({error}); give a PNG, JPEG or WebP picture") from None
