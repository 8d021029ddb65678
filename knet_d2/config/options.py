"""The configuration of K-Net: every node, its default and one line on what it does."""

from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg


def get_knet_cfg() -> CN:
    """The default config: Detectron2's with K-Net's nodes."""
    cfg = get_cfg()
    add_knet_config(cfg)
    return cfg


def add_knet_config(cfg: CN) -> None:
    """Add K-Net's nodes to a Detectron2 config (in place).

    Nodes that Detectron2 already has keep their meaning: ``MODEL.SEM_SEG_HEAD`` configures the producer of
    the static kernels, ``TEST.DETECTIONS_PER_IMAGE`` the number of instances, ``INPUT`` and ``SOLVER`` the rest.
    """
    _add_model_config(cfg)
    _add_backbone_config(cfg)
    _add_input_config(cfg)
    _add_data_config(cfg)
    _add_solver_config(cfg)
    _add_engine_config(cfg)


def _add_model_config(cfg: CN) -> None:
    # Whether torch.compile compiles backbone, static kernels and cascade, for up to 8 sizes of batches.
    cfg.MODEL.COMPILE = False
    cfg.MODEL.KNET = CN()
    knet = cfg.MODEL.KNET
    # Task: "instance", "panoptic" or "semantic"; see knet_d2/tasks.py for what it selects.
    knet.TASK = "panoptic"
    # Number of instance kernels N (paper: 100). Semantic models ignore it: they have one kernel per class.
    knet.NUM_KERNELS = 100
    # Number of thing classes; 0 = read from the metadata of DATASETS.TRAIN.
    knet.NUM_THING_CLASSES = 0
    # Number of stuff classes ("semantic": number of all classes); 0 = read from the metadata of DATASETS.TRAIN.
    knet.NUM_STUFF_CLASSES = 0
    # Contiguous ids of the thing classes in the data set's metadata; [] = read from the metadata of DATASETS.TRAIN.
    knet.THING_CATEGORY_IDS = []
    # Contiguous ids of the stuff classes in the data set's metadata; [] = read from the metadata of DATASETS.TRAIN.
    knet.STUFF_CATEGORY_IDS = []
    # Number of kernel update stages S.
    knet.NUM_STAGES = 3
    # Position encoding that the semantic FPN adds to its coarsest level: "sine", "coordinates" (two channels in [-1,
    # 1]) or "none".
    knet.POSITION_ENCODING = "sine"
    # Number of channels of the network of two layers that each kernel of "ImageKernelHead" has for its masks (CondInst:
    # 8), beside its 1x1 convolution; 0 = none.
    knet.MASK_NETWORK_WIDTH = 0
    # Dropout probability before the classifier of a semantic decode head and of its auxiliary head.
    knet.DROPOUT = 0.1
    # Whether training keeps no activations within static kernels and cascade, but computes them again.
    knet.CHECKPOINT = False

    knet.UPDATE_HEAD = CN()
    # Number of channels of the adaptive kernel update; wider kernels are split into groups of this size.
    knet.UPDATE_HEAD.FEATURE_DIM = 256
    # Number of heads of the self-attention between kernels.
    knet.UPDATE_HEAD.NUM_HEADS = 8
    # Hidden channels of the feed-forward network.
    knet.UPDATE_HEAD.FFN_DIM = 2048
    # Ablation: False replaces the adaptive update by a linear projection of the group feature.
    knet.UPDATE_HEAD.KERNEL_UPDATE = True
    # Ablation: False removes the self-attention and the feed-forward network.
    knet.UPDATE_HEAD.KERNEL_INTERACTION = True
    # Whether the masks of a stage are those of the stage before plus the products of its kernels and the feature,
    # instead of these products alone. Suits short training runs; official weights are without.
    knet.UPDATE_HEAD.RESIDUAL_MASKS = False
    # Whether classes are predicted from the kernels and from the mean of the pyramid's feature under their masks, not
    # from the kernels alone. Suits short training runs from pretrained backbones; official weights are without.
    knet.UPDATE_HEAD.POOLED_CLASSES = False
    # Initialisation of the update heads: "xavier" (official detection models) or "default" (PyTorch's; official
    # segmentation models).
    knet.UPDATE_HEAD.INIT = "xavier"

    knet.LOSS = CN()
    # Weight of the sigmoid focal loss on the kernels' class scores.
    knet.LOSS.CLASS_WEIGHT = 2.0
    # Weight of the binary cross entropy on the positive kernels' masks.
    knet.LOSS.MASK_WEIGHT = 1.0
    # Weight of the dice loss on the positive kernels' masks.
    knet.LOSS.DICE_WEIGHT = 4.0
    # Weight of the cross entropy over kernels, the rank loss of panoptic models and the main loss of semantic ones;
    # -1 = that of the task ("panoptic": 0.1, "semantic": 1, "instance": 0).
    knet.LOSS.RANK_WEIGHT = -1.0
    # Weight of the per-pixel class loss on the static semantic logits.
    knet.LOSS.DENSE_WEIGHT = 1.0
    # Weight of the focal loss on the map of centres, which MODEL.SEM_SEG_HEAD.NAME "ImageKernelHead" has; 0 = none.
    knet.LOSS.CENTER_WEIGHT = 0.0
    # Number of points of an image at which masks and label maps are compared in matching and losses (Mask2Former:
    # 12544), instead of every pixel; 0 = every pixel. At most a quarter of the up-sampled masks' pixels are sampled.
    knet.LOSS.NUM_POINTS = 0
    # Class target of a positive kernel: the IoU of its mask to this power (GFL: 1), so that scores tell how good masks
    # are; 0 = 1 for all.
    knet.LOSS.QUALITY_EXPONENT = 0.0
    # Weight of the auxiliary FCN head's cross entropy; 0 = no auxiliary head.
    knet.LOSS.AUXILIARY_WEIGHT = 0.0
    # Weight of the Lovász-Softmax loss, a surrogate of 1 - IoU, beside every cross entropy of label maps (semantic
    # models); 0 = none.
    knet.LOSS.LOVASZ_WEIGHT = 0.0
    # Factors on the cross entropy of each class's pixels in label maps, in the order of the classes (semantic models);
    # [] = 1 for all.
    knet.LOSS.LABEL_WEIGHTS = []
    # Focal alpha: weight of positive samples, in the loss and in the matching cost.
    knet.LOSS.FOCAL_ALPHA = 0.25
    # Focal gamma: down-weights well-classified examples, in the loss and in the matching cost.
    knet.LOSS.FOCAL_GAMMA = 2.0
    # Normalise every loss term over all processes. P processes with B / P images each then compute the same losses as
    # one process with B images.
    knet.LOSS.GLOBAL_NORMALIZERS = False

    knet.DENOISING = CN()
    # Most denoising kernels of an image (Mask DINO: 100; in training only): each starts from the moved mask of an
    # instance, which it has to restore. 0 = off.
    knet.DENOISING.NUM_KERNELS = 0
    # Largest shift of a mask's box, as a share of half its side, and largest change of its scale.
    knet.DENOISING.NOISE = 0.4
    # Factor on the losses of the denoising kernels.
    knet.DENOISING.WEIGHT = 1.0

    knet.ONE_TO_MANY = CN()
    # Number of kernels of the one-to-many group (H-DETR: 1500 beside 300; in training only), of which several are
    # matched to each instance. 0 = off.
    knet.ONE_TO_MANY.NUM_KERNELS = 0
    # Number of its kernels that each instance is matched with; fewer in images with many instances.
    knet.ONE_TO_MANY.REPEATS = 6
    # Factor on the losses of the one-to-many group.
    knet.ONE_TO_MANY.WEIGHT = 1.0

    knet.MATCHER = CN()
    # Weight of the focal class term in the matching cost.
    knet.MATCHER.CLASS_WEIGHT = 2.0
    # Weight of the pixel agreement term in the matching cost.
    knet.MATCHER.MASK_WEIGHT = 1.0
    # Weight of the dice term in the matching cost.
    knet.MATCHER.DICE_WEIGHT = 4.0

    knet.AUXILIARY_HEAD = CN()
    # Backbone feature that the auxiliary FCN head reads.
    knet.AUXILIARY_HEAD.IN_FEATURE = "res4"
    # Channels of the auxiliary head's one 3x3 convolution.
    knet.AUXILIARY_HEAD.CONV_DIM = 256

    knet.TEST = CN()
    # Outputs that the model returns; [] = the default of the task. Panoptic models support "panoptic_seg", "instances"
    # and "sem_seg".
    knet.TEST.OUTPUTS = []
    # Stage whose predictions are returned: 0 = static kernels, 1 to NUM_STAGES = this update stage, -1 = last stage.
    knet.TEST.STAGE = -1
    # Instances with a lower score are not returned.
    knet.TEST.SCORE_THRESHOLD = 0.0
    # Panoptic: thing segments with a lower score are dropped, and their pixels are void.
    knet.TEST.THING_SCORE_THRESHOLD = 0.3
    # Panoptic: a segment is dropped if it wins less than this share of its own mask's area.
    knet.TEST.OVERLAP_THRESHOLD = 0.6
    # Scores of things are their class probability times (expected IoU of the mask) to this power; 0 = off.
    knet.TEST.SCORE_EXPONENT = 0.0
    # Of two things whose masks have a larger IoU, whatever their classes, the one with the lower score is dropped; 1 =
    # off.
    knet.TEST.MASK_NMS = 1.0

    knet.VIDEO = CN()
    # Whether objects are followed by embeddings that are learned from pairs of frames, instead of by their kernels.
    knet.VIDEO.EMBEDDING = False
    # Whether kernels attend to those of the previous frame before the embedding.
    knet.VIDEO.LINKING = False
    # Whether the previous frame's kernels enter the last stage; this changes masks and classes.
    knet.VIDEO.FUSING = False
    # Number of channels of an embedding.
    knet.VIDEO.EMBEDDING_DIM = 256
    # Training: largest number of frames between a key frame and its reference frame, before or after it.
    knet.VIDEO.REFERENCE_RANGE = 2
    # Weight of the contrastive loss on the embeddings of a pair of frames.
    knet.VIDEO.CONTRAST_WEIGHT = 0.25
    # Weight of the squared error of the embeddings' cosines.
    knet.VIDEO.COSINE_WEIGHT = 1.0
    # Things of a frame with a score of at most this do not take part in tracking.
    knet.VIDEO.MIN_SCORE = 0.3
    # Things without a match start a track above this score.
    knet.VIDEO.NEW_TRACK_SCORE = 0.35
    # A thing joins a track only if the mean of the two softmaxes over their cosines is above this.
    knet.VIDEO.MATCH_THRESHOLD = 0.5
    # A thing joins a track only if the cosine of their kernels is above this.
    knet.VIDEO.MIN_COSINE = 0.5
    # What cosines are divided by before the softmaxes.
    knet.VIDEO.TEMPERATURE = 0.05
    # Weight of the new kernel in the running mean of a track's kernels.
    knet.VIDEO.MOMENTUM = 0.8
    # Number of successive frames that an object may be missing and still keep its track.
    knet.VIDEO.MEMORY = 4


