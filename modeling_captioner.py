"""A trained captioner for people who have `transformers` and not the project that trained it.

    from transformers import pipeline

    captioner = pipeline("image-text-to-text", "user/repo", trust_remote_code=True)
    captioner("photo.jpg", text="")  # or a question, if it learned to answer: text="is it raining?"

This file stands beside the weights in a repository, with copies of `pictures.py`, `decoder.py` and
`rerank.py`, which import nothing of the project. Nothing in the project imports this one.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import threading
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import image_utils
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto import modeling_auto
from transformers.utils.versions import require_version

from .decoder import Decoder, DecoderConfig
from .pictures import upright_rgb
from .rerank import Reranker, layout

require_version("transformers>=4.57", "Run pip install -U transformers")
logger = transformers.utils.logging.get_logger(__name__)
# Before 5.2, threads that ask for hidden layers get one another's photos (its issue #42673).
OLD = Version(transformers.__version__) < Version("5.2")
ENCODING = threading.Lock() if OLD else contextlib.nullcontext()
MODEL_TYPE = "vision_captioner"
# What reaches the repository of an encoder that has one of its own, too.
HUB_OPTIONS = {"cache_dir", "force_download", "local_files_only", "proxies", "token"}
# The pipeline calls a model unsupported, aloud, whose class isn't listed here.
modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[MODEL_TYPE] = "VisionCaptioner"


class VisionCaptionerConfig(transformers.PretrainedConfig):
    """Sizes, and the frozen encoder: its class, its configuration, and where it is if not here."""

    model_type = MODEL_TYPE
    rerank, reranker = 0.0, None  # where the file says nothing of a reranker

    def __init__(self, **given: Any):
        for key in ("encoder", "decoder", "hidden_act", "activation_function"):
            given.pop(key, None)  # there to make other classes refuse these weights
        super().__init__(**given)


class VisionCaptionerProcessor(transformers.ProcessorMixin):
    """Photos, and questions about each (none or an empty one asks for a caption) -> what the model
    takes. A question is cut so that with what stands around it, it takes half of the length.
    """

    if transformers.__version__ < "5":  # which doesn't take them from what `__init__` does
        attributes = ["image_processor", "tokenizer"]
        image_processor_class, tokenizer_class = "AutoImageProcessor", "AutoTokenizer"

    def __init__(self, image_processor=None, tokenizer=None, **others: Any):
        super().__init__(image_processor, tokenizer, **others)

    def __call__(self, images=None, text=None, return_tensors="pt", **_: Any):
        photos = [] if images is None else list(image_utils.make_flat_list_of_images(images))
        texts = [text] if isinstance(text, str) else text or [None] * max(1, len(photos))
        texts = [each or "" for each in texts]
        if photos and len(photos) != len(texts):
            raise ValueError(f"{len(photos)} photos, but {len(texts)} texts: give one for each")
        stops, marks, end = self.tokenizer.init_kwargs.get("question_end", ("", "", ""))
        if end:  # as in training, whatever it is asked with
            texts = [" ".join(text.split()) for text in texts]
            texts = [text and text.rstrip(stops).rstrip(marks) + end for text in texts]
        start, answer = self.tokenizer.convert_tokens_to_ids(["<start>", "<answer>"])
        encode = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)
        most = max(0, self.tokenizer.model_max_length // 2 - 2)
        rows = [[start, *ids[:most], answer] if ids else [start] for ids in encode["input_ids"]]
        inputs = self.tokenizer.pad(
            {"input_ids": rows}, padding_side="left", return_tensors=return_tensors
        )
        if photos:
            images = [upright_rgb(x) if hasattr(x, "convert") else x for x in photos]
            inputs |= self.image_processor(images, return_tensors=return_tensors)
        return transformers.BatchFeature(inputs)

    def post_process_image_text_to_text(self, ids, skip_special_tokens=True, **_: Any):
        texts = self.batch_decode(ids, skip_special_tokens=skip_special_tokens)
        return [text.strip() for text in texts]


def fingerprint(tower: nn.Module) -> str:
    """A hash of all weights, whatever the library's version calls them; as `encoder.py` has it."""
    tensors = (x.cpu().contiguous().view(-1).view(torch.uint8) for x in tower.state_dict().values())
    each = sorted(hashlib.sha256(tensor.numpy()).digest() for tensor in tensors)
    return hashlib.sha256(b"".join(each)).hexdigest()[:16]


