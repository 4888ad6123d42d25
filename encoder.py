"""The frozen, pretrained image encoder with its own preprocessing: pictures to patch vectors."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from utils import UserError, first_line

# The vision half of models that also hold a text half; every other encoder loads as AutoModel.
VISION_CLASSES = {
    "blip_vision_model": "BlipVisionModel",
    "clip_vision_model": "CLIPVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
    "siglip2_vision_model": "Siglip2VisionModel",
}


# By their names; hidden files and what only a program could draw (EPS, PDF) are none.
PHOTO_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .avif .jp2 .ppm .pgm .mpo".split()
)
ORIENTATION = 0x0112  # the EXIF tag, and what brings each of its values upright
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(UserError):
    """A picture that can't be read; the message names the file."""


def open_image(path: str | os.PathLike[str] | BinaryIO, least: int | None = None) -> Image.Image:
    """Open a picture as 8-bit RGB, turned as its EXIF tag says, transparency laid on white.

    Of an animation the first frame is used.

    Args:
        least: the side in pixels that is enough: a JPEG is decoded at a half, quarter or eighth
            of its size where both sides stay at least that long, which is several times as fast.
    """
    try:
        with Image.open(path) as image:
            if least:
                image.draft(None, (least, least))
            image.load()
            return _to_rgb(_upright(image))
    except FileNotFoundError:
        raise ImageError(f"{path}: there is no such picture") from None
    except IsADirectoryError:
        raise ImageError(f"{path} is a folder, not a picture") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"{path} is too large a picture: {error}") from None
    except Exception as error:  # noqa: BLE001 - what Pillow raises for broken files is without end
        raise ImageError(f"{path} is not a readable picture: {error}") from None


def _upright(image: Image.Image) -> Image.Image:
    """The picture turned as its EXIF tag says; Pillow's own way also writes EXIF anew, and fails
    where some other tag is odd."""
    turn = TURNS.get(image.getexif().get(ORIENTATION))
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel: Pillow's own conversion would clip
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