def _add_backbone_config(cfg: CN) -> None:
    # Of Detectron2's MODEL.RESNETS.NORM and MODEL.FPN.NORM, two names are ours: "EvalBN" (eval mode, affine weights
    # train) and "SyncBN" (plain batch norm on one process).
    # Whether the FPN ends with a 3x3 convolution of each level; the semantic FPN begins with another one. MODEL.NECK
    # does without it.
    cfg.MODEL.FPN.OUTPUT_CONVS = True
    # "basic" (one 7x7 convolution) or "deeplab" (three 3x3 convolutions, ResNet-V1c).
    cfg.MODEL.RESNETS.STEM_TYPE = "basic"
    # Dilation of res4. A dilation above 1 sets the stride of res4 to 1, in the same way as RES5_DILATION for res5
    # (which may be 1, 2, or 4 after a dilated res4).
    cfg.MODEL.RESNETS.RES4_DILATION = 1

    cfg.MODEL.NECK = CN()
    neck = cfg.MODEL.NECK
    # What merges the backbone's features before the head: "FPN" (what the backbone's builder has), "BiFPN" or
    # "MSDeformAttn". Its maps have MODEL.FPN.OUT_CHANNELS channels.
    neck.NAME = "FPN"
    # Number of layers of "BiFPN" and "MSDeformAttn".
    neck.NUM_LAYERS = 6
    # Normalisation of the convolutions of "BiFPN" and "MSDeformAttn".
    neck.NORM = "GN"
    # "MSDeformAttn": number of heads.
    neck.NUM_HEADS = 8
    # "MSDeformAttn": number of points that a head samples in each map.
    neck.NUM_POINTS = 4
    # "MSDeformAttn": hidden channels of the feed-forward network.
    neck.FFN_DIM = 1024

    cfg.MODEL.SWIN = CN()
    swin = cfg.MODEL.SWIN
    # Number of channels of the first stage (Swin-T 96, Swin-L 192); every later stage doubles it.
    swin.EMBED_DIM = 96
    # Number of blocks of each stage (Swin-L: 2, 2, 18, 2).
    swin.DEPTHS = [2, 2, 6, 2]
    # Number of attention heads of each stage (Swin-L: 6, 12, 24, 48).
    swin.NUM_HEADS = [3, 6, 12, 24]
    # Side length of the attention windows.
    swin.WINDOW_SIZE = 7
    # Hidden channels of a block's MLP, as a multiple of the block's channels.
    swin.MLP_RATIO = 4.0
    # Drop path probability of the last block; it increases linearly from 0 in the first block.
    swin.DROP_PATH_RATE = 0.2
    # Stages that the backbone returns; each has its own layer norm.
    swin.OUT_FEATURES = ["res2", "res3", "res4", "res5"]

    cfg.MODEL.TIMM = CN()
    timm = cfg.MODEL.TIMM
    # Name of a network of timm, as "convnext_tiny" or "convnext_tiny.fb_in22k". MODEL.BACKBONE.FREEZE_AT freezes its
    # stem (1), also its first stage (2), and so on.
    timm.NAME = "resnet50"
    # Feature maps of "build_timm_backbone", named by stride: res2 (4), res3 (8), res4 (16), res5 (32). The pyramid of
    # "build_timm_fpn_backbone" has a level for each of MODEL.FPN.IN_FEATURES.
    timm.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    # Batch norms of the network: "BN" (as they are), "SyncBN" (over all GPUs) or "FrozenBN" (they never change).
    timm.NORM = "BN"
    # Drop path probability of the last block; it increases linearly from 0 in the first block.
    timm.DROP_PATH_RATE = 0.0
    # Whether training stores no activations within the network's blocks, but computes them again.
    timm.CHECKPOINT = False


