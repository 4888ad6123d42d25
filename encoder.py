"""The frozen, pretrained image encoder with its own preprocessing: pictures to patch vectors."""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import inspect
import io
import json
import math
import os
import re
import stat
import struct
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import huggingface_hub
import torch
import transformers
from PIL import AvifImagePlugin, Image, UnidentifiedImageError
from torch import Tensor, nn
from transformers.image_utils import SizeDict

from pictures import check_exif, upright_rgb
from utils import UserError, first_line, last_part, lfs_note, refused, shown

# By their names; hidden files and what only a program could draw (EPS, PDF) are none.
PHOTO_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .avif .jp2 .ppm .pgm .mpo".split()
)
# The formats of those (an MPO is opened as a JPEG). Of Pillow's others some start a program, as
# EPS does Ghostscript.
PHOTO_FORMATS = "AVIF BMP GIF JPEG JPEG2000 PNG PPM TIFF WEBP".split()
# Pixels that are decoded, in some 12 bytes each of RAM; these formats take more while they do.
# A JPEG is decoded small, so it may be as large as Pillow allows, if it doesn't come in passes.
LARGEST, LARGEST_OF = 48_000_000, {"JPEG2000": 16_000_000, "AVIF": 24_000_000, "WEBP": 24_000_000}
# What costs a pass over all that came before: a JPEG's scans, of which progressive ones have ten,
# and a PPM's comments; by how a file begins: its sign, and how many are read.
PASSES = {b"\xff\xd8": (b"\xff\xda", 200)} | dict.fromkeys((b"P1", b"P2", b"P3"), (b"#", 100))
# How often a file is read from; of a GIF, whose first frame takes few, each may join a comment.
MOST_READS, MOST_OF_GIF = 1_000_000, 5_000
# What a JPEG 2000 says of its size. Of each component of each tile, memory is taken at once: 3 kB.
SIZ, MOST_PARTS = re.compile(rb"\xff\x51(?=(.{38}))", re.DOTALL), 100_000
MOST_SAID = 4096  # layers of an encoder, and pixels along a side of what it sees
SIDES = "height width longest_edge shortest_edge".split()
TILE = (322, 323)  # the TIFF tags, a tile's width and length, which is unpacked whole
STRETCHED = 8  # longer side by shorter: beyond, a picture is cut before it is resized
LOADING = threading.Lock()  # what the library says is set for all threads at once
CLASS = "cls"  # among layers: the first vector, which often is CLS, is the last layer's

Layer = int | str  # -1 is the last one; or CLASS


class ImageError(UserError):
    """A picture that can't be read; the message names the file."""


def open_image(path: str | os.PathLike[str] | BinaryIO, least: int = 1024) -> Image.Image:
    """Open a picture as `as_rgb` gives it; of an animation its first frame.

    Args:
        least: the side in pixels that is enough (by default more than is shown anywhere): a JPEG,
            unless progressive, is decoded at a half, quarter or eighth of its size where both sides
            stay at least that long, several times as fast, so one too large to be read whole too.
    """
    is_name, name = isinstance(path, str | os.PathLike), shown(path)
    with _named(name):
        if is_name and stat.S_ISFIFO(os.stat(path).st_mode):
            raise ImageError(f"{name} is a pipe, not a picture")  # to open it may take for ever
        with open(path, "rb") if is_name else contextlib.nullcontext(path) as file:
            seekable = getattr(file, "seekable", bool)()
            spared = Spared(file if seekable else io.BytesIO(file.read()))
            with Image.open(spared, formats=PHOTO_FORMATS) as image:
                return as_rgb(image, name, least)


