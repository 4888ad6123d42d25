"""Every setting of the project, with its default.

Edit a value here, or give it for one run as a flag of the same name in lower case:
`python train.py --batch_size 64`. Paths written here are relative to this file's folder, paths
given as flags are relative to the folder you are in. None means "the default that the comment
names".
"""

# --- Data -----------------------------------------------------------------------------------
DATASET = "flickr30k"  # flickr30k or flickr8k (downloaded), or custom (your own photos)
DATA_DIR = "../assets/multimodal_image_transformer/"  # where the data set lives
IMAGE_DIR = None  # folder of photos; None: images/ in DATA_DIR
CAPTIONS_FILE = None  # {"photo.jpg": ["caption", ...]}; None: captions.json in DATA_DIR
QUESTIONS_FILE = None  # questions about the photos, or a folder; None: questions.json in DATA_DIR
TASKS = "captions"  # what is learned: captions, questions, or both: "captions,questions"
QUESTION_WEIGHT = 1.0  # with both tasks: what an answer's tokens weigh beside a caption's
VOCAB_FILE = None  # vocab.json of an earlier training; None: learned, to vocab.json in DATA_DIR
MERGES_FILE = None  # its merges; None: learned, to merges.txt in DATA_DIR
SPLIT = "karpathy"  # karpathy (the field's, or the data's own), ratio (by file name), test (all)
KARPATHY_FILE = None  # his dataset_*.json, or a folder of lists; None: in DATA_DIR, or downloaded
TRAIN_SPLIT_RATIO = 0.9  # with SPLIT = "ratio": share for training; the rest is half val, half test
MAX_IMAGES = 0  # photos used, of each split its share, for a first try; 0: all
MAX_BAD_IMAGES = 10  # photos that may be missing or unreadable before the run is refused

# --- Data larger than a memory: WebDataset shards ----------------------------------------------
TRAIN_SHARDS = None  # tars to train on: "cc3m/{00000..00331}.tar", or https://; None: DATASET
VAL_SHARDS = None  # tars whose photos validate, unpacked to DATA_DIR; None: DATASET's val split
KEEP_SHARD_FEATURES = True  # on disk; False: each epoch reads the tars and encodes them anew
SHUFFLE_BUFFER = 5000  # photos, one of which is drawn next; in memory if features aren't kept

# --- Frozen image encoder -------------------------------------------------------------------
ENCODER_MODEL_NAME = "openai/clip-vit-base-patch16"  # Hub name or local folder
ENCODER_REVISION = None  # branch, tag or commit on the Hub; None: the newest
ENCODER_LAYERS = "cls,-2"  # hidden layers, joined ("-1,-4"); cls: their first vector is the last's
ENCODER_IMAGE_SIZE = 0  # pixels along each side of what it sees; 0: as it was trained (mostly 224)
FEATURES_DIR = None  # the feature cache; None: features/ in DATA_DIR
FEATURE_VIEWS = 1  # cached views per training photo: 1 plain, 2 adds its mirror image, more: crops
FEATURE_BATCH_SIZE = 32  # photos per encoder pass while the cache is built

# --- Tokenizer ------------------------------------------------------------------------------
VOCAB_SIZE = 10000  # most entries of the BPE vocabulary, learned from the training texts only
MAX_CAPTION_LENGTH = 100  # longest caption in tokens, START and END included; longer ones are cut

# --- Decoder --------------------------------------------------------------------------------
DECODER_EMBED_DIM = 512  # width of the decoder
DECODER_LAYERS = 6  # Transformer blocks
DECODER_HEADS = 8  # attention heads; must divide DECODER_EMBED_DIM
DECODER_FF_DIM = 2048  # hidden width of the feed-forward layers
DROPOUT = 0.1  # on embeddings, residual branches and the memory
PATCH_DROPOUT = 0.5  # share of a photo's vectors left out while training, others each time

