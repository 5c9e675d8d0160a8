"""Controls of self-correction, which only experiments need.

A control is a `dpt.drawing.Method`: it takes the place of the guidance method that the settings ask for.
"""

from dataclasses import replace

import numpy as np
import torch

from dpt.adapter.adapter import DiscriminativeAdapter, Scorer
from dpt.backbones.stable_diffusion import StableDiffusion
from dpt.drawing import Method
from dpt.guidance.self_correction import SelfCorrection
from dpt.sampling import initial_noise


class RandomDirection(SelfCorrection):
    """A step as long as the gradient's, in a direction that is drawn anew at each step.

    Args:
        seeds: of the images.
    """

    def __init__(self, *args, seeds: list[int]):
        super().__init__(*args)
        self.seeds = seeds

    def direction(self, gradient, gradient_norm, step):
        """A vector of the gradient's length (B,) for each image, by its seed and the step."""
        states = [np.random.SeedSequence((seed, step, 1)).generate_state(1, np.uint32)[0] for seed in self.seeds]
        noise = initial_noise([int(state) for state in states], tuple(gradient.shape[1:])).to(gradient.device)
        return noise * (gradient_norm / noise.flatten(1).norm(dim=1))[:, None, None, None]


def random_direction(scorer: Scorer) -> Method:
    """Self-correction in a random direction."""
    return lambda guidance, sampling, prompts, seeds, trace: RandomDirection(
        guidance, scorer, sampling, trace, seeds=seeds
    )


def another_prompt(sd: StableDiffusion, scorer: Scorer, texts: list[str]) -> Method:
    """Self-correction along another prompt's score: that of the prompt half the set further on.

    Args:
        texts: of the whole set.
    """
    another = dict(zip(texts, texts[len(texts) // 2 :] + texts[: len(texts) // 2], strict=True))

    def method(guidance, sampling, prompts, seeds, trace):
        size = sd.picture_size(sampling.height, sampling.width)
        conditioning = sd.condition([another[prompt] for prompt in prompts], size=size)
        conditioning = conditioning.with_guidance(sampling.distilled_guidance)
        return SelfCorrection(guidance, scorer, sampling, trace, conditioning)

    return method


def untrained(scorer: Scorer) -> Scorer:
    """A scorer of the same kind whose adapter has random weights, the same on every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapter = DiscriminativeAdapter(scorer.adapter.config)
    device = next(scorer.adapter.parameters()).device
    return replace(scorer, adapter=adapter.to(device).eval().requires_grad_(False))
