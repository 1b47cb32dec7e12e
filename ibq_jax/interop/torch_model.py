"""IBQ's tokenizer and generator in PyTorch: one file to copy, which needs torch (and safetensors to load such files).

    from torch_model import load
    tokenizer, generator = load("tokenizer.safetensors"), load("generator.safetensors")
    codes = tokenizer.encode(images)           # float [B, 3, H, W] in [-1, 1] -> int64 [B, h, w]
    codes = generator.sample(labels)           # int64 [B] -> int64 [B, h, w]
    images = tokenizer.decode(codes)           # -> float [B, 3, H, W]; clamp to [-1, 1] before display

Parameters have the names of the published checkpoints (arXiv 2412.02692), so `load_state_dict(strict=True)` accepts
those and the files that `python -m ibq_jax convert` writes.

Shapes: B images, C channels; D dimensions of a code, K codes. In the generator: S = h w positions, V vocabulary size,
and R rows: B, or 2 B under guidance, where all rows with their class come before all rows without.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_GROUPS = 32
RMS_EPSILON, ROTARY_BASE, HIDDEN_MULTIPLE = 1e-5, 10_000.0, 256
TOKENS_AT_ONCE = 1024  # tokens whose logits [tokens, K] are in memory together


def load(path: str | Path, weights: str = "") -> nn.Module:
    """Loads a tokenizer or a generator from a file of `convert` (.safetensors, .pt, .ckpt).

    Args:
        path: the file.
        weights: "raw", or "ema" for the averages under `model_ema.`; "" takes the averages if the file has them.

    Returns:
        the module in evaluation mode, on the CPU.

    Raises:
        ValueError: the file does not say how large its networks are.
        KeyError: "ema" is asked for, and the file has no averages.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            about, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    else:
        content = torch.load(path, map_location="cpu", weights_only=True)
        about, tensors = content.get("metadata", {}), content["state_dict"]
    if "architecture" not in about:
        raise ValueError(
            f"{path} does not say how large its networks are; `python -m ibq_jax convert` writes files that do"
        )
    architecture = json.loads(about["architecture"])
    with torch.device("meta"):
        module = (Tokenizer if "ddconfig" in architecture else Generator).of(architecture)
    module.load_state_dict(own_tensors(module, tensors, weights), assign=True)
    return module.materialize().requires_grad_(False).eval()


def own_tensors(module: nn.Module, tensors: Mapping[str, Tensor], weights: str = "") -> dict[str, Tensor]:
    """Returns the tensors of a file that belong to `module`, under its names. Raises KeyError if "ema" is absent."""
    if isinstance(module, Generator):
        prefix = "transformer." if any(name.startswith("transformer.") for name in tensors) else ""
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith("first_stage_model.")}
        return {name.removeprefix(prefix): tensor for name, tensor in own.items()}
    averaged = {name: "model_ema." + name.replace(".", "") for name in module.state_dict()}
    if weights == "ema" or (not weights and all(name in tensors for name in averaged.values())):
        return {name: tensors[stored] for name, stored in averaged.items()}
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(("loss.", "model_ema."))}


# ---- the tokenizer ---------------------------------------------------------------------------------------------------


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(NORM_GROUPS, channels, eps=1e-6)


