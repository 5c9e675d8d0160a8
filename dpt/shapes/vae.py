"""The autoencoder of the `shapes` world: 8x down, 4 latent channels, trained on crops."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from tqdm import tqdm

from dpt.array_files import read_array, save_array
from dpt.images import to_images, to_pixels
from dpt.shapes.scenes import IMAGE_SIZE, Scene, render
from dpt.shapes.world import ShapesWorld


def make_vae(channels: list[int]) -> AutoencoderKL:
    """An `AutoencoderKL` of SD's topology with one block a level, random weights."""
    return AutoencoderKL(
        block_out_channels=tuple(channels),
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
    )


def vae_losses(
    vae: AutoencoderKL,
    world: ShapesWorld,
    step: int,
    *,
    batch_size: int,
    crop: int,
    kl_weight: float,
    latent_noise: float = 0.0,
) -> dict[str, torch.Tensor]:
    """L1 and squared error of pixels, L1 of edges, and a slight KL term, on crops that show an object.

    Edges are differences of neighbouring pixels; the squared error makes colours come early. Every other scene has any
    colours instead of the palette's, so that the latents tell colours apart rather than name them.

    Args:
        latent_noise: decoded latents get noise whose standard deviation is drawn from |N(0, latent_noise^2)| a picture.
    """
    pixels = []
    for k in range(batch_size):
        index = step * batch_size + k
        rng = world.generator(index, 8)
        _, scene = world.scene(index)
        if k % 2:
            scene = recolor(scene, rng)
        focus = scene.objects[0]
        x, y = (int(np.clip(v - rng.integers(0, crop), 0, IMAGE_SIZE - crop)) for v in (focus.x, focus.y))
        pixels.append(render(scene)[y : y + crop, x : x + crop])
    pixels = to_pixels(pixels)
    posterior = vae.encode(pixels).latent_dist
    generator = torch.Generator().manual_seed(step)
    latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
    if latent_noise:
        std = latent_noise * torch.randn((batch_size, 1, 1, 1), generator=generator).abs()
        latents = latents + std * torch.randn(latents.shape, generator=generator)
    decoded = vae.decode(latents).sample.float()
    edges = sum(F.l1_loss(decoded.diff(dim=d), pixels.diff(dim=d)) for d in (-1, -2))
    return {
        "loss_l1": F.l1_loss(decoded, pixels),
        "loss_l2": 4 * F.mse_loss(decoded, pixels),
        "loss_edges": edges,
        "loss_kl": kl_weight * posterior.kl().mean(),
    }


