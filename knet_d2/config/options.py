"""The configuration of K-Net: every node, its default and one line on what it does."""

from detectron2.config import CfgNode as CN


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
    cfg.MODEL.KNET = CN()
    knet = cfg.MODEL.KNET
    # "instance", "panoptic" or "semantic": which groups of kernels the bank is made of.
    knet.TASK = "panoptic"
    # Instance kernels N (paper: 100; not used by "semantic", which has one kernel per class).
    knet.NUM_KERNELS = 100
    # Number of thing classes; 0 = from the metadata of DATASETS.TRAIN.
    knet.NUM_THING_CLASSES = 0
    # Number of stuff classes ("semantic": of all classes); 0 = from the metadata of DATASETS.TRAIN.
    knet.NUM_STUFF_CLASSES = 0
    # Contiguous ids that the data set's metadata gives its thing classes; [] = from the metadata of DATASETS.TRAIN.
    knet.THING_CATEGORY_IDS = []
    # Contiguous ids that the data set's metadata gives its stuff classes; [] = from the metadata of DATASETS.TRAIN.
    knet.STUFF_CATEGORY_IDS = []
    # Kernel update stages S.
    knet.NUM_STAGES = 3
    # What the semantic FPN adds to its coarsest level: "sine", "coordinates" (two channels in [-1, 1]) or "none".
    knet.POSITION_ENCODING = "sine"
    # Dropout before the classifier of a semantic decode head (and of its auxiliary head).
    knet.DROPOUT = 0.1

    knet.UPDATE_HEAD = CN()
    # Channels that the adaptive kernel update works on; wider kernels are split into groups of this size.
    knet.UPDATE_HEAD.FEATURE_DIM = 256
    # Heads of the self-attention between kernels.
    knet.UPDATE_HEAD.NUM_HEADS = 8
    # Hidden width of the feed-forward network.
    knet.UPDATE_HEAD.FFN_DIM = 2048
    # Ablation: False replaces the adaptive update by a linear projection of the group feature.
    knet.UPDATE_HEAD.KERNEL_UPDATE = True
    # Ablation: False leaves out attention and feed-forward network.
    knet.UPDATE_HEAD.KERNEL_INTERACTION = True
    # Initialisation of the update heads: "xavier" (detection release) or "default" (PyTorch's, segmentation release).
    knet.UPDATE_HEAD.INIT = "xavier"

    knet.LOSS = CN()
    # Weight of the sigmoid focal loss on the kernels' class scores.
    knet.LOSS.CLASS_WEIGHT = 2.0
    # Weight of the binary cross entropy on the positive kernels' masks.
    knet.LOSS.MASK_WEIGHT = 1.0
    # Weight of the dice loss on the positive kernels' masks.
    knet.LOSS.DICE_WEIGHT = 4.0
    # Weight of the cross entropy over kernels (panoptic: rank loss 0.1; semantic: the main loss, 1).
    knet.LOSS.RANK_WEIGHT = 0.1
    # Weight of the dense class loss on the static semantic logits.
    knet.LOSS.DENSE_WEIGHT = 1.0
    # Weight of the auxiliary FCN head's cross entropy; 0 = no auxiliary head.
    knet.LOSS.AUXILIARY_WEIGHT = 0.0
    # Focal loss parameters, for the losses and for the matching cost.
    knet.LOSS.FOCAL_ALPHA = 0.25
    knet.LOSS.FOCAL_GAMMA = 2.0
    # Normalise every term over all processes, so that P processes with B / P images compute what one with B computes.
    knet.LOSS.GLOBAL_NORMALIZERS = False

    knet.MATCHER = CN()
    # Weights of the matching cost's terms.
    knet.MATCHER.CLASS_WEIGHT = 2.0
    knet.MATCHER.MASK_WEIGHT = 1.0
    knet.MATCHER.DICE_WEIGHT = 4.0

    knet.AUXILIARY_HEAD = CN()
    # Backbone feature that the auxiliary FCN head reads.
    knet.AUXILIARY_HEAD.IN_FEATURE = "res4"
    # Channels of its one 3x3 convolution.
    knet.AUXILIARY_HEAD.CONV_DIM = 256

    knet.TEST = CN()
    # What is returned; [] = the task's own. Panoptic models can give "panoptic_seg", "instances", "sem_seg".
    knet.TEST.OUTPUTS = []
    # Whose predictions are returned: 0 = the static kernels', 1 to NUM_STAGES = a stage's, -1 = the last stage's.
    knet.TEST.STAGE = -1
    # Instances with a lower score are not returned.
    knet.TEST.SCORE_THRESHOLD = 0.0
    # Panoptic: thing segments with a lower score are dropped (their pixels stay void).
    knet.TEST.THING_SCORE_THRESHOLD = 0.3
    # Panoptic: a segment that wins a smaller part of its own mask's area is dropped.
    knet.TEST.OVERLAP_THRESHOLD = 0.6


