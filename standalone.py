"""A captioner as a repository that plain `transformers` loads, without this project."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import transformers

from checkpoint import Checkpoint
from tokenizer import ANSWER, ANSWER_ID, ASKING, END_ID, FULL_STOPS, PAD_ID, START_ID
from utils import UserError

CODE = "modeling_captioner"
TRUST = "AutoModelForImageTextToText.from_pretrained(..., trust_remote_code=True)"
PROCESSOR = "VisionCaptionerProcessor"  # of which a pipeline that is saved keeps no file
AUTO = {
    "AutoConfig": "VisionCaptionerConfig",
    "AutoModelForImageTextToText": "VisionCaptioner",
    "AutoModel": "VisionCaptioner",
    "AutoProcessor": PROCESSOR,
}


def refusal(tower: dict[str, Any]) -> str:
    """Why a captioner with this encoder can't be used by `transformers` alone, if it can't."""
    takes = inspect.signature(getattr(transformers, tower["class"]).forward).parameters.values()
    needed = {each.name for each in takes if each.default is each.empty}
    if more := sorted(needed - {"self", "pixel_values", "args", "kwargs"}):
        return (
            f"the encoder takes more than pixels ({', '.join(more)}), which transformers alone "
            "would not give it: use the checkpoint itself, with this project"
        )
    return ""


def repository_files(checkpoint: Checkpoint, tower: dict[str, Any]) -> dict[str, str]:
    """All that stands beside `model.safetensors`, {file: text}, unless there is a `refusal`;
    `tower` is `FrozenEncoder.for_others()`."""
    if why := refusal(tower):
        raise UserError(why)
    size, options = checkpoint.model.config, checkpoint.generation
    described = checkpoint.for_others().description()
    described["encoder"] |= {"name": tower.get("name")}
    del described["tokenizer"]  # it has files of its own
    special = {"pad_token_id": PAD_ID, "bos_token_id": START_ID, "eos_token_id": END_ID}
    config = {
        "model_type": "vision_captioner",
        "architectures": ["VisionCaptioner"],
        "auto_map": {auto: f"{CODE}.{kind}" for auto, kind in AUTO.items()},
        "tower": {key: tower[key] for key in tower if key != "processor"},
        "layers": checkpoint.encoder["layers"],
        "feature_width": checkpoint.model.feature_width,
        "vocab_size": size.vocab_size,
        "hidden_size": size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "ff_dim": size.ff_dim,
        "max_position_embeddings": size.max_length,
        "tie_word_embeddings": False,  # the output layer is the embedding itself
        "dtype": "float32",
        "transformers_version": transformers.__version__,
        "trained": described,
        "answer_token_id": ANSWER_ID,  # closes a question
        **special,
    }
    generation = {
        **special,
        "suppress_tokens": [PAD_ID, START_ID, ANSWER_ID],
        "num_beams": options.beam_size,
        "length_penalty": options.length_penalty,
        "no_repeat_ngram_size": options.no_repeat_ngram,
    }
    # Classes of the library itself, which would otherwise take what they know of this for their
    # own configuration and give random weights, stumble over these.
    config |= dict.fromkeys(("hidden_act", "activation_function"), TRUST)
    config |= {part: {"model_type": TRUST} for part in ("encoder", "decoder")}
    if held := checkpoint.reranker:
        config |= {"reranker": held.sizes, "rerank": options.rerank}
    ours = {"processor_class": PROCESSOR, "auto_map": {"AutoProcessor": f"{CODE}.{PROCESSOR}"}}
    files = checkpoint.tokenizer.to_files()
    of_tokenizer = json.loads(files["tokenizer_config.json"])
    of_tokenizer |= {"padding_side": "left", "additional_special_tokens": [ANSWER]}
    of_tokenizer["model_max_length"] = size.max_length  # half of which a question may take
    if end := checkpoint.tokenizer.question_end:  # what it takes the place of, one after the other
        of_tokenizer["question_end"] = [f" .{FULL_STOPS}", ASKING, end]
    texts = {
        "config.json": config,
        "generation_config.json": generation,
        "processor_config.json": ours,
        "tokenizer_config.json": of_tokenizer,
    }
    files |= {name: json.dumps(content, indent=2) + "\n" for name, content in texts.items()}
    for name in (CODE, "pictures", "decoder", "rerank"):  # which import nothing else of ours
        files[f"{name}.py"] = Path(__file__).with_name(f"{name}.py").read_text("utf-8")
    return files | {"preprocessor_config.json": tower["processor"]}
