"""The captioner: a projection of frozen features to the decoder's memory, the decoder, the loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dataset import IGNORE
from decoder import Decoder, DecoderConfig


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
        self.dropout = nn.Dropout(config.dropout)
        self.decoder = Decoder(config)

    def memory(self, features: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Features (images, patches, feature_width) -> each layer's memory keys and values."""
        memory = self.memory_norm(self.project(self.feature_norm(features)))
        return self.decoder.memory_keys_values(self.dropout(memory))

    def hidden(self, features: Tensor, tokens: Tensor, positions: Tensor, segments: Tensor):
        """Hidden states (images, row, width) of rows of captions; see `row_mask`."""
        return self.decoder(tokens, positions, row_mask(segments), self.memory(features))

    def loss(
        self,
        features: Tensor,
        tokens: Tensor,
        positions: Tensor,
        segments: Tensor,
        targets: Tensor,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Summed cross-entropy over the targets that aren't IGNORE, in nats.

        Args:
            features: (images, patches, feature_width).
            tokens, positions, segments, targets: (images, row); see `dataset.Batch`.
        """
        hidden = self.hidden(features, tokens, positions, segments)
        # Only real targets get logits: the vocabulary is wide, and padding would pay for it.
        real = targets != IGNORE
        logits = self.decoder.logits(hidden[real])  # (targets, vocab)
        return F.cross_entropy(
            logits.float(), targets[real], reduction="sum", label_smoothing=label_smoothing
        )


def row_mask(segments: Tensor) -> Tensor:
    """(images, row) caption numbers -> (images, row, row): True where a token may attend.

    A token sees itself and the earlier tokens of its own caption.
    """
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    return (segments.unsqueeze(2) == segments.unsqueeze(1)) & causal