def _add_input_config(cfg: CN) -> None:
    # INPUT.FORMAT is Detectron2's: "RGB", "BGR", "L" (grey), or as "5-channel" any number of channels.
    # Lowest and highest value in the image files, which the model sees as 0 and 255; [] = the range of their type: 0 to
    # 255 (8 bits), 0 to 65535 (16 bits), 0 to 1 (floats).
    cfg.INPUT.VALUE_RANGE = []
    # Training augmentations in their order: {name, arguments ...}, by the names of Detectron2. "Default" stands for
    # INPUT.MIN_SIZE_TRAIN, MAX_SIZE_TRAIN, CROP, RANDOM_FLIP and COLOR_AUG_SSD.
    cfg.INPUT.AUGMENTATIONS = [{"name": "Default"}]
    # Probability with which a training image gets objects of another one pasted onto it ("instance" and "panoptic").
    cfg.INPUT.COPY_PASTE = 0.0
    # Whether training images are augmented with SSD's photometric distortion.
    cfg.INPUT.COLOR_AUG_SSD = False
    # Semantic training: no class covers more than this share of a crop (1.0 = no constraint).
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 1.0


def _add_data_config(cfg: CN) -> None:
    # Custom data sets: a list of {name, type, ...} mappings, see docs/DATASETS.md.
    cfg.DATASETS.CUSTOM = []
    # Largest number of images of each custom data set that are used, for a first try; 0 = all.
    cfg.DATASETS.LIMIT = 0


