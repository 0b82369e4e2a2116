"""The preview's map from latents to colours."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate

from pyvideo_kernels.sampler.loop import decode
from pyvideo_kernels.sampler.preview import Projection, strip


def error(projection: Projection, latents: torch.Tensor, pixels: torch.Tensor) -> float:
    cells = interpolate(pixels[:1].movedim(-1, 1), size=latents.shape[-2:], mode="area")[0].movedim(0, -1)
    return float((projection(latents)[0] - cells).square().mean().sqrt())


def test_colours_are_those_of_the_decoded_film(pipe: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    coarse = torch.randn((1, 4, 3, 3), generator=generator)
    latents = interpolate(coarse, size=12, mode="nearest")[:, :, None].expand(-1, -1, 3, -1, -1).contiguous()
    pixels = decode(pipe, latents)
    assert pixels.std() > 0.05
    projection = Projection(pipe.vae, torch.device("cpu"))
    general = error(projection, latents, pixels)
    projection.refine(latents)
    refined = error(projection, latents, pixels)
    assert refined < 0.5 * float(pixels.std()) and refined <= general
    picture = strip(latents, projection)
    assert picture.shape == (132, 3 * 132, 3) and picture.dtype == np.uint8
    # Shuffled latents are another picture: the map depends on them.
    assert error(projection, latents.flip(-1), pixels) > refined