class HeldReranker(nn.Module):
    """A `Reranker` among the weights: in their precision, and on their device."""

    def __init__(self, config: VisionCaptionerConfig):
        super().__init__()
        self.layout = layout(config.feature_width, **config.reranker)
        for name, (dtype, *shape) in self.layout.items():
            self.register_buffer(name, torch.zeros(shape, dtype=dtype))

    @functools.cached_property
    def restored(self) -> Reranker:
        held = {name: getattr(self, name).to("cpu", kind[0]) for name, kind in self.layout.items()}
        return Reranker(**held)


class Seen:
    """The library's cache of keys and values, as the decoder wants one."""

    def __init__(self, cache: transformers.Cache):
        self.cache, self.seen = cache, cache.get_seq_length()

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return self.cache.update(keys, values, layer)


class NoRepeat:
    """Forbids n-grams, and a word right after itself, in what is written after the prompt: an
    answer may say what the question did."""

    def __init__(self, size: int, start: int, rows: Tensor):
        """Args: the prompts' length, and which of them (photos, 1) this holds for."""
        self.rule = transformers.NoRepeatNGramLogitsProcessor(size)
        self.start, self.rows = start, rows

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        written = ids[:, self.start :]
        last = written[:, -1:]
        last = last.masked_fill(last < 4 + 256, 0)  # special tokens and bytes, as in "400"
        ruled = self.rule(written, scores).scatter(1, last, float("-inf"))
        beams = len(ids) // len(self.rows)
        return torch.where(self.rows.repeat_interleave(beams, dim=0), ruled, scores)


