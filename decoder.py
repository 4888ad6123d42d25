"""A pre-norm Transformer decoder over a row of captions that share one photo's memory.

A row holds all captions of a photo one after the other, each attending to itself only (a
block-diagonal causal mask), so that the memory's keys and values are computed once per photo
and padding is a few percent. While generating, the row holds the newest token of each beam, and
the mask says which earlier tokens each beam descends from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MOST_SCORES = 1 << 28  # of an attention, all in memory at once: half a GB in bf16


@dataclass(frozen=True)
class DecoderConfig:
    """The decoder's size. `max_length` bounds a caption in tokens, START and END included."""

    vocab_size: int
    width: int = 512
    layers: int = 6
    heads: int = 8
    ff_dim: int = 2048
    max_length: int = 100
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"the width {self.width} is no multiple of {self.heads} heads")


class KeyValueCache:
    """Keys and values of what each layer has seen: `(rows, heads, seen, head width)` each.

    Room for `capacity` tokens a row is taken at once, so that a step writes only its own.
    """

    def __init__(self, layers: int, capacity: int):
        self.capacity = capacity
        self.seen = 0
        self.keys: list[Tensor | None] = [None] * layers
        self.values: list[Tensor | None] = [None] * layers

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add new keys and values (rows, heads, new, head width); return all so far."""
        if self.keys[layer] is None:
            rows, heads, _, head_width = keys.shape
            self.keys[layer] = keys.new_empty(rows, heads, self.capacity, head_width)
            self.values[layer] = values.new_empty(rows, heads, self.capacity, head_width)
        end = self.seen + keys.shape[2]
        self.keys[layer][:, :, self.seen : end] = keys
        self.values[layer][:, :, self.seen : end] = values
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows; of the room beyond what was seen nothing is copied."""
        for parts in (self.keys, self.values):
            for layer, part in enumerate(parts):
                parts[layer] = part.new_empty(len(rows), *part.shape[1:])
                parts[layer][:, :, : self.seen] = part[:, :, : self.seen][rows]


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(rows, length, width) -> (rows, heads, length, head width)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def as_autocast(x: Tensor) -> Tensor:
    """What autocast would make of `x` for a matrix product; without autocast `x` itself."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def attention(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention; all (rows, heads, length, head width), mask True to attend.

    On a CPU in bf16 the plain products are 3 times as fast as PyTorch's fused kernel, which
    converts block by block (docs/performance.md), and on MPS that of many versions is wrong for
    what isn't contiguous, and for such masks (PyTorch #163597, #181133, #184180); everywhere else
    the fused one is used, and where all scores at once would take gigabytes, as the beams of long
    captions in one row do.
    """
    large = query.shape[:-1].numel() * keys.shape[-2] > MOST_SCORES
    plain = (query.device.type, query.dtype) == ("cpu", torch.bfloat16)
    if large or not (plain or query.device.type == "mps"):
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
    scores = (query * query.shape[-1] ** -0.5) @ keys.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1) @ values


class Dropout(nn.Module):
    """Dropout that asks a CPU's random generator for 1 byte an element instead of 8.

    On a CPU drawing the numbers is most of dropout's time, so there the rate is rounded to a
    multiple of 1/256 and the rest scaled accordingly.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.rate)
        steps = round(self.rate * 256)
        words = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
        kept = words.view(torch.uint8)[: x.numel()].view(x.shape) >= steps
        # A product of two tensors of one type is what PyTorch does fast, forward and backward.
        return x * kept.to(x.dtype).mul_(256 / (256 - steps))


class Block(nn.Module):
    """Self-attention, cross-attention over the memory, feed-forward; each on a residual."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.self_norm = nn.LayerNorm(width)
        self.self_qkv = nn.Linear(width, 3 * width)
        self.self_out = nn.Linear(width, width)
        self.cross_norm = nn.LayerNorm(width)
        self.cross_q = nn.Linear(width, width)
        self.cross_kv = nn.Linear(width, 2 * width)
        self.cross_out = nn.Linear(width, width)
        self.ff_norm = nn.LayerNorm(width)
        self.ff_in = nn.Linear(width, config.ff_dim)
        self.ff_out = nn.Linear(config.ff_dim, width)
        self.dropout = Dropout(config.dropout)

    def memory_keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """(rows, patches, width) -> keys and values (rows, heads, patches, head width)."""
        keys, values = self.cross_kv(memory).chunk(2, dim=-1)
        # Laid out as attention wants them, once, and not in each step of generation again.
        return (
            split_heads(keys, self.heads).contiguous(),
            split_heads(values, self.heads).contiguous(),
        )

    def attend_self(self, x: Tensor, mask: Tensor, layer: int, cache: KeyValueCache | None):
        query, keys, values = (
            split_heads(part, self.heads) for part in self.self_qkv(x).chunk(3, dim=-1)
        )
        if cache is not None:
            keys, values = cache.append(layer, keys, values)
        mixed = attention(query, keys, values, mask)
        return self.self_out(mixed.transpose(1, 2).flatten(2))

    def attend_memory(self, x: Tensor, memory: tuple[Tensor, Tensor]) -> Tensor:
        query = split_heads(self.cross_q(x), self.heads)
        mixed = attention(query, *memory)
        return self.cross_out(mixed.transpose(1, 2).flatten(2))

    def forward(self, x, mask, memory, layer, cache=None) -> Tensor:
        x = x + self.dropout(self.attend_self(self.self_norm(x), mask, layer, cache))
        x = x + self.dropout(self.attend_memory(self.cross_norm(x), memory))
        hidden = F.gelu(self.ff_in(self.ff_norm(x)))  # by tanh a CPU takes three times as long
        return x + self.dropout(self.ff_out(hidden))


class Decoder(nn.Module):
    """Tokens and a photo's memory in, hidden states and next-token logits out."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.max_length, config.width)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self._initialise()

    def _initialise(self) -> None:
        # GPT-2's scheme: small weights, and smaller ones where a residual branch ends, so that
        # the residual stream keeps its size at any depth.
        ends = ("self_out.weight", "cross_out.weight", "ff_out.weight")
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                scale = (3 * self.config.layers) ** -0.5 if name.endswith(ends) else 1.0
                nn.init.normal_(parameter, std=0.02 * scale)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def memory_keys_values(self, memory: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Each layer's keys and values of the memory (rows, patches, width), once per photo."""
        return [block.memory_keys_values(memory) for block in self.blocks]

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        mask: Tensor,
        memory: list[tuple[Tensor, Tensor]],
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Hidden states (rows, length, width) of tokens.

        Args:
            tokens: ids (rows, length), one row per photo.
            positions: each token's place within its own caption (rows, length).
            mask: True where a token may attend (rows, length, seen + length).
            memory: what `memory_keys_values` gave for the rows' photos.
            cache: keys and values of the tokens before; the new ones are added to it.
        """
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        x = self.dropout(as_autocast(x))  # blocks add up in it as well: docs/performance.md
        mask = mask.unsqueeze(1)  # (rows, 1, length, seen + length): the same for all heads
        for layer, block in enumerate(self.blocks):
            x = block(x, mask, memory[layer], layer, cache)
        if cache is not None:
            cache.seen += tokens.shape[1]
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., width) -> (..., vocab), through the tied embedding."""
        return F.linear(hidden, self.token_embedding.weight)
