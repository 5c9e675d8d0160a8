"""Names and sizes of a denoiser's blocks, from its config. Imports nothing heavy.

Of a U-Net they are `down0..3`, `mid`, `up0..3`; of a transformer `block0`, `block1`, ..., and of FLUX, behind these,
`single0`, `single1`, .... A feature is one block, several joined by "+", or of a U-Net `all`. `latents`, for
comparison, is the denoiser's input.
"""

LATENTS = "latents"
FLUX_SAMPLE_SIZE = 128
"""cells of a latent each way that `FluxPipeline` draws by default; its transformer has no size of its own"""


def is_transformer(config) -> bool:
    """Whether a denoiser's config is that of a transformer."""
    return not hasattr(config, "down_block_types")


def is_flux(config) -> bool:
    """Whether a denoiser's config is of FLUX, whose latents come packed."""
    return hasattr(config, "num_single_layers")


def block_names(config) -> list[str]:
    """Names of all blocks of a denoiser of that config, in the order in which they are run."""
    if is_transformer(config):
        single = getattr(config, "num_single_layers", 0)
        return [f"block{i}" for i in range(config.num_layers)] + [f"single{i}" for i in range(single)]
    downs, ups = len(config.down_block_types), len(config.up_block_types)
    return [f"down{i}" for i in range(downs)] + ["mid"] + [f"up{i}" for i in range(ups)]


def parse_feature(feature: str, config, field: str = "feature") -> tuple[str, ...]:
    """The blocks that a feature name stands for, in the order in which they are concatenated.

    Args:
        feature: such as "up1", "down1+up0" or "all".
        config: the denoiser's config, which says how many blocks there are.
        field: the setting that it is, for messages.

    Raises:
        ValueError: a block that the denoiser lacks, or one named twice.
    """
    known = block_names(config)
    if feature == "all" and not is_transformer(config):
        return tuple(known)
    if feature == LATENTS:
        return (LATENTS,)
    blocks = tuple(feature.split("+"))
    for block in blocks:
        if block not in known:
            raise ValueError(
                f"{field} is {feature!r}; its blocks must be among {', '.join(known)}, joined by '+'; or it is "
                + ("latents" if is_transformer(config) else "all, or latents")
            )
    if len(set(blocks)) < len(blocks):
        raise ValueError(f"{field} is {feature!r}; it names a block twice")
    return blocks


def block_channels(block: str, config) -> int:
    """Channels of a block's output."""
    if block == LATENTS:
        return config.in_channels // 4 if is_flux(config) else config.in_channels
    if is_transformer(config):
        return config.num_attention_heads * config.attention_head_dim
    channels = config.block_out_channels
    if block == "mid":
        return channels[-1]
    index = int(block.removeprefix("down").removeprefix("up"))
    return channels[index] if block.startswith("down") else channels[::-1][index]


def block_side(block: str, config) -> int:
    """Sides of a block's map for the picture that the model draws by default."""
    if is_transformer(config):
        return (FLUX_SAMPLE_SIZE if is_flux(config) else config.sample_size) // patch_size(config)
    last = len(config.block_out_channels) - 1
    # an output is sampled down or up already, but for the last block's
    halvings = {LATENTS: 0, "mid": last}
    halvings |= {f"down{i}": min(i + 1, last) for i in range(last + 1)}
    halvings |= {f"up{i}": max(last - 1 - i, 0) for i in range(last + 1)}
    return config.sample_size >> halvings[block]


def patch_size(config) -> int:
    """Side, in latent cells, of the patch that a transformer's token stands for."""
    return 2 if is_flux(config) else config.patch_size


def block_prefix(block: str) -> str:
    """The beginning of the names of a block's modules: "up_blocks.1." for up1."""
    name = block.rstrip("0123456789")
    tables = {"mid": "mid_block", "block": "transformer_blocks", "single": "single_transformer_blocks"}
    return ".".join(filter(None, [tables.get(name, f"{name}_blocks"), block.removeprefix(name)])) + "."