class FrozenEncoder(nn.Module):
    """A vision tower from Hugging Face `transformers` that never trains.

    `train()` leaves it in evaluation mode and its parameters take no gradient, so that a model
    that holds it can't wake its dropout or change its weights.
    """

    def __init__(self, tower: nn.Module, processor: Any, layers: Sequence[int], source: dict):
        super().__init__()
        self.tower = tower.requires_grad_(False).eval()
        self.processor = processor
        self.layers = tuple(layers)
        self.source = source
        self.square = tower.config.model_type == "siglip2_vision_model"

    @classmethod
    def load(
        cls, name: str, revision: str | None = None, layers: Sequence[int] = (-1,)
    ) -> FrozenEncoder:
        """Load a vision tower by Hub name or from a local folder.

        Args:
            layers: hidden layers whose vectors are joined along the width; -1 is the last one,
                after the tower's closing norm.
        """
        try:
            with _quiet_library():
                config = transformers.AutoConfig.from_pretrained(name, revision=revision)
                config = getattr(config, "vision_config", config)
                tower_class, options = _tower_class(name, config)
                options |= {"output_loading_info": True, "dtype": torch.float32}
                tower, info = tower_class.from_pretrained(
                    name, config=config, revision=revision, **options
                )
                processor = transformers.AutoImageProcessor.from_pretrained(
                    name, revision=revision, backend="pil"
                )
        except UserError:
            raise
        except Exception as error:  # noqa: BLE001 - a name, a file or the network may not be there
            where = "folder" if os.path.isdir(name) else "Hub name (is there a network?) or folder"
            raise UserError(
                f"the encoder {name!r} can't be loaded from that {where}: {first_line(error)}\n"
                "Give another one with --encoder_model_name."
            ) from None
        missing = [key for key in info["missing_keys"] if "pooler" not in key]
        if missing or info["mismatched_keys"]:
            wrong = sorted(missing) + sorted(map(str, info["mismatched_keys"]))
            raise UserError(
                f"the encoder {name!r} has no weights for {len(wrong)} parameters of its vision "
                f"tower, first {wrong[0]}: it would be partly random. Choose another encoder."
            )
        depth = config.num_hidden_layers
        for layer in layers:
            if not -depth - 1 <= layer <= -1:
                raise UserError(
                    f"ENCODER_LAYERS has {layer}, but {name!r} has the layers -{depth + 1} to -1"
                )
        source = {
            "name": name,
            "revision": getattr(config, "_commit_hash", None) or revision,
            "weights": _fingerprint(tower),
        }
        return cls(tower, processor, layers, source)

    @classmethod
    def load_as_trained(cls, identity: dict[str, Any], moved_to: str | None = None):
        """Load the encoder that a checkpoint was trained on, by its `identity()`.

        Args:
            moved_to: where it is now, if no longer where it was.
        """
        name = moved_to or identity["name"]
        revision = None if moved_to else identity["revision"]
        encoder = cls.load(name, revision, identity["layers"])
        here = encoder.identity()
        changed = [key for key in ("weights", "preprocessing") if here[key] != identity[key]]
        if changed:
            raise UserError(
                f"the encoder {name!r} is not the one that the checkpoint was trained on (its "
                f"{' and '.join(changed)} differ): give the right one with --encoder"
            )
        return encoder

    @property
    def width(self) -> int:
        """Width of a feature vector: that of the tower times the number of layers joined."""
        return self.tower.config.hidden_size * len(self.layers)

    @property
    def patch_size(self) -> int:
        return self.tower.config.patch_size

    def open(self, path: str | os.PathLike[str] | BinaryIO) -> Image.Image:
        """Open a picture at twice the size that `preprocess` brings it to, or larger.

        Twice, so that a crop of 60 % has enough pixels, and the resizing more than it keeps.
        """
        return open_image(path, 2 * self.side)

    @functools.cached_property
    def side(self) -> int:
        """Pixels along the longer side of what the tower sees."""
        if self.square:
            return int(self.tower.config.num_patches**0.5) * self.patch_size
        return max(self.preprocess([Image.new("RGB", (8, 8))])["pixel_values"].shape[-2:])

    def identity(self) -> dict[str, Any]:
        """What the features depend on: weights, layers and preprocessing, as plain values."""
        processing = json.loads(self.processor.to_json_string())
        # These say how the processor was loaded, not what it does to a picture.
        for key in ("_processor_class", "processor_class", "image_processor_type"):
            processing.pop(key, None)
        return self.source | {"layers": list(self.layers), "preprocessing": processing}

    def train(self, mode: bool = True) -> FrozenEncoder:
        """Do nothing: frozen means frozen."""
        return self

    def preprocess(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """RGB pictures -> what `forward` takes; `pixel_values` is (images, 3, height, width)."""
        options = {}
        if self.square:
            # SigLIP2's NaFlex towers take any shape; a square one gives each picture the same
            # number of patches, none of them padding, as the feature cache needs.
            shape = (self.side, self.side)
            images = [image.resize(shape, Image.Resampling.BICUBIC) for image in images]
            options = {"max_num_patches": (self.side // self.patch_size) ** 2}
        return dict(self.processor(images=list(images), return_tensors="pt", **options))

    @torch.inference_mode()
    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Preprocessed pictures -> features (images, patches, width), the whole sequence."""
        deep = self.layers != (-1,)
        output = self.tower(**inputs, output_hidden_states=deep)
        last, hidden = output.last_hidden_state, output.hidden_states
        return torch.cat([last if i == -1 else hidden[i] for i in self.layers], dim=-1)


@contextlib.contextmanager
def _quiet_library() -> Iterator[None]:
    """Keep the library's loading report off the screen: what matters in it we check and say."""
    library = transformers.utils.logging
    level = library.get_verbosity()
    library.set_verbosity_error()
    library.disable_progress_bar()
    try:
        yield
    finally:
        library.set_verbosity(level)
        library.enable_progress_bar()


def parse_layers(text: str) -> tuple[int, ...]:
    """ENCODER_LAYERS, such as "-1" or "-1,-4", as numbers."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f'ENCODER_LAYERS is {text!r}: write it like "-1" or "-1,-4"') from None


def _tower_class(name: str, config: Any) -> tuple[type, dict[str, Any]]:
    if config.model_type in VISION_CLASSES:
        # BLIP's tower alone doesn't know the prefix that its weights have in the whole model.
        options = {"key_mapping": {r"^vision_model\.": ""}} if "blip" in config.model_type else {}
        return getattr(transformers, VISION_CLASSES[config.model_type]), options
    if not hasattr(config, "patch_size") or not hasattr(config, "num_hidden_layers"):
        raise UserError(f"{name!r} is a {config.model_type} model, not a vision Transformer")
    tower_class = transformers.AutoModel._model_mapping[type(config)]
    if "add_pooling_layer" in inspect.signature(tower_class.__init__).parameters:
        return tower_class, {"add_pooling_layer": False}
    return tower_class, {}


def _fingerprint(tower: nn.Module) -> str:
    """A hash of all weights: the same name may hold other weights tomorrow."""
    digest = hashlib.sha256()
    for key, tensor in sorted(tower.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