class ResidualBlock(nn.Module):
    def __init__(self, channels: int, features: int):
        super().__init__()
        self.norm1, self.conv1 = norm(channels), nn.Conv2d(channels, features, 3, padding=1)
        self.norm2, self.conv2 = norm(features), nn.Conv2d(features, features, 3, padding=1)
        if channels != features:
            self.nin_shortcut = nn.Conv2d(channels, features, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class SpatialAttention(nn.Module):
    """Every position attends to every other, with one head."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        query, key, value = (layer(normed).flatten(2).mT[:, None] for layer in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(query, key, value)  # [B, 1, h w, C]: ONNX knows it with heads only
        return x + self.proj_out(attended.mT.reshape(x.shape))


class Middle(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.block_1, self.block_2 = (ResidualBlock(channels, channels) for _ in range(2))
        self.attn_1 = SpatialAttention(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Resample(nn.Module):
    """Halves or doubles the resolution."""

    def __init__(self, channels: int, up: bool):
        super().__init__()
        self.up, self.conv = up, nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=1 if up else 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0) if self.up else F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    """The blocks of one resolution."""

    def __init__(self, channels: int, features: int, blocks: int, attend: bool):
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(features if i else channels, features) for i in range(blocks))
        self.attn = nn.ModuleList(SpatialAttention(features) for _ in range(blocks if attend else 0))

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return x


class Encoder(nn.Module):
    def __init__(
        self, *, ch: int, ch_mult: Sequence[int], num_res_blocks: int, attn_resolutions: Sequence[int],
        z_channels: int, resolution: int, **_,
    ):  # fmt: skip
        super().__init__()
        self.conv_in, self.down = nn.Conv2d(3, ch, 3, padding=1), nn.ModuleList()
        channels = ch
        for i, multiplier in enumerate(ch_mult):
            level = Level(channels, ch * multiplier, num_res_blocks, resolution // 2**i in attn_resolutions)
            channels = ch * multiplier
            if i < len(ch_mult) - 1:
                level.downsample = Resample(channels, up=False)
            self.down.append(level)
        self.mid, self.norm_out = Middle(channels), norm(channels)
        self.conv_out = nn.Conv2d(channels, z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
            x = level.downsample(x) if hasattr(level, "downsample") else x  # pyright: ignore[reportCallIssue]
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(
        self, *, ch: int, ch_mult: Sequence[int], num_res_blocks: int, attn_resolutions: Sequence[int],
        z_channels: int, resolution: int, **_,
    ):  # fmt: skip
        super().__init__()
        channels = ch * ch_mult[-1]
        self.conv_in, self.mid = nn.Conv2d(z_channels, channels, 3, padding=1), Middle(channels)
        levels = []
        for i, multiplier in reversed(list(enumerate(ch_mult))):
            level = Level(channels, ch * multiplier, num_res_blocks + 1, resolution // 2**i in attn_resolutions)
            channels = ch * multiplier
            if i:
                level.upsample = Resample(channels, up=True)
            levels.append(level)
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out, self.conv_out = norm(channels), nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
            x = level.upsample(x) if hasattr(level, "upsample") else x  # pyright: ignore[reportCallIssue]
        return self.conv_out(F.silu(self.norm_out(x)))


class Codebook(nn.Module):
    def __init__(self, codes: int, dim: int, l2_normalize: bool = False):
        super().__init__()
        self.embedding, self.l2_normalize = nn.Embedding(codes, dim), l2_normalize

    def vectors(self, rows: Tensor) -> Tensor:
        return F.normalize(rows, dim=-1) if self.l2_normalize else rows

    def forward(self, z: Tensor) -> Tensor:
        """Returns the codes [B, h, w] with the largest inner product with latents [B, D, h, w]; ties take the first."""
        chunks, rows = z.permute(0, 2, 3, 1).flatten(0, 2).split(TOKENS_AT_ONCE), self.vectors(self.embedding.weight)
        return torch.cat([(chunk @ rows.T).argmax(1) for chunk in chunks]).reshape(len(z), *z.shape[2:])


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Turns TF32 off inside. On GPUs PyTorch uses it for convolutions by default, which changes codes."""
    backends = torch.backends
    convolutions = getattr(backends.cudnn, "conv", None)
    if convolutions is not None:  # since PyTorch 2.9, which refuses a mix of the two ways
        owners, name, value = (convolutions, backends.cuda.matmul), "fp32_precision", "ieee"
    else:
        owners, name, value = (backends.cudnn, backends.cuda.matmul), "allow_tf32", False
    before = [getattr(owner, name) for owner in owners]
    try:
        for owner in owners:
            setattr(owner, name, value)
        yield
    finally:
        for owner, old in zip(owners, before, strict=True):
            setattr(owner, name, old)


class Tokenizer(nn.Module):
    """Turns images into codes and codes into images."""

    def __init__(self, ddconfig: Mapping, n_embed: int, embed_dim: int, l2_normalize: bool = False, **_):
        super().__init__()
        self.encoder, self.decoder = Encoder(**ddconfig), Decoder(**ddconfig)
        self.quantize = Codebook(n_embed, embed_dim, l2_normalize)
        self.quant_conv = nn.Conv2d(ddconfig["z_channels"], embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(embed_dim, ddconfig["z_channels"], 1)

    @classmethod
    def of(cls, architecture: Mapping) -> "Tokenizer":
        """Builds the module from a configuration in the published format."""
        return cls(**architecture)

    def materialize(self) -> "Tokenizer":
        """Returns the module; every tensor of a tokenizer comes from the file."""
        return self

    def latent(self, images: Tensor) -> Tensor:
        """Returns the latents [B, D, h, w] of images [B, 3, H, W] in [-1, 1]."""
        return self.quant_conv(self.encoder(images))

    @full_float32()
    def encode(self, images: Tensor) -> Tensor:
        """Returns the codes [B, h, w] of images [B, 3, H, W] in [-1, 1], without TF32."""
        return self.quantize(self.latent(images))

    def decode(self, codes: Tensor) -> Tensor:
        """Returns the images [B, 3, H, W] of codes [B, h, w], not clamped."""
        vectors = self.quantize.vectors(self.quantize.embedding(codes))
        return self.decoder(self.post_quant_conv(vectors.permute(0, 3, 1, 2)))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.decode(codes := self.encode(images)), codes


# ---- the generator ---------------------------------------------------------------------------------------------------


def rotary_table(grid: tuple[int, int], head_channels: int) -> Tensor:
    """Returns cos and sin [2, 1 + h w, channels / 2] of rows, then columns; zero for the class token, as released."""
    pairs = head_channels // 4
    frequencies = ROTARY_BASE ** (-torch.arange(pairs, device="cpu") / pairs)
    place = torch.cartesian_prod(*(torch.arange(side, device="cpu") for side in grid))
    angles = (place[:, :, None] * frequencies).flatten(1)
    return F.pad(torch.stack((angles.cos(), angles.sin())), (0, 0, 1, 0))


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotates neighbouring pairs of channels of x [R, S, heads, channels] by a table [2, S, channels / 2]."""
    cos, sin = table[:, :, None]
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


class CausalAttention(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int, dropout: float):
        super().__init__()
        self.split, self.channels = (heads, kv_heads, kv_heads), width // heads
        self.wqkv = nn.Linear(width, sum(self.split) * self.channels, bias=False)
        self.wo = nn.Linear(width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, table: Tensor, cache: tuple[Tensor, Tensor] | None, mask: Tensor | None) -> Tensor:
        """Returns the attention's output [R, S, width].

        Without a cache, attention is causal. With one (keys and values [R, G, S, channels]), x is a single position and
        `mask` [1, S] marks the positions that it sees, of which its own is the last.
        """
        query, key, value = self.wqkv(x).unflatten(-1, (-1, self.channels)).split(self.split, dim=2)
        query, key, value = (t.transpose(1, 2) for t in (rotate(query, table), rotate(key, table), value))
        if cache is not None and mask is not None:
            position = int(mask.sum()) - 1
            for cached, new in zip(cache, (key, value), strict=True):
                cached[:, :, position] = new[:, :, 0]
            key, value = cache
        gqa = self.split[0] != self.split[1]
        out = F.scaled_dot_product_attention(query, key, value, mask, is_causal=cache is None, enable_gqa=gqa)
        return self.dropout(self.wo(out.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    def __init__(self, width: int, dropout: float):
        super().__init__()
        hidden = math.ceil((8 * width // 3) / HIDDEN_MULTIPLE) * HIDDEN_MULTIPLE
        self.w1, self.w3 = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int, dropout: float):
        super().__init__()
        self.attention = CausalAttention(width, heads, kv_heads, dropout)
        self.feed_forward = FeedForward(width, dropout)
        self.attention_norm, self.ffn_norm = (nn.RMSNorm(width, eps=RMS_EPSILON) for _ in range(2))
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def modulation(self, condition: Tensor) -> tuple[Tensor, ...]:
        """Returns six vectors [R, 1, width] for class embeddings [R, width]."""
        return self.ada_lin(condition)[:, None].chunk(6, dim=-1)

    def forward(self, x: Tensor, modulation: tuple[Tensor, ...], table: Tensor, cache=None, mask=None) -> Tensor:
        gamma1, gamma2, scale1, scale2, shift1, shift2 = modulation
        x = x + gamma1 * self.attention(self.attention_norm(x) * (1 + scale1) + shift1, table, cache, mask)
        return x + gamma2 * self.feed_forward(self.ffn_norm(x) * (1 + scale2) + shift2)


class HeadNorm(nn.Module):
    """The normalization before the head, scaled and shifted by the class."""

    def __init__(self, width: int):
        super().__init__()
        self.rmsnorm = nn.RMSNorm(width, eps=RMS_EPSILON)
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def modulation(self, condition: Tensor) -> tuple[Tensor, ...]:
        return self.ada_lin(condition)[:, None].chunk(2, dim=-1)

    def forward(self, x: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        scale, shift = modulation
        return self.rmsnorm(x) * (1 + scale) + shift


class CodebookProjection(nn.Module):
    """Two layers that turn rows of the tokenizer's codebook into token embeddings."""

    def __init__(self, codebook_dim: int, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(codebook_dim, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Generator(nn.Module):
    """Draws the codes of images of given classes.

    If `codebook_dim` is not 0, token embeddings are a projection of the tokenizer's codebook, which has that many
    dimensions; otherwise they are a table.
    """

    def __init__(
        self, *, vocabulary: int, grid: tuple[int, int], num_classes: int, layers: int, heads: int, kv_heads: int,
        width: int, no_class: bool = True, codebook_dim: int = 0, dropout: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        self.grid, self.positions = (grid[0], grid[1]), math.prod(grid)
        self.num_classes, self.no_class, self.kv_heads = num_classes, no_class, kv_heads
        self.head_channels = width // heads
        self.tok_emb = nn.Embedding(vocabulary, codebook_dim or width)
        self.embedding_projection = CodebookProjection(codebook_dim, width) if codebook_dim else nn.Identity()
        self.class_emb = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + no_class, width)})
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, kv_heads, dropout) for _ in range(layers))
        self.head_nm = HeadNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.register_buffer("table", rotary_table(self.grid, self.head_channels), persistent=False)

    @classmethod
    def of(cls, architecture: Mapping, dropout: float = 0.0) -> "Generator":
        """Builds the module from a configuration in the published format, with "grid" and "no_class" if they differ."""
        side = math.isqrt(architecture["block_size"])
        return cls(
            vocabulary=architecture["vocab_size"],
            grid=architecture.get("grid", (side, side)),
            num_classes=architecture.get("class_num", 1000),
            layers=architecture["n_layer"],
            heads=architecture["n_head"],
            kv_heads=architecture.get("n_kv_head") or architecture["n_head"],
            width=architecture["n_embd"],
            no_class=architecture.get("no_class", True),
            codebook_dim=architecture["n_codebook_embd"] if architecture.get("use_pretrained_codebook") else 0,
            dropout=dropout,
        )

    def materialize(self) -> "Generator":
        """Computes the rotary table, which no file holds, for a module that was built on the device "meta"."""
        self.table = rotary_table(self.grid, self.head_channels)
        return self

    def embed(self, codes: Tensor) -> Tensor:
        return self.embedding_projection(self.tok_emb(codes))

    def forward(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Returns the logits [B, S, V] of codes [B, S] given their classes [B] and the codes before them."""
        condition = self.class_emb["embedding_table"](labels)
        x = self.dropout(torch.cat((condition[:, None], self.embed(codes[:, :-1])), dim=1))
        table = self.table[:, : x.shape[1]]
        for block in self.blocks:
            x = block(x, block.modulation(condition), table)  # pyright: ignore[reportCallIssue]
        return self.head(self.head_nm(x, self.head_nm.modulation(condition)))

    def loss(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Returns the mean of -log p over all codes, in nats."""
        return F.cross_entropy(self(codes, labels).flatten(0, 1), codes.flatten())

    @torch.inference_mode()
    def sample(
        self, labels: Tensor, cfg_scale: float = 1.0, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
        prefix: Tensor | None = None, length: int = 0, random: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """Draws the codes [B, h, w] of samples with classes `labels` [B].

        Args:
            labels: int64 classes, one per sample.
            cfg_scale: scale of classifier-free guidance; 1 turns it off.
            temperature: divisor of the logits; 0 takes the most likely code.
            top_k: draw from the `top_k` most likely codes; 0 draws from all.
            top_p: draw from the most likely codes that reach this probability; 1 draws from all.
            prefix: known first codes [B, P], in row order.
            length: draw only so many codes, and return [B, length]; 0 draws all.
            random: source of randomness; None takes PyTorch's global one.

        Raises:
            ValueError: guidance is asked of a generator that was trained without "no class".
        """
        guided = cfg_scale != 1
        if guided and not self.no_class:
            raise ValueError('this generator was trained without "no class", which guidance needs: cfg_scale=1')
        rows = torch.cat((labels, torch.full_like(labels, self.num_classes))) if guided else labels
        condition = self.class_emb["embedding_table"](rows)
        modulations = [block.modulation(condition) for block in self.blocks]  # pyright: ignore[reportCallIssue]
        head = self.head_nm.modulation(condition)
        shape = len(rows), self.kv_heads, self.positions, self.head_channels
        caches = [tuple(condition.new_zeros(shape) for _ in range(2)) for _ in self.blocks]
        seen = torch.ones(self.positions, self.positions, dtype=torch.bool, device=labels.device).tril()
        given = prefix.shape[1] if prefix is not None else 0
        x, codes = condition[:, None], []
        for position in range(length or self.positions):
            table, mask = self.table[:, position : position + 1], seen[position : position + 1]
            for block, modulation, cache in zip(self.blocks, modulations, caches, strict=True):
                x = block(x, modulation, table, cache, mask)
            if prefix is not None and position < given:
                drawn = prefix[:, position : position + 1]
            else:
                drawn = draw(self._guided_logits(x, head, cfg_scale), temperature, top_k, top_p, random)
            codes.append(drawn)
            x = self.embed(torch.cat((drawn, drawn)) if guided else drawn)
        codes = torch.cat(codes, dim=1)
        return codes if length else codes.unflatten(1, self.grid)

    def _guided_logits(self, x: Tensor, head: tuple[Tensor, ...], cfg_scale: float) -> Tensor:
        logits = self.head(self.head_nm(x, head))[:, 0]
        if cfg_scale == 1:
            return logits
        with_class, without = logits.chunk(2)
        return without + (with_class - without) * cfg_scale


def draw(logits: Tensor, temperature: float, top_k: int, top_p: float, random: torch.Generator | None) -> Tensor:
    """Draws one code per row, [B, 1], from logits [B, V]."""
    if not temperature:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(dim=-1)
        excluded = probabilities.cumsum(dim=-1) - probabilities > top_p
        logits = logits.masked_fill(excluded.scatter(1, order, excluded), -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=random)