def _add_solver_config(cfg: CN) -> None:
    # Optimiser: "ADAMW" or "SGD".
    cfg.SOLVER.OPTIMIZER = "ADAMW"
    # Factor on the learning rate of the backbone.
    cfg.SOLVER.BACKBONE_MULTIPLIER = 1.0
    # Factor on the learning rate from each layer of a backbone of timm to the layer before it; 1 = none.
    cfg.SOLVER.LAYER_DECAY = 1.0
    # Number of consecutive steps with a non-finite loss after which training stops. Earlier ones are skipped.
    cfg.SOLVER.NON_FINITE_STEPS = 1
    # Number of parts in which a batch is computed, one after the other, to save memory. Their gradients are accumulated
    # for one update.
    cfg.SOLVER.ACCUMULATE_GRADIENTS = 1
    # Decay of an exponential moving average of the weights, which is evaluated and saved as the model; 0 = none.
    cfg.SOLVER.EMA_DECAY = 0.0
    # Data type of mixed precision if SOLVER.AMP.ENABLED: "float16" (CUDA only) or "bfloat16".
    cfg.SOLVER.AMP.DTYPE = "float16"


def _add_engine_config(cfg: CN) -> None:
    # Number of iterations between two entries in the log, metrics.json and TensorBoard.
    cfg.SOLVER.LOG_PERIOD = 20
    # Experiment trackers that get metrics and pictures besides TensorBoard: "wandb", "mlflow" and "aim".
    cfg.SOLVER.TRACKERS = []
    # Number of newest periodic checkpoints that are kept; 0 = all. The best and the final checkpoint are always kept.
    cfg.SOLVER.CHECKPOINTS_TO_KEEP = 3
    # Training ends after this number of evaluations in a row without a better main metric; 0 = at SOLVER.MAX_ITER.
    cfg.SOLVER.PATIENCE = 0
    # Power of the learning rate schedule "WarmupPolyLR" (SOLVER.LR_SCHEDULER_NAME).
    cfg.SOLVER.POLY_LR_POWER = 0.9
    # Whether every evaluation also computes the training loss on the first data set in DATASETS.TEST, as
    # validation/total_loss.
    cfg.TEST.VALIDATION_LOSS = False
    # Number of validation images that every evaluation draws into TensorBoard, ground truth beside prediction.
    cfg.TEST.NUM_PICTURES = 4
    cfg.TEST.TILES = CN()
    # Side in pixels of the overlapping tiles in which evaluation predicts large images, whose objects are joined; 0 =
    # whole images.
    cfg.TEST.TILES.SIZE = 0
    # Pixels that neighbouring tiles share; 0 = a quarter of TEST.TILES.SIZE.
    cfg.TEST.TILES.OVERLAP = 0
    # Whether every evaluation writes OUTPUT_DIR/report.html.
    cfg.TEST.REPORT = True