# --- Training -------------------------------------------------------------------------------
NUM_EPOCHS = 12  # passes over the training photos, each with all of its captions
BATCH_SIZE = 32  # photos per step, of all processes together; each brings its captions, about 5
MIN_STEPS = 1  # steps of an epoch at least: where photos are few, each is of fewer
GRADIENT_ACCUMULATION_STEPS = 1  # steps whose gradients are summed before one update
LEARNING_RATE = 5e-4  # peak of the schedule
MIN_LEARNING_RATE = 2e-4  # where the cosine decay ends; high, as what is saved is an average
WARMUP_STEPS = 500  # updates of linear warm-up (at most a tenth of the run)
WEIGHT_DECAY = 0.05  # AdamW, on matrices only
GRADIENT_CLIP = 1.0  # largest norm of the gradient
MAX_BAD_STEPS = 10  # updates skipped in a row for a loss or gradient that is not finite
LABEL_SMOOTHING = 0.1  # share of the target spread over the vocabulary
EMA_DECAY = 0.999  # of the averaged weights that are validated and saved; 0: no average
SEED = 0  # of weights, order and dropout
DEVICE = "auto"  # auto, cuda, mps or cpu
COMPILE = False  # torch.compile the decoder's training: meant for GPUs, little gain on a CPU
PRECISION = "auto"  # auto (bf16 where the hardware multiplies it fast), bf16 or fp32

# --- Self-critical training: a second stage that raises CIDEr-D itself ------------------------
SCST_EPOCHS = 3  # epochs after NUM_EPOCHS; 0: no second stage
SCST_BEAM_SIZE = 5  # captions searched per photo, each measured against the others' mean
SCST_LEARNING_RATE = 3e-5  # falls linearly to MIN_LEARNING_RATE, if that is less

# --- Checkpoints ----------------------------------------------------------------------------
OUTPUT_DIR = None  # checkpoints and logs; None: DATA_DIR
CHECKPOINT_PREFIX = "captioner"  # {prefix}_epoch_{E}_val_loss_{L}.pt and .safetensors
KEEP_CHECKPOINTS = 3  # how many of the best stay on disk; 0: all
START_CHECKPOINT = None  # whose decoder and tokenizer to begin with: a file, or user/repo (Hub)
RESUME_CHECKPOINT_PATH = None  # a .pt to go on from, e.g. OUTPUT_DIR/last.pt; None: start anew

# --- Captions while training and by default afterwards ---------------------------------------
SAMPLE_IMAGES = 4  # validation photos whose captions are shown after each epoch
SCORED_IMAGES = 1000  # validation photos captioned greedily and scored (CIDEr) each epoch; 0: none
BEAM_SIZE = 10  # beams of the search; 1: greedy
LENGTH_PENALTY = 1.0  # scores are divided by length ** LENGTH_PENALTY; higher: longer captions
RERANK = 0.04  # what a point of the CIDEr that a photo's look promises adds to a score; 0: no say
NO_REPEAT_NGRAM = 3  # no n-gram of this size twice, nor a word twice in a row; 0: allowed

# --- Tracking and sharing -------------------------------------------------------------------
WANDB_PROJECT = "multimodal-image-transformer"  # Weights & Biases project; empty: no tracking
WANDB_ENTITY = None  # user or team; None: your default
WANDB_RUN_NAME = None  # None: Weights & Biases invents one
HF_REPO_ID = "wazzuck/multimodal_image_transformer"  # where each new best is pushed; empty: nowhere

# --- Presets --------------------------------------------------------------------------------
# Several settings at once, by `python train.py --preset small`; a flag given as well counts.
presets = {
    "small": {  # for some thousand photos: Flickr8k's recipe, see docs/results.md
        "DECODER_EMBED_DIM": 256,
        "DECODER_LAYERS": 3,
        "DECODER_HEADS": 4,
        "DECODER_FF_DIM": 1024,
        "DROPOUT": 0.2,
        "MIN_STEPS": 64,
        "LEARNING_RATE": 1e-3,
        "MIN_LEARNING_RATE": 4e-4,
        "WARMUP_STEPS": 200,
        "EMA_DECAY": 0.995,
        "QUESTION_WEIGHT": 4.0,
        "SCST_LEARNING_RATE": 4e-5,
        "SCORED_IMAGES": 500,
    },
}