class Spared:
    """A picture's file, of which not much more is read than it holds: each of a TIFF's tags may
    point to all of it. One that a reader would pass over for hours is refused."""

    def __init__(self, file: BinaryIO):
        self.file, self.left = file, 8 * file.seek(0, os.SEEK_END) + 2**24
        file.seek(0)
        begin = file.read(16)
        if AvifImagePlugin._accept(begin) is True:  # Pillow looks into its EXIF at once
            avif = AvifImagePlugin._avif.AvifDecoder(begin + file.read(), "auto", 1)
            *_, exif, _, _ = avif.get_info()
            check_exif(len(exif or b""))
        self.exif = 0  # bytes
        self.reads = MOST_OF_GIF if begin[:2] == b"GI" else MOST_READS
        sign, most = PASSES.get(begin[:2], (b"", 0))
        content = begin + file.read() if sign else b""
        count = content.count(sign) if sign else 0
        if count > most + len(content) / 20_000:  # some stand by chance in what is packed
            raise ValueError(f"it would be passed over {count:,} times")
        if begin.startswith((b"\xff\x4f", b"\0\0\0\x0cjP")):
            check_tiles(begin + file.read())
        file.seek(0)

    def read(self, *size: int) -> bytes:
        part = self.file.read(*size)
        self.left -= len(part)
        self.reads -= 1
        if part.startswith(b"Exif\0\0"):  # a JPEG's parts are joined, and looked into at once
            self.exif += len(part)
            check_exif(self.exif)
        if self.left < 0 or self.reads < 0:
            raise ValueError("it would be passed over without end: save it as JPEG or PNG")
        return part

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def check_tiles(content: bytes) -> None:
    """Refuse a JPEG 2000 of tiles without end: 14 kB of them would take 7 GB."""
    for said in SIZ.finditer(content):  # a wrong one may stand before what counts
        length, _, *sizes, count = struct.unpack(">2H8IH", said[1])
        (wide, high), (tile_wide, tile_high), (left, top) = sizes[:2], sizes[4:6], sizes[6:]
        if length == 38 + 3 * count and tile_wide and tile_high:  # else it is none
            tiles = math.ceil((wide - left) / tile_wide) * math.ceil((high - top) / tile_high)
            if tiles * count > MOST_PARTS:
                raise ValueError(f"it has {tiles:,} tiles of {count} components")


def as_rgb(image: Image.Image, name: str = "the picture", least: int | None = None):
    """A picture, if it isn't too large, as `upright_rgb` gives it."""
    with _named(name):
        if least and not image.info.get("progressive"):
            image.draft(None, (least, least))
        tags = getattr(image, "tag_v2", {})
        rows = image.height * max(image.width, 4)  # a row of one pixel takes no less
        pixels = max(rows, math.prod(int(tags.get(t, 0)) for t in TILE))
        most = LARGEST_OF.get(image.format, LARGEST)
        if pixels > most:
            raise ImageError(
                f"{name} is too large a picture: it has {pixels / 1e6:.0f} megapixels, at most "
                f"{most / 1e6:.0f} are read; make it smaller, or a JPEG (not progressive)"
            )
        return upright_rgb(image)


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Say in one line which picture can't be read, and why."""
    try:
        yield
    except ImageError:
        raise
    except FileNotFoundError:
        missing, address = ": there is no such picture", " is an address: download the photo"
        raise ImageError(f"{name}{address if '://' in name else missing}") from None
    except UnidentifiedImageError:
        unknown = f"it is of no kind known here{lfs_note(name)}"
        raise ImageError(f"{name} is not a readable picture: {unknown}") from None
    except Exception as error:  # noqa: BLE001 - what Pillow raises for broken files is without end
        raise ImageError(f"{name} is not a readable picture: {first_line(error)}") from None


