"""The config: every option, and how files and command lines are merged into it."""

from .options import add_knet_config, get_knet_cfg

__all__ = ["add_knet_config", "get_knet_cfg"]
