"""Starting weights of a small SAM that already look where a prompt points.

With random projections the decoder's cross-attention first has to learn that a prompt's position
code and an image cell's position code are the same thing; until then, points teach nothing.
With equal query and key projections this holds from the start.
"""

import math

import torch
from segment_anything.modeling import Sam
from segment_anything.modeling.transformer import Attention

SHARPNESS = 1.6  # of attention between equal position codes
QUIET = 0.2  # scale of content embeddings against position codes


@torch.no_grad()
def initialise(sam: Sam) -> None:
    """Set the starting weights in place."""
    encoder, decoder = sam.image_encoder, sam.mask_decoder
    _, grid, _, width = encoder.pos_embed.shape
    encoder.pos_embed.copy_(0.3 * sine_positions(grid, width))
    patches = encoder.patch_embed.proj
    patches.weight.copy_(cosine_filters(width, patches.kernel_size[0]))
    patches.bias.zero_()
    transformer = decoder.transformer
    for layer in transformer.layers:
        _align(layer.cross_attn_token_to_image)
        _align(layer.cross_attn_image_to_token)
        layer.cross_attn_image_to_token.out_proj.weight.mul_(QUIET)  # keep what the encoder saw
    _align(transformer.final_attn_token_to_image)
    embeddings = [*sam.prompt_encoder.point_embeddings, sam.prompt_encoder.not_a_point_embed]
    for embedding in [*embeddings, sam.prompt_encoder.no_mask_embed]:
        embedding.weight.mul_(QUIET)
    encoder.neck[-1].weight.fill_(0.5)


def sine_positions(grid: int, width: int) -> torch.Tensor:
    """Sines and cosines of the column and row of each patch: 1 x grid x grid x width."""
    steps = torch.linspace(0, math.log(grid / 2), width // 4)
    angles = torch.arange(grid)[:, None] * torch.exp(steps) * math.pi / grid
    code = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns = code[None, :, :].expand(grid, grid, -1)
    rows = code[:, None, :].expand(grid, grid, -1)
    return torch.cat([columns, rows], dim=-1)[None]


def cosine_filters(width: int, side: int) -> torch.Tensor:
    """The lowest spatial frequencies of a patch in three opponent colours: width x 3 x side x side.

    A patch is seen at a lower resolution instead of through random noise. Higher frequencies,
    weaker in pictures, are amplified in proportion.
    """
    place = torch.arange(side) + 0.5
    waves = torch.cos(math.pi * torch.arange(side)[:, None] * place / side)
    pairs = [(row, column) for row in range(side) for column in range(side)]
    pairs.sort(key=lambda pair: pair[0] ** 2 + pair[1] ** 2)
    colours = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [-0.5, 1.0, -0.5]])
    colours = colours / colours.norm(dim=1, keepdim=True)
    filters = []
    for number in range(width):
        row, column = pairs[number // 3]
        wave = waves[row][:, None] * waves[column][None, :]
        scale = (1 + math.hypot(row, column)) / (side * wave.norm())
        filters.append(scale * wave * colours[number % 3][:, None, None])
    return torch.stack(filters)


def _align(attention: Attention) -> None:
    scale = SHARPNESS / math.sqrt(attention.embedding_dim)
    attention.q_proj.weight.normal_(std=scale)
    attention.k_proj.weight.copy_(attention.q_proj.weight)
    attention.q_proj.bias.zero_()
    attention.k_proj.bias.zero_()
