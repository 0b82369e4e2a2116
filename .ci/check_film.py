"""check_film.py FILM PROMPT: the film opens, has the model's frame count, moves, and shows what the prompt says."""

import sys
from pathlib import Path

import av
import numpy as np

from pyvideo_kernels.tiny import checker, grammar

FRAMES = 17


def main() -> None:
    path, prompt = sys.argv[1:]
    if not Path(path).is_file():
        sys.exit(f"the last line printed is not a file: {path!r}")
    with av.open(path) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    if len(frames) != FRAMES:
        sys.exit(f"{path}: {len(frames)} frames, expected {FRAMES}")
    if frames[0].std() < 1 or np.abs(frames[0].astype(int) - frames[-1]).max() < 16:
        sys.exit(f"{path}: the film is constant")
    scene = grammar.parse(prompt)
    if scene is None:
        sys.exit(f"{prompt!r} is not a sentence of the embedded model")
    reading = checker.read(frames)
    wrong = [name for name, right in reading.agrees(scene).items() if not right]
    if wrong:
        sys.exit(f"{path}: {', '.join(wrong)} not as in {prompt!r}; the film shows {reading}")
    print(f"{path}: {len(frames)} frames of {frames.shape[2]}x{frames.shape[1]} that show {prompt!r}")


main()
