"""A trained captioner for people who have `transformers` and not the project that trained it.

    from transformers import pipeline

    captioner = pipeline("image-text-to-text", "user/repo", trust_remote_code=True)
    captioner("photo.jpg", text="")  # or a question, if it learned to answer: text="is it raining?"

This file stands beside the weights in a repository, imports nothing of the project, and is
imported by nothing in it. The layers have the names that they have in the weights.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, LogitsProcessorList, PreTrainedModel, ProcessorMixin
from transformers.image_utils import make_flat_list_of_images
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto import modeling_auto

MODEL_TYPE = "vision_captioner"
# The pipeline calls a model unsupported, aloud, whose class isn't listed here.
modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[MODEL_TYPE] = "VisionCaptioner"


class VisionCaptionerConfig(transformers.PreTrainedConfig):
    """Sizes, and the frozen encoder: its class, its configuration, and where it is if not here."""

    model_type = MODEL_TYPE

    def __init__(
        self,
        tower: dict[str, Any] | None = None,
        layers: tuple[int, ...] = (-1,),
        feature_width: int = 768,
        vocab_size: int = 10000,
        hidden_size: int = 512,
        num_hidden_layers: int = 6,
        num_attention_heads: int = 8,
        ff_dim: int = 2048,
        max_position_embeddings: int = 100,
        **others: Any,
    ):
        self.tower, self.layers, self.feature_width = tower, layers, feature_width
        self.vocab_size, self.hidden_size, self.ff_dim = vocab_size, hidden_size, ff_dim
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        for key in ("encoder", "decoder", "hidden_act", "activation_function"):
            others.pop(key, None)  # there to make other classes refuse these weights
        super().__init__(**others)


class VisionCaptionerProcessor(ProcessorMixin):
    """Photos, and questions about each (none or an empty one asks for a caption) -> what the model
    takes."""

    def __init__(self, image_processor=None, tokenizer=None, **others: Any):
        super().__init__(image_processor, tokenizer, **others)

    def __call__(self, images=None, text=None, return_tensors="pt", **_: Any):
        photos = [] if images is None else list(make_flat_list_of_images(images))
        texts = [text] if isinstance(text, str) else list(text or [""] * max(1, len(photos)))
        if photos and len(photos) != len(texts):
            raise ValueError(f"{len(photos)} photos, but {len(texts)} texts: give one for each")
        start, answer = self.tokenizer.convert_tokens_to_ids(["<start>", "<answer>"])
        encode = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)
        rows = [[start, *ids, answer] if ids else [start] for ids in encode["input_ids"]]
        inputs = self.tokenizer.pad(
            {"input_ids": rows}, padding_side="left", return_tensors=return_tensors
        )
        if photos:
            images = [x.convert("RGB") if hasattr(x, "convert") else x for x in photos]
            inputs |= self.image_processor(images, return_tensors=return_tensors)
        return transformers.BatchFeature(inputs)

    def post_process_image_text_to_text(self, ids, skip_special_tokens=True, **_: Any):
        return [
            text.strip() for text in self.batch_decode(ids, skip_special_tokens=skip_special_tokens)
        ]


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


class Block(nn.Module):
    """Self-attention, cross-attention over the photo, feed-forward; each on a residual."""

    def __init__(self, config: VisionCaptionerConfig):
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.self_norm, self.self_qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.self_out = nn.Linear(width, width)
        self.cross_norm, self.cross_q = nn.LayerNorm(width), nn.Linear(width, width)
        self.cross_kv, self.cross_out = nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.ff_norm, self.ff_in = nn.LayerNorm(width), nn.Linear(width, config.ff_dim)
        self.ff_out = nn.Linear(config.ff_dim, width)

    def forward(self, x: Tensor, mask: Tensor, memory: Tensor, layer: int, cache) -> Tensor:
        query, *fresh = (
            heads(p, self.heads) for p in self.self_qkv(self.self_norm(x)).chunk(3, -1)
        )
        keys, values = cache.update(*fresh, layer) if cache is not None else fresh
        mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        x = x + self.self_out(mixed.transpose(1, 2).flatten(2))
        query = heads(self.cross_q(self.cross_norm(x)), self.heads)
        keys, values = (heads(part, self.heads) for part in memory.chunk(2, -1))
        mixed = F.scaled_dot_product_attention(query, keys, values)
        x = x + self.cross_out(mixed.transpose(1, 2).flatten(2))
        return x + self.ff_out(F.gelu(self.ff_in(self.ff_norm(x)), approximate="tanh"))


class Decoder(nn.Module):
    def __init__(self, config: VisionCaptionerConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)


class NoTokenTwice:
    """Forbids a token right after itself, which `no_repeat_ngram_size` alone allows."""

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return scores.scatter(1, ids[:, -1:], float("-inf"))


class VisionCaptioner(PreTrainedModel, GenerationMixin):
    config_class = VisionCaptionerConfig
    input_modalities = ("image", "text")
    _no_split_modules = ["Block"]
    _supports_sdpa = True
    _keys_to_ignore_on_load_unexpected = [r"^reranker\."]  # the project's own way to choose

    def __init__(self, config: VisionCaptionerConfig):
        super().__init__(config)
        self.tower = None
        if "name" not in config.tower:  # its weights are here
            tower_class = getattr(transformers, config.tower["class"])
            vision = tower_class.config_class(**config.tower["config"])
            self.tower = tower_class(vision, **config.tower["options"])
        self.feature_norm = nn.LayerNorm(config.feature_width)
        self.project = nn.Linear(config.feature_width, config.hidden_size)
        self.memory_norm = nn.LayerNorm(config.hidden_size)
        self.decoder = Decoder(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """All weights come from the file."""

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any):
        """As always; an encoder that isn't in the weights comes from `encoder`, a Hub name or a
        folder, which is by default where it was published when the captioner was trained.
        """
        given = options.pop("encoder", None)
        loaded = super().from_pretrained(*args, **options)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.tower is None:
            tower = model.config.tower
            name, revision = (given, None) if given else (tower["name"], tower["revision"])
            auto = transformers.AutoConfig.from_pretrained(name, revision=revision)
            vision = getattr(auto, "vision_config", auto)
            how = {"revision": revision, "config": vision, "dtype": model.dtype} | tower["options"]
            loaded_tower = getattr(transformers, tower["class"]).from_pretrained(name, **how)
            model.tower = loaded_tower.to(model.device).eval()
            # `save_pretrained` writes its weights along.
            options = {key: x for key, x in tower["options"].items() if key != "key_mapping"}
            model.config.tower = {"class": tower["class"], "options": options}
            model.config.tower["config"] = model.tower.config.to_dict()
        return loaded

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.token_embedding

    def memory(self, pixel_values: Tensor) -> Tensor:
        """(photos, 3, height, width) -> keys and values (photos, layers, patches, 2 width)."""
        if pixel_values is None:
            raise ValueError("give pixel_values: without a photo there is nothing to write about")
        deep = list(self.config.layers) != [-1]
        output = self.tower(pixel_values=pixel_values, output_hidden_states=deep)
        last, hidden = output.last_hidden_state, output.hidden_states
        features = [last if i == -1 else hidden[i] for i in self.config.layers]
        features = self.feature_norm(torch.cat(features, dim=-1))
        memory = self.memory_norm(self.project(features))
        return torch.stack([block.cross_kv(memory) for block in self.decoder.blocks], dim=1)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        memory: Tensor | None = None,
        past_key_values=None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        memory = self.memory(pixel_values) if memory is None else memory
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        length = input_ids.shape[1]
        if attention_mask is None:
            attention_mask = input_ids.new_ones(input_ids.shape[0], seen + length)
        real = attention_mask.bool()
        causal = real.new_ones(seen + length, seen + length).tril()[seen:]
        # Padding attends to itself, as attention to nothing is no number.
        itself = torch.eye(seen + length, dtype=torch.bool, device=real.device)[seen:]
        mask = ((causal & real.unsqueeze(1)) | itself).unsqueeze(1)
        positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, seen:]
        decoder = self.decoder
        x = decoder.token_embedding(input_ids) + decoder.position_embedding(positions)
        for layer, block in enumerate(decoder.blocks):
            x = block(x, mask, memory[:, layer], layer, past_key_values)
        logits = F.linear(decoder.norm(x), decoder.token_embedding.weight)
        return CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)

    @torch.no_grad()
    def generate(self, input_ids=None, pixel_values=None, **options: Any):
        """Captions, or answers after a question; the photo passes the encoder once."""
        memory = self.memory(pixel_values)
        if input_ids is None:
            start = self.generation_config.bos_token_id
            input_ids = torch.full((len(memory), 1), start, device=memory.device)
        settings = options.get("generation_config") or self.generation_config
        room = self.config.max_position_embeddings - input_ids.shape[1]
        wanted = options.pop("max_new_tokens", None)
        if longest := options.pop("max_length", None):
            wanted = longest - input_ids.shape[1]
        options["max_new_tokens"] = max(1, min(room, wanted or settings.max_new_tokens or room))
        if options.get("no_repeat_ngram_size", settings.no_repeat_ngram_size):
            rules = options.get("logits_processor") or LogitsProcessorList()
            options["logits_processor"] = LogitsProcessorList([*rules, NoTokenTwice()])
        return super().generate(input_ids, memory=memory, **options)