class VisionCaptioner(transformers.PreTrainedModel, transformers.GenerationMixin):
    config_class = VisionCaptionerConfig
    input_modalities = ("image", "text")
    _no_split_modules = ["Block"]
    _supports_sdpa = True
    _keys_to_ignore_on_load_unexpected = [r"^reranker\."]  # where the configuration has none

    def __init__(self, config: VisionCaptionerConfig):
        super().__init__(config)
        self.loss_type = "ForCausalLM"
        self.tower = None
        if "name" not in config.tower:  # its weights are here
            tower_class = getattr(transformers, config.tower["class"])
            vision = tower_class.config_class(**config.tower["config"])
            self.tower = tower_class(vision, **config.tower["options"])
        self.feature_norm = nn.LayerNorm(config.feature_width)
        self.project = nn.Linear(config.feature_width, config.hidden_size)
        self.memory_norm = nn.LayerNorm(config.hidden_size)
        self.decoder = Decoder(DecoderConfig(**config.trained["decoder"] | {"dropout": 0.0}))
        self.reranker = HeldReranker(config) if config.reranker else None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """All weights come from the file."""

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any):
        """As always; an encoder that isn't in the weights comes from `encoder`, a Hub name or a
        folder, which is by default where it was published when the captioner was trained.
        """
        given = options.pop("encoder", None)
        told = options.pop("output_loading_info", False)
        model, found = super().from_pretrained(*args, output_loading_info=True, **options)
        if missing := sorted(found["missing_keys"]):
            raise ValueError(
                f"weights are missing ({missing[0]}, ...): if transformers names them otherwise in "
                f"this version, run pip install transformers=={model.config.transformers_version}"
            )
        if model.tower is None:
            tower = model.config.tower
            name, revision = (given, None) if given else (tower["name"], tower["revision"])
            hub = {key: options[key] for key in HUB_OPTIONS & options.keys()}
            hub["revision"] = revision
            auto = transformers.AutoConfig.from_pretrained(name, **hub)
            how = tower["options"] | hub | {"config": getattr(auto, "vision_config", auto)}
            held = getattr(transformers, tower["class"]).from_pretrained(name, **how)
            if fingerprint(held.float()) != tower["weights"]:
                logger.warning(f"{name} is another encoder than this captioner was trained with")
            placed = (each.device for each in model.parameters() if not each.is_meta)
            model.tower = held.to(next(placed, "cpu"), model.dtype).eval()
            # `save_pretrained` writes its weights along.
            options = {key: x for key, x in tower["options"].items() if key != "key_mapping"}
            model.config.tower = {key: tower[key] for key in ("class", "call")}
            model.config.tower |= {"options": options, "config": model.tower.config.to_dict()}
            model.config.tower["config"].pop("_name_or_path", None)  # a folder here, perhaps
        return (model, found) if told else model

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.token_embedding

    def features(self, pixel_values: Tensor) -> Tensor:
        """(photos, 3, height, width) -> what the encoder says (photos, patches, feature_width)."""
        if pixel_values is None:
            raise ValueError('no photo: give pixel_values, or to a pipeline (photo, text="")')
        deep = list(self.config.layers) != [-1]
        call = self.config.tower["call"]  # where it sees photos of another size
        with ENCODING:
            output = self.tower(pixel_values=pixel_values, output_hidden_states=deep, **call)
        last, hidden = output.last_hidden_state, output.hidden_states
        if last.dim() == 4:  # maps, as in our encoder.py
            last = last.flatten(2).mT
        joined = [last if i == -1 else hidden[i] for i in self.config.layers if i != "cls"]
        if "cls" in self.config.layers:
            joined = [torch.cat([last[:, :1], vectors[:, 1:]], dim=1) for vectors in joined]
        return torch.cat(joined, dim=-1)

    def memory(self, features: Tensor) -> Tensor:
        """Features -> keys and values (photos, layers, 2, heads, patches, head width).

        In one tensor, as the library repeats it for each beam.
        """
        memory = self.memory_norm(self.project(self.feature_norm(features)))
        pairs = self.decoder.memory_keys_values(memory)
        return torch.stack([torch.stack(pair, dim=1) for pair in pairs], dim=1)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        memory: Tensor | None = None,
        use_cache: bool = False,
        labels: Tensor | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        memory = self.memory(self.features(pixel_values)) if memory is None else memory
        # Its name, and who makes it, depend on the library's version; unheeded it spoils all texts.
        caches = {name: x for name, x in others.items() if isinstance(x, transformers.Cache)}
        if use_cache and not caches:
            caches["past_key_values"] = transformers.DynamicCache()
        cache = next(map(Seen, caches.values()), None)
        seen = cache.seen if cache else 0
        length = input_ids.shape[1]
        if attention_mask is None:
            attention_mask = input_ids.new_ones(input_ids.shape[0], seen + length)
        if attention_mask.dim() != 2:  # made by the library for a cache of a fixed length
            raise ValueError("static caches are not supported: leave cache_implementation away")
        real = attention_mask.bool()
        causal = real.new_ones(seen + length, seen + length).tril()[seen:]
        # Padding attends to itself, as attention to nothing is no number.
        itself = torch.eye(seen + length, dtype=torch.bool, device=real.device)[seen:]
        mask = (causal & real.unsqueeze(1)) | itself
        positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, seen:]
        pairs = [pair.unbind(1) for pair in memory.unbind(1)]
        hidden = self.decoder(input_ids, positions, mask, pairs, cache)
        embedding = self.decoder.token_embedding
        if embedding.weight.is_meta:  # offloaded: there only while the embedding itself is called
            ids = torch.arange(self.config.vocab_size, device=hidden.device)
            logits = nn.functional.linear(hidden, embedding(ids))
        else:
            logits = self.decoder.logits(hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **others)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **caches)

    @torch.no_grad()
    def generate(self, input_ids=None, pixel_values=None, **options: Any):
        """Captions, or answers after a question; the photo passes the encoder once.

        Captions that a beam search finds are ordered by their score and, `config.rerank` times,
        the CIDEr that the photo promises them. `no_repeat_ngram_size` holds for what is written,
        the configuration's for captions only; nor is a word written twice in a row. Questions are
        answered greedily, unless the call or its `generation_config` gives another `num_beams`.
        """
        features = self.features(pixel_values)
        memory = self.memory(features)
        if input_ids is None:
            start = self.generation_config.bos_token_id
            input_ids = torch.full((len(memory), 1), start, device=memory.device)
        settings = options.get("generation_config") or self.generation_config
        room = self.config.max_position_embeddings - input_ids.shape[1]
        if room < 1:
            raise ValueError(f"a question of {input_ids.shape[1]} tokens leaves no room to answer")
        set_by = options if {"max_length", "max_new_tokens"} & {*options} else vars(settings)
        wanted, longest = set_by.get("max_new_tokens"), set_by.get("max_length")
        options.pop("max_length", None)
        if set_by is not options and longest == transformers.GenerationConfig().max_length:
            longest = None  # nobody asked: before 5.0 it is 20 where nothing is said
        if longest and wanted is None:
            wanted = longest - input_ids.shape[1]
        options["max_new_tokens"] = min(room, room if wanted is None else wanted)
        plain, learned = self.plain(input_ids), self.config.trained["tasks"]
        asked = {"captions": plain, "questions": input_ids == self.config.answer_token_id}
        if strange := [task for task in asked if asked[task].any() and task not in learned]:
            raise ValueError(f"this captioner was trained for {learned[0]} only, not {strange[0]}")
        given = options.get("no_repeat_ngram_size")
        if size := settings.no_repeat_ngram_size if given is None else given:
            rule = NoRepeat(size, input_ids.shape[1], plain | (given is not None))
            rules = [*(options.get("logits_processor") or ()), rule]
            options["logits_processor"] = transformers.LogitsProcessorList(rules)
        options["no_repeat_ngram_size"] = 0  # the library's own rule counts the prompt, too
        beams = options.get("num_beams", settings.num_beams) or 1
        if "num_beams" not in options and beams == self.generation_config.num_beams:
            beams = options["num_beams"] = beams if plain.any() else 1
        sampled = options.get("do_sample", settings.do_sample)
        if self.reranker is None or not self.config.rerank or beams == 1 or sampled:
            return super().generate(input_ids, memory=memory, **options)
        wanted = options.pop("num_return_sequences", settings.num_return_sequences) or 1
        whole = options.pop("return_dict_in_generate", settings.return_dict_in_generate)
        # All beams, and an error of the library where more are wanted.
        options |= {"num_return_sequences": max(beams, wanted), "return_dict_in_generate": True}
        options["output_scores"] = True
        found = super().generate(input_ids, memory=memory, **options)
        order = self.best_first(features, input_ids.shape[1], plain, found)
        order = order[:, :wanted].flatten()
        for name in ("sequences", "sequences_scores", "beam_indices"):
            found[name] = found[name][order]
        return found if whole else found.sequences

    def plain(self, input_ids: Tensor) -> Tensor:
        """Which prompts (photos, 1) are START alone, and so ask for a caption."""
        return (input_ids != self.config.pad_token_id).sum(1, keepdim=True) == 1

    def best_first(self, features: Tensor, start: int, plain: Tensor, found) -> Tensor:
        """Each photo's sequences in their new order, as indices (photos, beams);
        `sequences_scores` are raised.

        Answers, whose prompts aren't `plain`, stay in theirs; `start` is the prompts' length.
        """
        end = self.config.eos_token_id
        scores = found.sequences_scores.view(len(features), -1)
        written = found.sequences[:, start:].unflatten(0, scores.shape).tolist()
        captions = [[ids[: [*ids, end].index(end) + 1] for ids in group] for group in written]
        promised = scores.new_tensor(self.reranker.restored.expected(features, captions))
        scores = scores + torch.where(plain, self.config.rerank * promised, 0.0)
        found["sequences_scores"] = scores.flatten()
        best = scores.sort(dim=1, descending=True, stable=True).indices
        return best + torch.arange(0, scores.numel(), scores.shape[1], device=best.device)[:, None]