def _add_backbone_config(cfg: CN) -> None:
    # Of Detectron2's MODEL.RESNETS.NORM and MODEL.FPN.NORM, two names are ours: "EvalBN" (eval mode, affine weights
    # train) and "SyncBN" (plain batch norm on one process).
    # "basic" (one 7x7 convolution) or "deeplab" (three 3x3 convolutions, ResNet-V1c).
    cfg.MODEL.RESNETS.STEM_TYPE = "basic"
    # Dilation of res4; above 1 its stride is 1, as RES5_DILATION does for res5 (1, 2, or 4 after a dilated res4).
    cfg.MODEL.RESNETS.RES4_DILATION = 1

    cfg.MODEL.SWIN = CN()
    swin = cfg.MODEL.SWIN
    # Channels of the first stage (Swin-T 96, Swin-L 192); each later stage has twice as many.
    swin.EMBED_DIM = 96
    # Blocks of each stage (Swin-L: 2, 2, 18, 2).
    swin.DEPTHS = [2, 2, 6, 2]
    # Attention heads of each stage (Swin-L: 6, 12, 24, 48).
    swin.NUM_HEADS = [3, 6, 12, 24]
    # Side of the attention windows.
    swin.WINDOW_SIZE = 7
    # Hidden width of a block's MLP, as a multiple of its channels.
    swin.MLP_RATIO = 4.0
    # Drop path probability of the last block; it grows linearly from 0 in the first.
    swin.DROP_PATH_RATE = 0.2
    # Stages that the backbone returns; each goes through a layer norm of its own.
    swin.OUT_FEATURES = ["res2", "res3", "res4", "res5"]


def _add_input_config(cfg: CN) -> None:
    # SSD's photometric distortion of training images.
    cfg.INPUT.COLOR_AUG_SSD = False
    # Crops of semantic training: no class covers more than this part of the crop (1.0 = no constraint).
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 1.0


def _add_data_config(cfg: CN) -> None:
    # Data sets given without Python: a list of {name, type, ...} mappings, see docs/DATASETS.md.
    cfg.DATASETS.CUSTOM = []


def _add_solver_config(cfg: CN) -> None:
    # "ADAMW" or "SGD".
    cfg.SOLVER.OPTIMIZER = "ADAMW"
    # The backbone's learning rate is multiplied with this.
    cfg.SOLVER.BACKBONE_MULTIPLIER = 1.0
    # Steps in a row with a loss that is not finite after which training stops; those before are skipped.
    cfg.SOLVER.NON_FINITE_STEPS = 1
    # Parts of a batch that are computed one after the other to save memory; their gradients add up for one update.
    cfg.SOLVER.ACCUMULATE_GRADIENTS = 1
    # Decay of an exponential moving average of the weights, which is evaluated and saved as the model; 0 = none.
    cfg.SOLVER.EMA_DECAY = 0.0
    # Type of mixed precision when SOLVER.AMP.ENABLED: "float16" (CUDA only) or "bfloat16".
    cfg.SOLVER.AMP.DTYPE = "float16"


def _add_engine_config(cfg: CN) -> None:
    # Iterations between two lines of the log, of metrics.json and of TensorBoard.
    cfg.SOLVER.LOG_PERIOD = 20
    # Periodic checkpoints that are kept (the newest ones); 0 = all. The best and the final one stay anyway.
    cfg.SOLVER.CHECKPOINTS_TO_KEEP = 3
    # Power of the schedule "WarmupPolyLR" (SOLVER.LR_SCHEDULER_NAME).
    cfg.SOLVER.POLY_LR_POWER = 0.9
    # Whether the training loss is computed on the first of DATASETS.TEST at every evaluation: validation/total_loss.
    cfg.TEST.VALIDATION_LOSS = False
    # Validation images that are drawn into TensorBoard at every evaluation, ground truth beside prediction.
    cfg.TEST.NUM_PICTURES = 4
