"""DPT: the module that DDP wraps. One forward is one training step's losses.

Shapes: B samples, C latent channels, (h, w) latent size, L text tokens, E context width, P pooled text width,
T expression tokens, R width of the REC text encoder.
"""

import contextlib

import torch
from diffusers import SchedulerMixin, UNet2DConditionModel
from torch import nn

from dpt.adapter import DiscriminativeAdapter, itm_score
from dpt.config import LossWeights
from dpt.losses import denoising_loss, itm_loss, ranking_loss, rec_losses
from dpt.unet_features import Conditioning, unet_features

# The passes after (image, caption): which of (image, negative, random) is conditioned on which of (caption, negative,
# random); None is the referring expression.
EARLY_PASSES = ((0, None), (0, 1), (0, 2), (1, 0), (2, 0))


class DPT(nn.Module):
    """A U-Net (frozen, or with LoRA) and the adapter that reads it.

    Args:
        blocks: the probed blocks; see `unet_features`.
        train_unet: whether gradients reach the U-Net (tune) or stop at its features (probe).
        scheduler: says what timesteps mean to the denoising loss.
        rec_options: further arguments of `rec_losses`.
        auxiliary: add up REC's losses over all decoder layers.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        adapter: DiscriminativeAdapter,
        blocks: tuple[str, ...],
        scheduler: SchedulerMixin,
        *,
        train_unet: bool,
        weights: LossWeights | None = None,
        snr_gamma: float | None = None,
        rec_options: dict | None = None,
        itm_layer: int = -1,
        auxiliary: bool = False,
    ):
        super().__init__()
        self.unet, self.adapter, self.blocks, self.scheduler = unet, adapter, blocks, scheduler
        self.train_unet, self.weights = train_unet, weights or LossWeights()
        self.snr_gamma, self.rec_options, self.itm_layer = snr_gamma, rec_options or {}, itm_layer
        self.auxiliary = auxiliary

    def forward(self, batch: dict) -> dict[str, torch.Tensor]:
        """The losses of one step.

        Args:
            batch: `noisy_latents` (B, 3, C, h, w) of image, hard-negative and random image, all noised alike;
                `timesteps` (B,); `caption_context` (B, 3, L, E) and `caption_pooled` (B, 3, P) of the caption, its hard
                negative and a random one; for REC `expression_context` (B, L, E), `targets` and `num_boxes` as
                `rec_losses` takes them, and `token_states` (B, T, R) where there is contrastive alignment, and
                `token_valid` (B, T) where padding is left out of it; for denoising `noise_target` (B, C, h, w); to
                denoise the other images too, `negative_context` (B, 2, L, E), of captions of their own, and
                `negative_noise_target` (B, 2, C, h, w); for a control `itm_labels`, see `itm_loss`. `without_itm` is
                true where this step leaves matching out. `ranked` holds half-drawn pictures of G prompts, N of each:
                `noisy_latents` (G * N, C, h, w), `timesteps` (G * N,), their prompts' `context` (G * N, L, E) and
                `pooled` (G * N, P), and `values` (G, N), as `ranking_loss` takes them. It may stand alone.

        Returns:
            Named losses, unweighted, those whose weight is 0 left out.
        """
        ranked = self._ranking(batch["ranked"]) if "ranked" in batch else {}
        if "noisy_latents" not in batch:
            return ranked
        with_itm = self.weights.itm and not batch.get("without_itm", False)
        passes = self.early_passes(with_itm=with_itm)
        denoises = self.train_unet and bool(self.weights.denoise)
        if with_itm and denoises:
            passes.remove((0, 0))  # the full pass has it
        features, noise_pred = self.features(batch, passes, with_full=denoises)
        return self.losses(features, noise_pred, passes + [(0, 0)] * denoises, batch) | ranked

    def early_passes(self, *, with_itm: bool) -> list[tuple[int, int | None]]:
        """The passes that the weighted losses of the adapter need."""
        passes = [p for p in EARLY_PASSES if (self.weights.rec if p[1] is None else with_itm)]
        return passes + [(0, 0)] * with_itm

    def losses(
        self, features: list[torch.Tensor], noise_pred: torch.Tensor | None, passes: list, batch: dict
    ) -> dict[str, torch.Tensor]:
        """What `forward` returns, of the features of `passes` put together, and the noise prediction, if any."""
        weights, losses = self.weights, {}
        with_itm = any(text is not None and (image, text) != (0, 0) for image, text in passes)
        if with_itm or weights.rec:
            hs = self.adapter(features, batch["timesteps"].repeat(len(passes)))
            hs = dict(zip(passes, hs.chunk(len(passes), dim=1), strict=True))
        if with_itm:
            losses |= self._itm(hs, batch)
        if weights.rec:
            losses |= self._rec(hs[0, None], batch)
        if noise_pred is not None:
            losses |= self._denoising(noise_pred, batch)
        return {name: value for name, value in losses.items() if getattr(weights, name.removeprefix("loss_"))}

    def features(self, batch, passes, *, with_full):
        """Feature maps of the early passes as one batch, followed by those of the full pass, if there is one."""
        gradients = contextlib.nullcontext() if self.train_unet else torch.no_grad()
        timesteps, images, captions = batch["timesteps"], batch["noisy_latents"], batch["caption_context"]
        parts, noise_pred = [], None
        with gradients:
            if passes:
                latents = torch.cat([images[:, image] for image, _ in passes])
                contexts = [batch["expression_context"] if text is None else captions[:, text] for _, text in passes]
                repeated = timesteps.repeat(len(passes))
                conditioning = Conditioning(torch.cat(contexts))
                parts.append(unet_features(self.unet, self.blocks, latents, repeated, conditioning)[0])
            if with_full:
                conditioning = Conditioning(captions[:, 0])
                features, noise_pred = unet_features(
                    self.unet, self.blocks, images[:, 0], timesteps, conditioning, with_noise_pred=True
                )
                parts.append(features)
        return [torch.cat(maps) for maps in zip(*parts, strict=True)], noise_pred

    def _denoising(self, noise_pred, batch):
        target, timesteps = batch["noise_target"], batch["timesteps"]
        if "negative_context" in batch:
            latents, context = batch["noisy_latents"][:, 1:], batch["negative_context"]
            timesteps = torch.cat([timesteps, timesteps.repeat_interleave(2)])
            pairs = latents.flatten(0, 1), timesteps[len(target) :], Conditioning(context.flatten(0, 1))
            _, others = unet_features(self.unet, (), *pairs, with_noise_pred=True)
            noise_pred = torch.cat([noise_pred, others])
            target = torch.cat([target, batch["negative_noise_target"].flatten(0, 1)])
        return denoising_loss(noise_pred, target, timesteps, self.scheduler, snr_gamma=self.snr_gamma)

    def _itm(self, hs, batch):
        pooled = batch["caption_pooled"]

        def embeddings(passes):
            return torch.stack([self.adapter.itm_embeddings(hs[p], self.itm_layer) for p in passes], dim=1)

        return itm_loss(
            embeddings([(0, 0), (0, 1), (0, 2)]),
            pooled,
            embeddings([(0, 0), (1, 0), (2, 0)]),
            pooled[:, 0],
            self.adapter.itm_head.logit_scale.exp(),
            batch.get("itm_labels"),
        )

    def _rec(self, hs, batch):
        proj_tokens = None
        if self.weights.contrastive_align:
            proj_tokens = self.adapter.rec_head.project_tokens(batch["token_states"])
        layers = [
            rec_losses(
                self.adapter.rec_outputs(hs, layer),
                batch["targets"],
                proj_tokens=proj_tokens,
                token_valid=batch.get("token_valid"),
                num_boxes=batch.get("num_boxes"),
                **self.rec_options,
            )
            for layer in (range(len(hs)) if self.auxiliary else [-1])
        ]
        return {name: sum(losses[name] for losses in layers) for name in layers[0]}

    def _ranking(self, ranked):
        """The ranking loss of half-drawn pictures."""
        scores = self.rank_scores(ranked).unflatten(0, ranked["values"].shape)
        return {"loss_rank": ranking_loss(scores, ranked["values"], self.adapter.itm_head.logit_scale.exp())}

    def rank_scores(self, ranked: dict) -> torch.Tensor:
        """Matching scores (G * N,) of what `forward` takes as `ranked`."""
        hs = self.adapter(self.ranked_features(ranked), ranked["timesteps"])
        return itm_score(self.adapter.itm_embeddings(hs, self.itm_layer), ranked["pooled"])

    def ranked_features(self, ranked: dict) -> list[torch.Tensor]:
        """Feature maps of what `forward` takes as `ranked`, G * N each."""
        latents, context = ranked["noisy_latents"], Conditioning(ranked["context"])
        with contextlib.nullcontext() if self.train_unet else torch.no_grad():
            return unet_features(self.unet, self.blocks, latents, ranked["timesteps"], context)[0]

    @torch.no_grad()
    def evaluate(self, batch: dict, *, itm: bool = True, rec: bool = True) -> tuple[torch.Tensor | None, dict | None]:
        """What the adapter says of a batch as `forward` takes it.

        Returns:
            With `itm`, matching scores (B, 3): of image and caption, of the image and the negative caption, of the
            negative image and the caption. With `rec`, REC outputs of the image under the expression; see `RecHead`.
        """
        passes = [(0, 0), (0, 1), (1, 0)] * itm + [(0, None)] * rec
        features, _ = self.features(batch, passes, with_full=False)
        return self.outputs(features, passes, batch)

    @torch.no_grad()
    def outputs(
        self, features: list[torch.Tensor], passes: list, batch: dict
    ) -> tuple[torch.Tensor | None, dict | None]:
        """What `evaluate` returns, of the features of `passes` put together."""
        chunks = self.adapter(features, batch["timesteps"].repeat(len(passes))).chunk(len(passes), dim=1)
        scores = [
            itm_score(self.adapter.itm_embeddings(hs, self.itm_layer), batch["caption_pooled"][:, text])
            for hs, (_, text) in zip(chunks, passes, strict=True)
            if text is not None
        ]
        rec = self.adapter.rec_outputs(chunks[passes.index((0, None))]) if (0, None) in passes else None
        return torch.stack(scores, dim=1) if scores else None, rec