def recolor(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with uniformly random colours of objects and background."""
    colors = rng.integers(0, 256, (len(scene.objects) + 1, 3)).tolist()
    objects = tuple(replace(o, rgb=tuple(c)) for o, c in zip(scene.objects, colors[1:], strict=True))
    return Scene(objects, tuple(colors[0]))


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: list[np.ndarray]) -> list[np.ndarray]:
    """Images after an encode (to the mean) and decode round trip, uint8."""
    decoded = vae.decode(vae.encode(to_pixels(images)).latent_dist.mean).sample
    return list(to_images(decoded / 2 + 0.5))


def reconstruction_error(vae: AutoencoderKL) -> dict[str, float]:
    """Mean absolute error of 32 val scenes after a round trip, in levels of 255."""
    world = ShapesWorld("val")
    images = [render(world.scene(i)[1]) for i in range(32)]
    error = np.abs(np.stack(reconstruct(vae, images)).astype(int) - np.stack(images))
    return {"mean_error": float(error.mean()), "error_99": float(np.quantile(error, 0.99))}


@torch.no_grad()
def cache_latents(
    vae: AutoencoderKL, draw: Callable[[int], np.ndarray], folder: Path, *, key: str, count: int
) -> np.ndarray:
    """Posterior means and log-variances of the first `count` pictures, (count, 2 C, h, w) float16, unscaled.

    Written in chunks into a folder of this autoencoder and key; chunks already there are kept.

    Args:
        draw: picture number -> (H, W, 3) uint8.
        key: names the pictures of `draw`.
    """
    digest = hashlib.sha256(key.encode())
    for tensor in vae.state_dict().values():
        digest.update(tensor.float().cpu().numpy().tobytes())
    folder = folder / digest.hexdigest()[:12]
    parts = []
    for start in tqdm(range(0, count, 1000), desc="latents", mininterval=5):
        stop = min(start + 1000, count)
        path = folder / f"{start:07d}_{stop - start}.npy"
        if not path.exists():
            rows = []
            for first in range(start, stop, 50):
                pixels = to_pixels([draw(i) for i in range(first, min(first + 50, stop))])
                with torch.autocast(vae.device.type, torch.bfloat16):
                    rows.append(vae.encode(pixels.to(vae.device)).latent_dist.parameters.half().cpu().numpy())
            save_array(path, np.concatenate(rows))
        parts.append(read_array(path, (stop - start, 2 * vae.config.latent_channels, None, None)))
    return np.concatenate(parts)


@torch.no_grad()
def whiten(vae: AutoencoderKL, posteriors: np.ndarray) -> None:
    """Gives the latents zero mean and unit covariance, by a linear map folded into the 1x1 convolutions around them.

    As trained, their channels differ in scale and are correlated, and diffusion learns the weak directions late. The
    posterior's variance becomes a constant, its mean over the data.

    Args:
        posteriors: cached posteriors (N, 8, h, w) of the autoencoder as it is.
    """
    mean, logvar = np.split(posteriors.astype(np.float64), 2, axis=1)
    cells = mean.transpose(1, 0, 2, 3).reshape(4, -1)  # (4, N * h * w)
    center = cells.mean(1)
    values, vectors = np.linalg.eigh(np.cov(cells))
    forward = vectors @ np.diag(values**-0.5) @ vectors.T
    variance = forward**2 @ np.exp(np.clip(logvar, -30, 20)).mean((0, 2, 3))
    forward, center = torch.tensor(forward), torch.tensor(center)
    quant, post = vae.quant_conv, vae.post_quant_conv
    weight, bias = quant.weight[:4, :, 0, 0].double(), quant.bias[:4].double()
    quant.weight[:4, :, 0, 0] = (forward @ weight).float()
    quant.bias[:4] = (forward @ (bias - center)).float()
    quant.weight[4:] = 0
    quant.bias[4:] = torch.tensor(variance).log().float()
    weight = post.weight[:, :, 0, 0].double()
    post.bias += (weight @ center).float()
    post.weight[:, :, 0, 0] = (weight @ forward.inverse()).float()


def scene_latents(vae: AutoencoderKL, world: ShapesWorld, folder: Path, *, count: int) -> np.ndarray:
    """`cache_latents` of a world's scenes."""
    return cache_latents(vae, lambda i: render(world.scene(i)[1]), folder, key=world.key(), count=count)


class Latents:
    """Cached posteriors (N, 2 C, h, w) float16, sampled, shifted and scaled on access."""

    def __init__(self, posteriors: np.ndarray, scaling_factor: float, shift_factor: float = 0.0):
        self.posteriors, self.scaling_factor = torch.from_numpy(posteriors), scaling_factor
        self.shift_factor = shift_factor

    def __len__(self) -> int:
        return len(self.posteriors)

    def sample(self, indices: Sequence[int], generator: torch.Generator) -> torch.Tensor:
        """Scaled latents (B, C, h, w) float32."""
        posterior = DiagonalGaussianDistribution(self.posteriors[indices].float())
        return (posterior.sample(generator) - self.shift_factor) * self.scaling_factor


def measure_scaling_factor(latents: np.ndarray) -> float:
    """1 / standard deviation of latents sampled from cached (N, 8, H, W) posteriors."""
    mean, logvar = np.split(latents.astype(np.float32), 2, axis=1)
    return float(1 / np.sqrt(mean.var() + np.exp(np.clip(logvar, -30, 20)).mean()))
