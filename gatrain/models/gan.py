"""A small generative adversarial network for small images, made of layers that look at one sample at a time.

BatchNorm, which many such networks have, would make the result depend on the split.
"""

from __future__ import annotations

from torch import Tensor, nn


class SmallGAN(nn.Module):
    """``generator``: float ``[B, latents]`` -> images ``[B, 1, side, side]`` in [0, 1].
    ``discriminator``: images -> scores ``[B]``, above 0 for what it takes for real.

    Args:
        latents: random numbers that an image is made of.
        width: of the layer next to the latents and of the one before the score; twice as many next to the images.
        side: of the square images.
    """

    def __init__(self, latents: int = 16, width: int = 128, side: int = 8) -> None:
        super().__init__()
        self.latents = latents
        pixels = side * side
        self.generator = nn.Sequential(
            nn.Linear(latents, width),
            nn.LayerNorm(width),
            nn.ReLU(),
            nn.Linear(width, 2 * width),
            nn.LayerNorm(2 * width),
            nn.ReLU(),
            nn.Linear(2 * width, pixels),
            nn.Sigmoid(),
            nn.Unflatten(1, (1, side, side)),
        )
        self.discriminator = nn.Sequential(
            nn.Flatten(),
            nn.Linear(pixels, 2 * width),
            nn.LeakyReLU(0.2),
            nn.Linear(2 * width, width),
            nn.LeakyReLU(0.2),
            nn.Linear(width, 1),
            nn.Flatten(0),
        )

    def forward(self, latents: Tensor) -> Tensor:
        """Images for latents."""
        return self.generator(latents)  # type: ignore[no-any-return]
