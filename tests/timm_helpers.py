"""Small networks of the kinds that timm has no small one of, registered there for the tests."""

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

STATEMENT = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "num_classes": 1000}
# timm reads this name
default_cfgs = generate_default_cfgs({"knet_test_swin.none": STATEMENT, "knet_test_vit14.none": STATEMENT})


@register_model
def knet_test_swin(pretrained=False, **kwargs):
    """A Swin transformer whose first map is square at 64 x 64 and has as many channels as rows."""
    settings = {"embed_dim": 16, "depths": (2, 1, 1, 1), "num_heads": (1, 2, 2, 4), "window_size": 7, "img_size": 224}
    return build_model_with_cfg(
        SwinTransformer,
        "knet_test_swin",
        pretrained,
        feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
        **{**settings, **kwargs},
    )


@register_model
def knet_test_vit14(pretrained=False, **kwargs):
    """A plain ViT with patches of 14 x 14 pixels, a class token and a native size that is not square."""
    settings = {"patch_size": 14, "embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": (56, 84)}
    return build_model_with_cfg(
        VisionTransformer,
        "knet_test_vit14",
        pretrained,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **{**settings, **kwargs},
    )
