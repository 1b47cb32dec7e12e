"""The generator written down in PyTorch, as plainly as it goes, for the benchmarks to compare with.

Parameters carry the published names (`Generator.to_torch`, without "transformer."). Shapes: B sequences of S positions,
C channels; R = B rows, or 2 B under guidance, first all with their class and then all without; V vocabulary.
"""

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON, ROTARY_BASE = 1e-5, 10_000.0


def rotary_table(grid: tuple[int, int], head_channels: int) -> Tensor:
    """cos and sin [2, 1 + h w, D / 2]; both zero for the class token."""
    pairs = head_channels // 4
    frequencies = ROTARY_BASE ** (-torch.arange(pairs) / pairs)
    place = torch.cartesian_prod(*(torch.arange(side) for side in grid))
    angles = (place[:, :, None] * frequencies).flatten(1)
    return F.pad(torch.stack((angles.cos(), angles.sin())), (0, 0, 1, 0))


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """x [B, S, heads, D], table [2, S, D / 2]."""
    cos, sin = table[:, :, None]
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int, dropout: float):
        super().__init__()
        self.split, self.channels = (heads, kv_heads, kv_heads), width // heads
        self.wqkv = nn.Linear(width, sum(self.split) * self.channels, bias=False)
        self.wo = nn.Linear(width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, table: Tensor, cache: tuple[Tensor, Tensor] | None, mask: Tensor | None) -> Tensor:
        """Without a cache causal; with one (keys and values [R, G, S, D]), x is one position, and `mask` [1, S] is
        what it sees: the last of it is its own."""
        query, key, value = self.wqkv(x).unflatten(-1, (-1, self.channels)).split(self.split, dim=2)
        query, key, value = (t.transpose(1, 2) for t in (rotate(query, table), rotate(key, table), value))
        if cache is not None:
            position = int(mask.sum()) - 1
            for kept, new in zip(cache, (key, value), strict=True):
                kept[:, :, position] = new[:, :, 0]
            key, value = cache
        gqa = self.split[0] != self.split[1]
        out = F.scaled_dot_product_attention(query, key, value, mask, is_causal=cache is None, enable_gqa=gqa)
        return self.dropout(self.wo(out.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    def __init__(self, width: int, dropout: float):
        super().__init__()
        hidden = -(-(8 * width // 3) // 256) * 256
        self.w1, self.w3 = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int, dropout: float):
        super().__init__()
        self.attention = Attention(width, heads, kv_heads, dropout)
        self.feed_forward = FeedForward(width, dropout)
        self.attention_norm, self.ffn_norm = (nn.RMSNorm(width, eps=EPSILON) for _ in range(2))
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def modulation(self, condition: Tensor) -> tuple[Tensor, ...]:
        """Six vectors [B, 1, C] for the classes' embeddings [B, C]."""
        return self.ada_lin(condition)[:, None].chunk(6, dim=-1)

    def forward(self, x: Tensor, modulation: tuple[Tensor, ...], table: Tensor, cache=None, mask=None) -> Tensor:
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation
        x = x + gamma1 * self.attention(self.attention_norm(x) * (1 + scale1) + shift1, table, cache, mask)
        return x + gamma2 * self.feed_forward(self.ffn_norm(x) * (1 + scale2) + shift2)


class Head(nn.Module):
    """What stands before the head's product."""

    def __init__(self, width: int):
        super().__init__()
        self.rmsnorm = nn.RMSNorm(width, eps=EPSILON)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, modulation: tuple[Tensor, Tensor]) -> Tensor:
        scale, shift = modulation
        return self.rmsnorm(x) * (1 + scale) + shift

    def modulation(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        return self.ada_lin(condition)[:, None].chunk(2, dim=-1)


class TorchGenerator(nn.Module):
    """The model of numbered layers; its arguments are `GeneratorModel`'s."""

    def __init__(
        self, *, vocabulary: int, grid: tuple[int, int], num_classes: int, layers: int, heads: int, kv_heads: int,
        width: int, dropout: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        self.num_classes, self.positions = num_classes, grid[0] * grid[1]
        self.cache_shape = kv_heads, self.positions, width // heads
        self.tok_emb = nn.Embedding(vocabulary, width)
        self.class_emb = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + 1, width)})
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, kv_heads, dropout) for _ in range(layers))
        self.head_nm = Head(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.register_buffer("table", rotary_table(grid, width // heads), persistent=False)

    @classmethod
    def like(cls, model, tensors: Mapping[str, np.ndarray], dropout: float = 0.0) -> "TorchGenerator":
        """Of the sizes of `model`, a `GeneratorModel`, with the weights that `Generator.to_torch` gives."""
        fields = "vocabulary", "grid", "num_classes", "layers", "heads", "kv_heads", "width"
        with torch.device("meta"):
            module = cls(**{field: getattr(model, field) for field in fields}, dropout=dropout)
        own = {name.removeprefix("transformer."): torch.from_numpy(array) for name, array in tensors.items()}
        module.load_state_dict(own, assign=True)
        module.table = rotary_table(model.grid, model.head_channels)
        return module.requires_grad_().train(dropout > 0)

    def forward(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Logits [B, S, V] of codes [B, S], teacher forced."""
        condition = self.class_emb["embedding_table"](labels)
        x = self.dropout(torch.cat((condition[:, None], self.tok_emb(codes[:, :-1])), dim=1))
        table = self.table[:, : x.shape[1]]
        for block in self.blocks:
            x = block(x, block.modulation(condition), table)
        return self.head(self.head_nm(x, self.head_nm.modulation(condition)))

    def loss(self, codes: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self(codes, labels).flatten(0, 1), codes.flatten())

    @torch.inference_mode()
    def sample(self, labels: Tensor, scale: float, temperature: float, length: int | None = None) -> Tensor:
        """Codes [B, length] of pictures; with scale 1, "no class" is never evaluated, and temperature 0 is greedy."""
        guided = scale != 1
        rows = torch.cat((labels, torch.full_like(labels, self.num_classes))) if guided else labels
        condition = self.class_emb["embedding_table"](rows)
        modulations = [block.modulation(condition) for block in self.blocks]
        head = self.head_nm.modulation(condition)
        caches = [tuple(torch.zeros(len(rows), *self.cache_shape) for _ in range(2)) for _ in self.blocks]
        seen = torch.tril(torch.ones(self.positions, self.positions, dtype=torch.bool))
        x, codes = condition[:, None], []
        for position in range(length or self.positions):
            table, mask = self.table[:, position : position + 1], seen[position : position + 1]
            for block, modulation, cache in zip(self.blocks, modulations, caches, strict=True):
                x = block(x, modulation, table, cache, mask)
            logits = self.head(self.head_nm(x, head))[:, 0]
            if guided:
                with_class, without = logits.chunk(2)
                logits = without + (with_class - without) * scale
            if temperature:
                drawn = torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1)
            else:
                drawn = logits.argmax(dim=-1, keepdim=True)
            codes.append(drawn)
            x = self.tok_emb(torch.cat((drawn, drawn)) if guided else drawn)
        return torch.cat(codes, dim=1)
