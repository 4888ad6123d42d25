"""The captioner: a projection of frozen features to the decoder's memory, the decoder, the loss."""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dataset import Batch
from decoder import Decoder, DecoderConfig, Dropout, as_autocast, split_heads


class LinearCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of `hidden @ weight.T`, without the logits of all tokens in fp32.

    They are multiplied a group of tokens at a time, and become the loss and their own gradient in
    small parts, which stay in the processor's cache. It is multiplied at once to the gradients of
    `hidden` and `weight`, which alone are kept.
    """

    GROUP = 2048  # tokens; fewer are slow, as each adds to the gradient of the whole `weight`
    PART = 32  # tokens, whose logits in fp32 take 1.3 MB at a vocabulary of 10,000
    ON_GPU = (8 * GROUP, GROUP)  # tokens of a group and of a part that fill a GPU
    ROUND = 64  # the last group is padded to a multiple of this: few shapes, as in `ROW_MULTIPLE`

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        smoothing: float,
        scales: Tensor | None,
    ) -> Tensor:
        """hidden (tokens, width), weight (vocab, width), targets (tokens) -> nats, a scalar.

        `scales` (tokens) is what each token's loss is multiplied with; None: 1.
        """
        kind, given = hidden.device.type, hidden.dtype
        hidden, weight = as_autocast(hidden), as_autocast(weight)  # once, not once a group
        total = torch.zeros((), device=hidden.device)
        wanted = any(ctx.needs_input_grad[:2])
        hidden_gradients, weight_gradient = [], None
        if scales is None:
            scales = hidden.new_ones(len(targets), dtype=torch.float32)
        count = len(targets)
        more = -count % LinearCrossEntropy.ROUND
        hidden = F.pad(hidden, (0, 0, 0, more))
        targets, scales = F.pad(targets, (0, more)), F.pad(scales, (0, more))
        several, few = LinearCrossEntropy.GROUP, LinearCrossEntropy.PART
        if kind != "cpu":
            several, few = LinearCrossEntropy.ON_GPU
        for group in zip(*(x.split(several) for x in (hidden, targets, scales)), strict=True):
            logits = F.linear(group[0], weight)
            for part in zip(*(x.split(few) for x in (logits, *group[1:])), strict=True):
                total += part_loss(*part, smoothing, wanted)
            if wanted:  # then the logits are their own gradient now
                hidden_gradients.append(logits @ weight)
                share = (logits.T @ group[0]).float()
                weight_gradient = share if weight_gradient is None else weight_gradient.add_(share)
        if wanted:
            ctx.save_for_backward(torch.cat(hidden_gradients)[:count].to(given), weight_gradient)
        return total

    @staticmethod
    def backward(ctx, scale: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        # In place, so that a second pass backward is refused.
        return hidden_gradient.mul_(scale), weight_gradient.mul_(scale), None, None, None


def part_loss(
    logits: Tensor, targets: Tensor, scales: Tensor, smoothing: float, wanted: bool
) -> Tensor:
    """The loss of some tokens, a scalar; if `wanted`, its gradient by their logits (tokens, vocab)
    takes their place.

    By steps in place, as PyTorch's `log_softmax` takes longer than the product that makes logits.
    """
    powers = logits.float()
    powers -= powers.amax(1, keepdim=True)
    targets = targets.unsqueeze(1)
    loss = (smoothing - 1) * powers.gather(1, targets).squeeze(1).dot(scales)
    if smoothing:
        loss -= smoothing * powers.mean(1).dot(scales)
    sums = powers.exp_().sum(1, keepdim=True)
    loss += sums.log().squeeze(1).dot(scales)
    if wanted:
        scales = scales.unsqueeze(1)
        gradient = powers.mul_(scales / sums)
        if smoothing:
            gradient -= scales * (smoothing / logits.shape[1])
        logits.copy_(gradient.scatter_add_(1, targets, (smoothing - 1) * scales))
    return loss


class CaptionModel(nn.Module):
    """Everything that is trained. The encoder stays outside: it is frozen and runs once."""

    def __init__(self, feature_width: int, config: DecoderConfig):
        """Args: `feature_width`, the width of the encoder's vectors; the decoder's size."""
        super().__init__()
        self.feature_width = feature_width
        self.config = config
        self.feature_norm = nn.LayerNorm(feature_width)
        self.project = nn.Linear(feature_width, config.width)
        self.memory_norm = nn.LayerNorm(config.width)
        self.dropout = Dropout(config.dropout)
        self.decoder = Decoder(config)

    def memory(self, features: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Features (images, patches, feature_width) -> each layer's memory keys and values.

        `modeling_captioner.py` has the same steps, for those who have `transformers` alone.
        """
        memory = self.memory_norm(self.project(self.feature_norm(features)))
        return self.decoder.memory_keys_values(self.dropout(memory))

    def hidden(self, features: Tensor, tokens: Tensor, positions: Tensor, segments: Tensor):
        """Hidden states (images, row, width) of rows of captions; see `row_mask`."""
        return self.decoder(tokens, positions, row_mask(segments), self.memory(features))

    @torch.no_grad()
    def cross_attention(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Where the decoder looks: (captions, layers, heads, length, patches).

        Args:
            features: each caption's photo's (captions, patches, feature_width), on the model's
                device.
            tokens: (captions, length), from START; what stands at place i of the result is how
                the token after the i-th was chosen. Padding may follow.
        """
        weights, here, memory = [], threading.get_ident(), self.memory(features)

        def look(_: nn.Module, __: tuple, query: Tensor) -> None:
            if threading.get_ident() != here:  # another thread writes about another photo
                return
            with torch.autocast(query.device.type, enabled=False):
                query = split_heads(query, self.config.heads).float()
                keys = memory[len(weights)][0].float()
                scores = query @ keys.transpose(-2, -1) * query.shape[-1] ** -0.5
                weights.append(scores.softmax(-1))

        hooks = [block.cross_q.register_forward_hook(look) for block in self.decoder.blocks]
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        try:
            self.decoder(tokens, positions, row_mask(torch.zeros_like(tokens)), memory)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(weights, dim=1)

    def loss(
        self,
        features: Tensor,
        batch: Batch,
        label_smoothing: float = 0.0,
        scales: Tensor | None = None,
    ) -> Tensor:
        """Summed cross-entropy over a batch's targets, in nats.

        Args:
            features: (images, patches, feature_width).
            scales: what each target's loss is multiplied with (targets); None: 1.
        """
        hidden = self.hidden(features, batch.tokens, batch.positions, batch.segments)
        # Only targets get logits: the vocabulary is wide, and padding would pay for it.
        return LinearCrossEntropy.apply(
            hidden.flatten(0, 1)[batch.places],
            self.decoder.token_embedding.weight,
            batch.targets,
            label_smoothing,
            scales,
        )


def row_mask(segments: Tensor) -> Tensor:
    """(images, row) caption numbers -> (images, row, row): True where a token may attend.

    A token sees itself and the earlier tokens of its own caption.
    """
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    return (segments.unsqueeze(2) == segments.unsqueeze(1)) & causal
