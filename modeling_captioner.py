"""A trained captioner for people who have `transformers` and not the project that trained it.

    from transformers import pipeline

    captioner = pipeline("image-text-to-text", "user/repo", trust_remote_code=True)
    captioner("photo.jpg", text="")  # or a question, if it learned to answer: text="is it raining?"

This file stands beside the weights in a repository, imports nothing of the project, and is
imported by nothing in it. The layers have the names that they have in the weights.
"""

from __future__ import annotations

from collections import Counter
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
        rerank: float = 0.0,
        reranker: dict[str, int] | None = None,
        **others: Any,
    ):
        self.tower, self.layers, self.feature_width = tower, layers, feature_width
        self.vocab_size, self.hidden_size, self.ff_dim = vocab_size, hidden_size, ff_dim
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.rerank, self.reranker = rerank, reranker
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


class Reranker(nn.Module):
    """The CIDEr that a photo's look promises captions, by what people said of training photos.

    A ridge regression from features to the n-grams of people's captions, weighted by TF-IDF.
    """

    def __init__(self, feature_width: int, photos: int, rank: int, grams: int, entries: int):
        super().__init__()
        looks, half, whole = 2 * feature_width, torch.float16, torch.int64
        shapes = {
            "mean": ((looks,), torch.float32),
            "query": ((looks, rank), half),
            "photos": ((photos, rank), half),
            "grams": ((grams,), whole),  # keys of n-grams, ascending
            "weights": ((grams,), torch.float32),  # their inverse document frequencies
            "starts": ((grams + 1,), whole),  # of each one's places and values
            "places": ((entries,), torch.int32),  # the photos whose captions hold it
            "values": ((entries,), half),  # and its share of them
        }
        for name, (shape, dtype) in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=dtype))

    def forward(self, features: Tensor, captions: list[list[list[int]]]) -> list[list[float]]:
        """Features (photos, patches, width), each photo's captions as ids -> CIDEr times 100."""
        features = features.float()
        looks = torch.stack([features[:, 0], features.mean(1)], dim=1)
        looks = F.normalize(looks, dim=2).flatten(1) - self.mean.float()
        shares = looks @ self.query.float() @ self.photos.float().T
        return [
            [self.promised(share, Counter(n_grams(ids))) for ids in group]
            for share, group in zip(shares, captions, strict=True)
        ]

    def promised(self, share: Tensor, grams: Counter[tuple[int, int]]) -> float:
        lengths, sums = [1e-18] * 4, [0.0] * 4
        for (n, key), times in grams.items():
            place = int(torch.searchsorted(self.grams, key).clamp(max=len(self.grams) - 1))
            known = int(self.grams[place]) == key
            # What no caption holds is as rare as what one photo's alone hold.
            rare = self.weights[place] if known else torch.tensor(len(self.photos)).log()
            weight = times * float(rare)
            lengths[n] += weight**2
            if known:
                part = slice(*self.starts[place : place + 2].tolist())
                said = share[self.places[part].long()] @ self.values[part].float()
                sums[n] += weight * float(said)
        return 250 * sum(total / length**0.5 for total, length in zip(sums, lengths, strict=True))


def n_grams(ids: list[int]) -> list[tuple[int, int]]:
    """(n - 1, key) of each n-gram of up to four ids; a key wraps beyond 64 bits."""
    found = []
    for start in range(len(ids)):
        key = 0
        for n, token in enumerate(ids[start : start + 4]):
            key = (key * 0x100003 + token + 1 + 2**63) % 2**64 - 2**63
            found.append((n, key))
    return found


class NoTokenTwice:
    """Forbids a token right after itself, which `no_repeat_ngram_size` alone allows."""

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return scores.scatter(1, ids[:, -1:], float("-inf"))


class VisionCaptioner(PreTrainedModel, GenerationMixin):
    config_class = VisionCaptionerConfig
    input_modalities = ("image", "text")
    _no_split_modules = ["Block"]
    _supports_sdpa = True
    _keys_to_ignore_on_load_unexpected = [r"^reranker\."]  # where the configuration has none

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
        held = config.reranker
        self.reranker = Reranker(config.feature_width, **held) if held else None
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

    def features(self, pixel_values: Tensor) -> Tensor:
        """(photos, 3, height, width) -> what the encoder says (photos, patches, feature_width)."""
        if pixel_values is None:
            raise ValueError("give pixel_values: without a photo there is nothing to write about")
        deep = list(self.config.layers) != [-1]
        output = self.tower(pixel_values=pixel_values, output_hidden_states=deep)
        last, hidden = output.last_hidden_state, output.hidden_states
        features = [last if i == -1 else hidden[i] for i in self.config.layers]
        return torch.cat(features, dim=-1)

    def memory(self, features: Tensor) -> Tensor:
        """Features -> each layer's keys and values (photos, layers, patches, 2 width)."""
        memory = self.memory_norm(self.project(self.feature_norm(features)))
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
        memory = self.memory(self.features(pixel_values)) if memory is None else memory
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
        """Captions, or answers after a question; the photo passes the encoder once.

        Captions that a beam search finds are ordered by their score and, `config.rerank` times,
        the CIDEr that the photo promises them.
        """
        features = self.features(pixel_values)
        memory = self.memory(features)
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
        beams = options.get("num_beams", settings.num_beams) or 1
        sampled = options.get("do_sample", settings.do_sample)
        if self.reranker is None or not self.config.rerank or beams == 1 or sampled:
            return super().generate(input_ids, memory=memory, **options)
        wanted = options.pop("num_return_sequences", settings.num_return_sequences) or 1
        whole = options.pop("return_dict_in_generate", settings.return_dict_in_generate)
        options |= {"num_return_sequences": beams, "return_dict_in_generate": True}
        options["output_scores"] = True
        found = super().generate(input_ids, memory=memory, **options)
        order = self.best_first(features, input_ids, found)[:, :wanted].flatten()
        for name in ("sequences", "sequences_scores", "beam_indices"):
            found[name] = found[name][order]
        return found if whole else found.sequences

    def best_first(self, features: Tensor, input_ids: Tensor, found) -> Tensor:
        """Each photo's sequences in their new order, as indices (photos, beams);
        `sequences_scores` are raised.

        Answers, whose prompt is more than one token, stay in theirs.
        """
        photos, (pad, end) = len(features), (self.config.pad_token_id, self.config.eos_token_id)
        scores = found.sequences_scores.view(photos, -1)
        written = found.sequences[:, input_ids.shape[1] :].unflatten(0, scores.shape).tolist()
        captions = [
            [
                ids[: ids.index(end) + 1] if end in ids else [i for i in ids if i != pad]
                for ids in group
            ]
            for group in written
        ]
        promised = scores.new_tensor(self.reranker(features, captions))
        plain = (input_ids != pad).sum(1, keepdim=True) == 1
        scores = scores + torch.where(plain, self.config.rerank * promised, 0.0)
        found["sequences_scores"] = scores.flatten()
        best = scores.sort(dim=1, descending=True, stable=True).indices
        return best + torch.arange(0, scores.numel(), scores.shape[1], device=best.device)[:, None]
