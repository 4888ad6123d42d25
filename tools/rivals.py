"""The contestants of the benchmark: ours, and what others would write, decoders of one size."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from decoder import DecoderConfig
from device import autocast
from model import CaptionModel
from tokenizer import END_ID, PAD_ID, SPECIAL_TOKENS, START_ID

VOCAB, PATCHES, WIDTH = 10000, 197, 768  # default vocabulary; what ViT-B/16 gives
CAPTIONS = 5  # a photo
IGNORED = -100  # a target that the libraries' losses leave out


def flickr_like_captions(photos: int) -> dict[str, list[list[int]]]:
    """Captions as long as Flickr's: 12.1 tokens on average, START counted, 4 to 40."""
    dice = np.random.default_rng(0)
    lengths = np.clip(np.rint(dice.gamma(6.2, 1.8, (photos, CAPTIONS))), 3, 38).astype(int)
    first = len(SPECIAL_TOKENS)
    return {
        f"{i}": [[START_ID, *dice.integers(first, VOCAB, n).tolist(), END_ID] for n in group]
        for i, group in enumerate(lengths)
    }


def our_model(device: torch.device) -> CaptionModel:
    return CaptionModel(WIDTH, DecoderConfig(VOCAB)).to(device)


def rival_model(device: torch.device) -> transformers.VisionEncoderDecoderModel:
    """ViT-B/16, frozen as ours is, and a decoder from scratch of our default size."""
    size = DecoderConfig(VOCAB)
    decoder = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_embd=size.width,
        n_layer=size.layers,
        n_head=size.heads,
        n_inner=size.ff_dim,
        n_positions=size.max_length,
        add_cross_attention=True,
        bos_token_id=START_ID,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(), decoder
    )
    model = transformers.VisionEncoderDecoderModel(config)
    model.config.decoder_start_token_id, model.config.pad_token_id = START_ID, PAD_ID
    model.encoder.requires_grad_(False)
    return model.to(device)


class TorchDecoder(nn.Module):
    """What PyTorch's own layers make: pre-norm, tied embedding, features repeated a caption."""

    def __init__(self, size: DecoderConfig):
        super().__init__()
        self.project = nn.Linear(WIDTH, size.width)
        self.tokens = nn.Embedding(size.vocab_size, size.width)
        self.places = nn.Embedding(size.max_length, size.width)
        layer = nn.TransformerDecoderLayer(
            size.width,
            size.heads,
            size.ff_dim,
            size.dropout,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.decoder = nn.TransformerDecoder(layer, size.layers, nn.LayerNorm(size.width))

    def forward(self, features: Tensor, tokens: Tensor) -> Tensor:
        """Features (captions, patches, WIDTH), tokens (captions, length) -> logits."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        mask = nn.Transformer.generate_square_subsequent_mask(len(places), tokens.device)
        x = self.tokens(tokens) + self.places(places)
        x = self.decoder(x, self.project(features), tgt_mask=mask, tgt_is_causal=True)
        return F.linear(x, self.tokens.weight)


def padded(captions: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Captions as tokens and targets (captions, longest - 1)."""
    tokens = [torch.tensor(ids[:-1]) for ids in captions]
    targets = [torch.tensor(ids[1:]) for ids in captions]
    pad = nn.utils.rnn.pad_sequence
    return pad(tokens, True, padding_value=PAD_ID), pad(targets, True, padding_value=IGNORED)


def training_step(
    loss: Callable[[], Tensor], model: nn.Module, dtype: torch.dtype
) -> Callable[[], None]:
    """A step as who knows the matter makes it: `dtype` by autocast, the fused optimizer."""
    learned = [p for p in model.parameters() if p.requires_grad]
    device = learned[0].device
    optimizer = torch.optim.AdamW(learned, lr=1e-4, fused=device.type != "mps")

    def step() -> None:
        with autocast(device, dtype):
            found = loss()
        found.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def cached_rivals(
    features: Tensor, captions: Sequence[Sequence[Sequence[int]]], dtype: torch.dtype
) -> dict[str, Callable[[], None]]:
    """Training steps with libraries' decoders: features from memory, repeated a caption, the same
    captions padded to the longest.

    Args:
        features: (photos, PATCHES, WIDTH) in half precision.
        captions: those of each step, CAPTIONS a photo.
    """
    device = features.device
    hf, plain = rival_model(device).train(), TorchDecoder(DecoderConfig(VOCAB)).to(device).train()

    def hf_loss(repeated: Tensor, tokens: Tensor, targets: Tensor) -> Tensor:
        encoded = transformers.modeling_outputs.BaseModelOutput(last_hidden_state=repeated)
        return hf(encoder_outputs=encoded, decoder_input_ids=tokens, labels=targets).loss

    def plain_loss(repeated: Tensor, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = plain(repeated, tokens).flatten(0, 1).float()
        return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, label_smoothing=0.1)

    def step_of(model: nn.Module, loss_of: Callable[..., Tensor]) -> Callable[[], None]:
        queue = itertools.cycle(captions)

        def loss() -> Tensor:
            repeated = features.float().repeat_interleave(CAPTIONS, dim=0)
            return loss_of(repeated, *(part.to(device) for part in padded(next(queue))))

        return training_step(loss, model, dtype)

    return {"hf_cached": step_of(hf, hf_loss), "torch_decoder": step_of(plain, plain_loss)}