class FrozenEncoder(nn.Module):
    """A vision tower from Hugging Face `transformers` that never trains.

    `train()` leaves it in evaluation mode and its parameters take no gradient, so that a model
    that holds it can't wake its dropout or change its weights.
    """

    def __init__(self, tower: nn.Module, processor: Any, layers: Sequence[Layer], source: dict):
        super().__init__()
        self.tower = tower.requires_grad_(False).eval()
        self.processor = processor
        self.layers = tuple(layers)
        self.source = source
        self.call: dict[str, bool] = {}  # what the tower is told with each batch
        self.square = tower.config.model_type == "siglip2_vision_model"

    @classmethod
    def load(
        cls,
        name: str,
        revision: str | None = None,
        layers: Sequence[Layer] = (-1,),
        flag: str = "--encoder_model_name",
        image_size: int = 0,
    ) -> FrozenEncoder:
        """Load a vision tower by Hub name or from a local folder.

        Args:
            layers: hidden layers whose vectors are joined along the width; -1 is the last one,
                after the tower's closing norm, where it has one for all vectors (CLIP's has none);
                with "cls" the first vector is that of -1, as CLIP's loss sees no other of them.
            flag: with which another one is given.
            image_size: pixels along each side of what it sees; 0: as its preprocessing says.
        """
        name = os.path.expanduser(name)
        place = "folder" if os.path.isdir(name) else "Hub name (is there a network?) or folder"
        place += next(filter(None, map(lfs_note, glob.glob(f"{glob.escape(name)}/*"))), "")
        wrong = f"the encoder {name!r} can't be loaded from that {place}: give another with {flag}"
        with refused("temporary files can't be written: set TMPDIR to where they can"):
            tempfile.gettempdir()  # the library needs it, or says that the folder is wrong
        # A program may have set another default device, by `torch.set_default_device`.
        with refused(wrong), quiet_library(), torch.device("cpu"):
            where = loading_options(name, revision)
            config = transformers.AutoConfig.from_pretrained(name, **where)
            config = getattr(config, "vision_config", config)
            tower_class, options = _tower_class(config)
            processor = _load_processor(name, config, where)
            check_sizes(processor, config)
            options |= where | {"output_loading_info": True, "dtype": torch.float32}
            tower, info = tower_class.from_pretrained(name, config=config, **options)
            processor(images=[Image.new("RGB", (8, 8))])  # it may lack a library
        missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)
        if wrong := missing + sorted(map(str, info["mismatched_keys"])):
            raise UserError(
                f"the encoder {name!r} has no weights for {len(wrong)} parameters of its vision "
                f"tower, first {wrong[0]}: it would be partly random. Choose another encoder."
            )
        depth = getattr(config, "num_hidden_layers", 0)  # stages of convolutions are none to join
        known = range(-depth - 1, 0)
        joined = [i for i in layers if i != CLASS] if isinstance(layers, Sequence) else []
        if not 1 <= len(joined) <= len(known) or any(layer not in known for layer in joined):
            there = f"the layers -{depth + 1} to -1" if depth else "the layer -1 alone"
            others = ", or other layers" if depth else ", or --encoder_layers=-1"
            raise UserError(
                f"ENCODER_LAYERS is {str(layers)[:99]}, but {name!r} has {there}: give another "
                f"with {flag}" + others * (flag != "--encoder")
            )
        for held in (*tower.parameters(), *tower.buffers()):
            # Mapped, they would change, or crash, with a file that is written over.
            held.data = held.data.clone()
        revision = getattr(config, "_commit_hash", None) or revision
        source = {"name": name, "revision": revision, "weights": _fingerprint(tower)}
        source["activation"] = str(getattr(config, "hidden_act", None))
        encoder = cls(tower, processor, layers, source)
        if image_size not in (0, encoder.side):
            encoder._see_at(image_size)
        return encoder

    def _see_at(self, pixels: int) -> None:
        """Show it pictures of another size; where it learned a vector for each place, the library
        interpolates these."""
        if pixels not in range(self.patch_size, MOST_SAID + 1, self.patch_size):
            raise UserError(
                f"ENCODER_IMAGE_SIZE is {str(pixels)[:99]}: {self.source['name']!r} sees patches "
                f"of {self.patch_size} pixels, so give a multiple of that, up to {MOST_SAID}"
            )
        scale = pixels / self.side
        del self.side
        for name in () if self.square else ("size", "crop_size"):
            if sides := dict(getattr(self.processor, name, None) or {}):
                sides = {side: round(scale * length) for side, length in sides.items()}
                setattr(self.processor, name, SizeDict(**sides))
        self.source["image_size"] = pixels
        if "interpolate_pos_encoding" in inspect.signature(self.tower.forward).parameters:
            self.call = {"interpolate_pos_encoding": True}

    @classmethod
    def load_as_trained(
        cls, identity: dict[str, Any], width: int, moved_to: str | None = None
    ) -> FrozenEncoder:
        """Load the encoder of this `identity()` and width, from where it `moved_to`, if it has."""
        name = moved_to or identity["name"]
        revision = None if moved_to else identity.get("revision")
        size = identity.get("image_size", 0)
        encoder = cls.load(name, revision, identity.get("layers"), "--encoder", size)
        here = encoder.identity()
        there = completed(identity, here)
        parts = "weights", "activation", "preprocessing"
        changed = [key for key in parts if here[key] != there.get(key)]
        changed += ["width"] if encoder.width != width else []
        if changed:
            raise UserError(
                f"the encoder {name!r} is not the one that the checkpoint was trained on (its "
                f"{' and '.join(changed)} differ): give the right one with --encoder"
            )
        return encoder

    @property
    def width(self) -> int:
        """Width of a feature vector: that of the tower times the number of layers joined."""
        config = self.tower.config
        last = getattr(config, "hidden_size", None) or config.hidden_sizes[-1]
        return last * sum(layer != CLASS for layer in self.layers)

    @property
    def patch_size(self) -> int:
        size = getattr(self.tower.config, "patch_size", 1)
        return size if isinstance(size, int) else max(size)  # InternVL's has height and width

    def open(self, path: str | os.PathLike[str] | BinaryIO) -> Image.Image:
        """Open a picture at twice the size that `preprocess` brings it to, or larger: so a crop of
        60 % has enough pixels, and the resizing more than it keeps."""
        return open_image(path, 2 * self.side)

    @functools.cached_property
    def side(self) -> int:
        """Pixels along the longer side of what the tower sees."""
        if self.square:
            usual = int(self.tower.config.num_patches**0.5) * self.patch_size
            return self.source.get("image_size", usual)
        return max(self.preprocess([Image.new("RGB", (8, 8))])["pixel_values"].shape[-2:])

    def identity(self) -> dict[str, Any]:
        """What the features depend on: weights, layers and preprocessing, as plain values."""
        processing = json.loads(self.processor.to_json_string())
        # These say how the processor was loaded, not what it does to a picture.
        for key in ("_processor_class", "processor_class", "image_processor_type"):
            processing.pop(key, None)
        return self.source | {"layers": list(self.layers), "preprocessing": processing}

    def for_others(self, weights: bool) -> dict[str, Any]:
        """What `modeling_captioner.py` needs: the tower's configuration if its weights are there,
        else its name, and the preprocessor's. Of a folder here only the last part is told."""
        tower_class, options = _tower_class(self.tower.config)
        if weights:
            options.pop("key_mapping", None)
            tower: dict[str, Any] = {"config": self.tower.config.to_dict()}
            tower["config"].pop("_name_or_path", None)  # a folder here, perhaps
        else:
            told = public(self.source)
            tower = {"name": told["name"], "revision": told["revision"]}
            tower["weights"] = _nameless(self.tower)
        tower |= {"class": tower_class.__name__, "options": options, "call": self.call}
        return tower | {"processor": self.processor.to_json_string()}

    def __reduce__(self) -> tuple[Any, ...]:
        """Sent to another process, it is loaded there: the library's hooks can't be sent."""
        device = next(self.parameters()).device
        return _loaded_again, (self.identity(), self.width, device)

    def train(self, mode: bool = True) -> FrozenEncoder:
        """Do nothing: frozen means frozen."""
        return self

    def preprocess(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """RGB pictures -> what `forward` takes; `pixel_values` is (images, 3, height, width)."""
        options = {}
        if getattr(self.processor.size, "shortest_edge", None):
            # Resized by its shorter side, a line of pixels would take gigabytes.
            images = [_middle(image, STRETCHED) for image in images]
        if self.square:
            # SigLIP2's NaFlex towers take any shape; a square one gives each picture the same
            # number of patches, none of them padding, as the feature cache needs.
            shape = (self.side, self.side)
            images = [image.resize(shape, Image.Resampling.BICUBIC) for image in images]
            options = {"max_num_patches": (self.side // self.patch_size) ** 2}
        return dict(self.processor(images=list(images), return_tensors="pt", **options))

    def check(self) -> None:
        """Refuse a tower that doesn't make (patches, width) of pictures of any shape, together and
        alone the same: there are some that pool, or leave patches out at random."""
        shapes = ((96, 64), (64, 160))
        pictures = [Image.radial_gradient("L").convert("RGB").resize(shape) for shape in shapes]
        size = " or ENCODER_IMAGE_SIZE" * ("image_size" in self.source)
        with refused(
            f"the encoder {self.source['name']!r} makes no sequence of {self.width} numbers a "
            f"patch of each picture with --encoder_layers={','.join(map(str, self.layers))}: "
            f"choose another, or other layers{size}"
        ):
            alone, other = (self.preprocess([picture]) for picture in pictures)
            device = next(self.parameters()).device
            first = self({name: alone[name].to(device) for name in alone})
            both = self({name: torch.cat([alone[name], other[name]]).to(device) for name in alone})
            if both.dim() != 3 or len(both) != 2 or both.shape[2] != self.width:
                raise UserError(f"it gives {tuple(both.shape)} for two pictures")
            apart = (both[:1] - first).norm() if both[:1].shape == first.shape else torch.inf
            if apart > 0.05 * first.norm():
                raise UserError("the same picture gives others")

    @torch.inference_mode()
    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Preprocessed pictures -> features (images, patches, width), the whole sequence."""
        deep = self.layers != (-1,)
        output = self.tower(**inputs, output_hidden_states=deep, **self.call)
        last, hidden = output.last_hidden_state, output.hidden_states
        if last.dim() == 4:  # convolutions make maps (images, width, rows, columns)
            last = last.flatten(2).mT
        joined = [last if i == -1 else hidden[i] for i in self.layers if i != CLASS]
        if CLASS in self.layers:
            joined = [torch.cat([last[:, :1], vectors[:, 1:]], dim=1) for vectors in joined]
        return torch.cat(joined, dim=-1)


def _loaded_again(identity: dict[str, Any], width: int, device: torch.device) -> FrozenEncoder:
    return FrozenEncoder.load_as_trained(identity, width).to(device)


def decisive(identity: dict[str, Any]) -> dict[str, Any]:
    """Of an `identity()` what features depend on: a folder that moved, or a branch that was
    renamed, holds the same weights all the same."""
    return {key: identity[key] for key in identity if key not in ("name", "revision")}


def completed(older: dict[str, Any], identity: dict[str, Any]) -> dict[str, Any]:
    """An `identity()` that was noted before, to be compared with today's: the first versions didn't
    note the activation, which is taken for the same."""
    return {"activation": identity["activation"]} | older


def public(identity: dict[str, Any]) -> dict[str, Any]:
    """An `identity()` as others may see it: of a folder here only the last part is told."""
    name = identity["name"]
    local = os.path.isdir(name)
    told = {"name": last_part(os.path.abspath(name) if local else name)}
    return identity | told | ({"revision": None} if local else {})


def loading_options(name: str, revision: str | None = None) -> dict[str, Any]:
    """How a library's `from_pretrained` is to load `name`: without the code that it may bring, of
    which it would ask on standard input; from what was downloaded before if the Hub is silent."""
    options = {"trust_remote_code": False, "revision": revision}
    if not os.path.isdir(name) and (problem := hub_problem()):
        if not huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision):
            raise UserError(f"the Hub doesn't answer ({problem})")
        options["local_files_only"] = True
    return options


def hub_problem() -> str:
    """Why the Hub doesn't answer, or "". It is asked once, where the client would try for long."""
    if huggingface_hub.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=3)
    except Exception as error:  # noqa: BLE001 - of whatever sort
        return first_line(error)
    return ""


@contextlib.contextmanager
def quiet_library() -> Iterator[None]:
    """Keep the library's loading report off the screen: what matters in it we check and say."""
    library = transformers.utils.logging
    with LOADING:
        level, bars = library.get_verbosity(), library.is_progress_bar_enabled()
        library.set_verbosity_error()
        library.disable_progress_bar()
        try:
            yield
        finally:
            library.set_verbosity(level)
            if bars:
                library.enable_progress_bar()


def _middle(image: Image.Image, ratio: int) -> Image.Image:
    """The middle of a picture that is longer than `ratio` times its width, or wider."""
    most = ratio * min(image.size)
    left, top = (max(0, side - most) // 2 for side in image.size)
    return image.crop((left, top, image.width - left, image.height - top)) if left + top else image


def parse_layers(text: str) -> tuple[Layer, ...]:
    """ENCODER_LAYERS, such as "cls,-2" or "-1,-4", as numbers and CLASS."""
    parts = map(str.strip, text.split(","))
    with refused(f'ENCODER_LAYERS is {text!r}: write it like "cls,-2", "-1" or "-1,-4"'):
        return tuple(part if part == CLASS else int(part) for part in parts)


def check_sizes(processor: Any, *configs: Any) -> None:
    """Refuse what files of a few bytes say, but no machine has the time or memory for."""
    sizes = filter(None, (processor.size, getattr(processor, "crop_size", None)))
    sides = [dict(size).get(side) or 0 for size in sizes for side in SIDES]
    layers = [getattr(config, "num_hidden_layers", 0) for config in configs]
    layers += [sum(getattr(config, "depths", ())) for config in configs]  # of a network's stages
    for what, said in {"layers": layers, "pixels along a side": sides}.items():
        if max(said, default=0) > MOST_SAID:
            raise UserError(f"it says that it has {max(said):,} {what}")


def _load_processor(name: str, config: Any, where: dict[str, Any]) -> Any:
    """The preprocessing that comes with an encoder, done by Pillow."""
    files = ("preprocessor_config.json", "processor_config.json")
    if os.path.isdir(name) and not any(map(os.path.isfile, (f"{name}/{each}" for each in files))):
        # A folder of the library's Trainer, which saves only what it was given.
        raise UserError(f"it has no {files[0]}: copy that of the model it was trained from into it")
    if config.model_type == "dinov3_vit":  # its own needs torchvision, for the same steps
        return transformers.ViTImageProcessorPil.from_pretrained(name, **where)
    return transformers.AutoImageProcessor.from_pretrained(name, backend="pil", **where)


def _tower_class(config: Any) -> tuple[type, dict[str, Any]]:
    patches = hasattr(config, "patch_size") and hasattr(config, "num_hidden_layers")
    if not (patches or hasattr(config, "hidden_sizes")):  # as networks of convolutions have
        raise UserError(f"it is a {config.model_type} model, not a vision model of a known kind")
    if type(config) not in transformers.AutoModel._model_mapping:
        # AutoModel doesn't know the towers of BLIP, BLIP-2 or MetaCLIP 2, nor do all of them know
        # their weights' prefix in the whole model.
        named = type(config).__name__.replace("Config", "Model")
        if tower_class := getattr(transformers, named, None):
            return tower_class, {"key_mapping": {r"^vision_model\.": ""}}
        raise UserError(f"the tower of a {config.model_type} model can't be loaded by itself")
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


def _nameless(tower: nn.Module) -> str:
    """The same, whatever the library's version, which others choose, calls the weights."""
    tensors = (x.cpu().contiguous().view(-1).view(torch.uint8) for x in tower.state_dict().values())
    each = sorted(hashlib.sha256(tensor.numpy()).digest() for tensor in tensors)
    return hashlib.sha256(b"".join(each)).hexdigest()[:16]
