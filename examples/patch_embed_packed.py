"""Images of different sizes as one row of tokens, and attention within each image: no resizing and no padding."""

import torch
import torch.nn.functional as F

import gpt4v_fast as gf

torch.manual_seed(0)
C, P, E, H, G = 3, 16, 256, 4, 14
images = [torch.randint(0, 256, (C, h, w), dtype=torch.uint8) for h, w in ((224, 224), (96, 320), (160, 64))]
weight = torch.randn(E, C, P, P) * 0.04
pos_embed = torch.randn(G * G, E)  # learnt on a grid of 14 x 14; other grids are interpolated bicubically

tokens, cu_seqlens, positions = gf.patch_embed_packed(images, weight, mean=0.5, std=0.5, pos_embed=pos_embed)


def pytorch(image: torch.Tensor) -> torch.Tensor:
    """The tokens of one image."""
    rows, columns = image.shape[1] // P, image.shape[2] // P
    grid = F.conv2d((image[None] / 255 - 0.5) / 0.5, weight, stride=P)
    table = pos_embed.T.reshape(1, E, G, G)
    if (rows, columns) != (G, G):
        table = F.interpolate(table, size=(rows, columns), mode="bicubic", align_corners=False)
    return (grid + table).flatten(2)[0].T


difference = (tokens - torch.cat([pytorch(image) for image in images])).abs().max()
print(f"tokens {tuple(tokens.shape)}, images begin at {cu_seqlens.tolist()}, largest difference: {difference:.1e}")
print(f"the last token is patch {tuple(positions[-1].tolist())} of its image")
padded = len(images) * max(len(pytorch(image)) for image in images)
print(f"rows for the encoder: {len(tokens)} packed, {padded} if every image were padded to the largest")

x = tokens.view(-1, H, E // H)  # (N, H, D); what an encoder's first layer would project to q, k and v
out = gf.attention_varlen(x, x, x, cu_seqlens, cu_seqlens)
print(f"attention within each image: {tuple(out.shape)}")
